"""What programs without a model import: torch takes seconds to import, and a GPU that crashes takes it down."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "module",
    [
        "opensora.sampling.options",
        "opensora.config.load",
        "opensora.utils.files.video_writer",
        "opensora.serve.web.__main__",
        "opensora.serve.web.app",
        "opensora.serve.web.server",
    ],
)
def test_torch_is_not_imported(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
