"""What a configuration of a service cannot be, told before anything is started."""

from pathlib import Path

import pytest

from opensora.config.load import load_config
from opensora.serve.config import ServeConfig
from opensora.utils.errors import UserError


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("sizes: [axb]", "models.demo.sizes=axb: must be WIDTHxHEIGHT"),
        ("sizes: [32x32, x32]", "models.demo.sizes=x32: must be WIDTHxHEIGHT"),
        ("sizes: [32x32x32]", "models.demo.sizes=32x32x32: must be WIDTHxHEIGHT"),
        ("max_frames: -1", "models.demo.max_frames=-1: must be an integer >= 0"),
    ],
)
def test_a_model_that_could_not_be_served(tmp_path: Path, model: str, said: str) -> None:
    (tmp_path / "serve.yaml").write_text(f"models: {{demo: {{{model}}}}}\n")
    with pytest.raises(UserError, match=said):
        load_config(ServeConfig, tmp_path / "serve.yaml", [])
