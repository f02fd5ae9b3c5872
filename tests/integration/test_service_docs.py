"""docs/service.md: its examples with curl, typed as they stand, and the fields that it names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import openai
import pytest

from tests.conftest import ROOT
from tests.service_process import ServiceProcess, wait_for

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]
PAGE = (ROOT / "docs/service.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
CURL = [line for line in COMMANDS if line.startswith("curl ")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:  # type: ignore[misc]
    with ServiceProcess(tmp_path_factory.mktemp("docs")) as service:
        yield service


def typed(service: ServiceProcess, folder: Path, line: str, id: str = "") -> str:
    """What a command prints; the status of the answer is behind it."""
    own = line.replace("http://127.0.0.1:8000", service.url).replace("$ID", id)
    done = subprocess.run([*("bash", "-c"), own + " -w '\\n%{http_code}'"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (own, done.stderr)
    return done.stdout


def created(service: ServiceProcess, folder: Path, field: str) -> str:
    """The id of a job."""
    line = f"curl -s http://127.0.0.1:8000/v1/videos -F prompt=a -F {field}"
    return str(json.loads(typed(service, folder, line).rpartition("\n")[0])["id"])


def test_every_call_by_curl(service: ServiceProcess, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/images/shapes.png", tmp_path / "first.png")
    id, tried = "", 0
    for line in CURL:
        other = created(service, tmp_path, "num_steps=10000") if "/cancel" in line else id
        printed, _, status = typed(service, tmp_path, line, other).rpartition("\n")
        assert status == "200", (line, printed)
        if line.endswith(("/content -o clip.mp4", "-o clip.webp")):
            assert (tmp_path / line.rpartition(" ")[2]).stat().st_size > 100
        if "-F seed=7" in line:
            id = json.loads(printed)["id"]
            assert json.loads(printed)["x"]["seed"] == 7
        if line.endswith("/events"):
            assert '"status": "completed"' in printed
        if "DELETE" in line:
            assert json.loads(printed) == {"id": id, "object": "video.deleted", "deleted": True}
        tried += 1
    assert tried >= 13


def test_the_fields_of_the_table_are_those_of_the_api() -> None:
    from opensora.serve.request import FIELDS

    table = PAGE.partition("| field | meaning |")[2].partition("\n\n")[0]
    named = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named and named <= {*FIELDS}


def test_the_example_with_the_sdk(service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert openai.VERSION  # that the program imports
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("http://127.0.0.1:8000", service.url), {})
    assert wait_for(lambda: (tmp_path / "circle.mp4").read_bytes(), "the clip")[4:8] == b"ftyp"
