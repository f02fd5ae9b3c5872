"""Published weights are fetched by name only, at pinned commits, checked, and gone on with; no network in here."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from opensora.cli import download
from opensora.utils.errors import UserError
from opensora.utils.files.published_files import SETS, PublishedFile, Repository, set_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands in for huggingface.co: writes the files of a set, or what it is told to write in their place."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.newest: list[str] = []
        self.content = {"b/config.json": b"{}", "a.safetensors": b"weights"}
        self.error: Exception | None = None

    def snapshot(self, name: str, revision: str, folder: Path, patterns: Sequence[str]) -> None:
        self.asked.append((name, revision, str(folder)))
        if self.error:
            raise self.error
        for file, content in self.content.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)

    def newest_revision(self, name: str) -> str:
        if self.error:
            raise self.error
        self.newest.append(name)
        return COMMIT


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(download, "snapshot", stand_in.snapshot)
    monkeypatch.setattr(download, "newest_revision", stand_in.newest_revision)
    known = PublishedFile(size=7, sha256=hashlib.sha256(b"weights").hexdigest())
    files = {"a.safetensors": known, "b/config.json": PublishedFile()}
    repository = Repository(name="some/where", revision=None, patterns=("a.safetensors", "b/*"), files=files)
    monkeypatch.setitem(SETS, "some", (repository,))
    return stand_in


def run(*argv: str) -> str:
    """The error of the command; empty: none."""
    try:
        assert download.main(list(argv)) == 0
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_the_commit_of_the_first_download_stays(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "ckpts"
    assert run("some", "--to", str(target)) == ""
    assert json.loads((target / download.REVISIONS).read_text()) == {"some/where": COMMIT}
    assert run("some", "some", "--to", str(target)) == ""
    assert hub.asked == [("some/where", COMMIT, str(target))] * 2 and hub.newest == ["some/where"]
    (target / download.REVISIONS).write_text("[]")
    assert run("some", "--to", str(target)).startswith(f"{target / download.REVISIONS}: cannot be read")


def test_a_download_that_was_stopped_goes_on_with_the_same_commit(hub: Hub, tmp_path: Path) -> None:
    asked = download.snapshot

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    download.snapshot = stopped  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            download.main(["some", "--to", str(tmp_path)])
    finally:
        download.snapshot = asked
    assert run("some", "--to", str(tmp_path)) == "" and hub.newest == ["some/where"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"weight", "has 6 bytes, 7 were published; remove it"),
        (b"Weights", "has SHA-256 .*, .* was published; remove it"),
    ],
)
def test_files_that_are_not_those_that_were_published(content: bytes, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.content = {"b/config.json": b"{}", "a.safetensors": content}
    assert re.match(f"{re.escape(str(tmp_path / 'a.safetensors'))}: {said}", run("some", "--to", str(tmp_path)))


def test_offline_it_says_what_to_put_where(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.error = OSError(101, "Network is unreachable")
    said = run("some", "--to", str(tmp_path))
    assert said.startswith("https://huggingface.co/some/where: cannot be fetched (")
    assert "Network is unreachable" in said and said.endswith(f"{tmp_path}/a.safetensors, {tmp_path}/b/*")
    hub.error = None
    del hub.content["a.safetensors"]  # as the library does with a folder that it cannot compare
    assert "cannot be fetched (a.safetensors did not come); start" in run("some", "--to", str(tmp_path))
    hub.error = OSError("no")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "accept its licence there and set HF_TOKEN, or start" in run("flux1-dev", "--to", str(tmp_path))


def test_errors_of_the_library_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, told that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = run("open-sora-v2-dc-ae", "--to", str(tmp_path))
    assert said.startswith("https://huggingface.co/hpcai-tech/Open-Sora-v2-Video-DC-AE: cannot be fetched (")
    assert said.endswith(f"{tmp_path}/Open_Sora_v2_Video_DC_AE.safetensors, {tmp_path}/F32T4C128_AE.safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_only_what_is_named_is_fetched(hub: Hub, tmp_path: Path) -> None:
    assert "required: SET" in run("--to", str(tmp_path))
    assert "invalid choice: 'else'" in run("else", "--to", str(tmp_path)) and hub.asked == []


def test_the_table(tmp_path: Path) -> None:
    for repositories in SETS.values():
        for one in repositories:
            assert one.revision is None or re.fullmatch("[0-9a-f]{40}", one.revision)
            for file in one.files:
                assert any(Path(file).match(pattern) for pattern in one.patterns), file
            for known in one.files.values():
                assert known.sha256 is None or re.fullmatch("[0-9a-f]{64}", known.sha256)
    assert set_of("ckpts/Open_Sora_v2.safetensors") == "open-sora-v2" and set_of("x/ae.safetensors") == "flux1-dev"
    assert set_of("ckpts/google/t5-v1_1-xxl") == set_of("openai/clip-vit-large-patch14/") == "open-sora-v2"
    assert set_of("PixArt-XL-2-512x512.pth") == "pixart-512" and set_of("ckpts/OpenSora-STDiT-v3") == "open-sora-v1-2"
    assert set_of("ckpts/other.safetensors") is None and set_of("config.json") is None
