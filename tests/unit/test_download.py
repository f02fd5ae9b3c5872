"""Published weights are fetched by name only, at pinned commits, checked, gone on with; by a hub on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opensora.cli import download
from opensora.utils.errors import UserError
from opensora.utils.files import hub as hub_files
from opensora.utils.files.published_files import SETS, PublishedFile, Repository, how_to_fetch, how_to_fetch_all, set_of
from tests.conftest import ROOT
from tests.hub_server import COMMIT, Hub

OTHER = "89abcdef0123456789abcdef0123456789abcdef"
PATTERNS = ("a.safetensors", "b/*")
FILES = {"a.safetensors": PublishedFile(), "b/config.json": PublishedFile()}
# The command, with a set that the stand-in has.
COMMAND = f"""
from opensora.cli import download
from opensora.cli.main import run_cli
from opensora.utils.files.published_files import SETS, PublishedFile, Repository
SETS["some"] = (Repository(name="some/where", revision=None, patterns={PATTERNS}, files={{}}),)
run_cli(download.main)
"""
REPOSITORY = Repository(name="some/where", revision=None, patterns=PATTERNS, files=FILES)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    template = f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(SETS, "some", (REPOSITORY,))
    yield stand_in
    stand_in.stop()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(download, "announce", lines.append)
    return lines


def run(*argv: str) -> str:
    """The error of the command; empty: none."""
    try:
        assert download.main(list(argv)) == 0
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def pin(monkeypatch: pytest.MonkeyPatch, commit: str | None, **files: PublishedFile) -> None:
    known = FILES | {f"{name}.safetensors": file for name, file in files.items()}
    monkeypatch.setitem(SETS, "some", (Repository(name="some/where", revision=commit, patterns=PATTERNS, files=known),))


def test_the_files_come_and_the_commit_of_the_first_download_stays(hub: Hub, said: list[str], tmp_path: Path) -> None:
    target = tmp_path / "ckpts"
    hub.content |= {"b/more.txt": b"more", "not/asked.for": b"x", "b/empty": b""}
    assert run("some", "some", "--to", str(target)) == ""
    wanted = {name: content for name, content in hub.content.items() if name != "not/asked.for"}
    kept = {download.REVISIONS, download.LISTING}
    found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert {name: content for name, content in found.items() if name not in kept} == wanted
    assert set(found) == set(wanted) | kept and json.loads(found[download.REVISIONS]) == {"some/where": COMMIT}
    assert len(said) == 2 and said[1] == f"{target}: some/where at {COMMIT} is there"
    assert said[0] == (
        f"some/where: no commit of it is pinned here; {COMMIT}, its newest, is taken and kept in "
        f"{target}/REVISIONS.json; give --revision COMMIT for another"
    )
    hub.commit, asked = OTHER, list(hub.asked)
    assert run("some", "--to", str(target)) == "" and hub.asked == asked
    assert f"{COMMIT}, that of the first download, is taken" in said[2]
    (target / download.REVISIONS).write_text("[]")
    assert run("some", "--to", str(target)).startswith(f"{target / download.REVISIONS}: cannot be read")


def test_a_file_that_was_stopped_goes_on_where_it_was(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused in the middle; and broken off in the middle of parts, which are asked for again."""
    monkeypatch.setattr(hub_files, "PART", 1000)
    hub.content["a.safetensors"] = os.urandom(10_500)
    hub.refuse_from = 6000
    assert run("some", "--to", str(tmp_path)).startswith("https://huggingface.co/some/where: cannot be fetched (")
    assert not (tmp_path / "a.safetensors").exists() and not (tmp_path / download.REVISIONS).is_dir()
    (part,) = tmp_path.glob(".a.safetensors.*.part")
    there = part.stat().st_size
    assert part.read_bytes() == hub.content["a.safetensors"][:there] and there % 1000 == 0
    hub.refuse_from, hub.drop, before = 1 << 60, 1, len(hub.asked)
    assert run("some", "--to", str(tmp_path)) == ""
    assert (tmp_path / "a.safetensors").read_bytes() == hub.content["a.safetensors"] and not part.exists()
    begins = [begin for file, begin, _ in hub.asked[before:] if file == "a.safetensors"]
    assert min(begins) == there and len(begins) == len(set(begins)) + 1  # the one that was broken off, twice


@pytest.mark.timeout(120)
def test_killed_and_started_again(tmp_path: Path) -> None:
    """The command as it is typed, told of the hub by HF_ENDPOINT, and kill -9 in the middle of a file."""
    hub = Hub()
    hub.content["a.safetensors"] = os.urandom(5 * hub_files.PART + 7)
    hub.hold_from = 2 * hub_files.PART
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, "some", "--to", str(tmp_path / "ckpts")]
    try:
        with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as first:
            assert hub.held.wait(60)
            while sum(path.stat().st_size for path in tmp_path.rglob(".a.*.part")) < 2 * hub_files.PART:
                threading.Event().wait(0.05)
                assert first.poll() is None
            first.send_signal(signal.SIGKILL)
        hub.release.set()
        asked = len(hub.asked)
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "ckpts/a.safetensors").read_bytes() == hub.content["a.safetensors"]
        resumed = {begin for file, begin, _ in hub.asked[asked:] if file == "a.safetensors"}
        assert resumed == {2 * hub_files.PART, 3 * hub_files.PART, 4 * hub_files.PART, 5 * hub_files.PART}
        assert done.stderr.count("no commit of it is pinned here") == 1
    finally:
        hub.stop()


@pytest.mark.parametrize(
    ("file", "sent", "words"),
    [("a.safetensors", b"Weights", "SHA-256"), ("b/config.json", b"[]", "git's SHA-1")],
)
def test_a_file_that_comes_wrong(file: str, sent: bytes, words: str, hub: Hub, tmp_path: Path) -> None:
    hub.sent = {file: sent}
    line = run("some", "--to", str(tmp_path))
    begin = f"{tmp_path / file}: came wrong, has {words} "
    assert line.startswith(begin) and line.endswith("was published; start the same command again")
    assert not (tmp_path / file).exists() and not list(tmp_path.rglob(".*.part"))
    hub.sent = {}
    assert run("some", "--to", str(tmp_path)) == "" and (tmp_path / file).read_bytes() == hub.content[file]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"weight", "has 6 bytes, 7 were published"), (b"Weights", "has SHA-256 .*, .* was published")],
)
def test_files_that_are_not_those_that_were_published(content: bytes, words: str, hub: Hub, tmp_path: Path) -> None:
    """Those of a person are not touched, and nothing is fetched beside them."""
    (tmp_path / "a.safetensors").write_bytes(content)
    line = run("some", "--to", str(tmp_path))
    assert re.fullmatch(f"{re.escape(str(tmp_path / 'a.safetensors'))}: {words}; remove it and start the .*", line)
    assert (tmp_path / "a.safetensors").read_bytes() == content and hub.asked == []
    longer = b"weights and more"
    (tmp_path / "a.safetensors").write_bytes(longer)
    assert "has 16 bytes, 7 were published" in run("some", "--to", str(tmp_path))


def test_what_is_known_here_goes_before_what_a_hub_lists(
    hub: Hub, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, COMMIT, a=PublishedFile(sha256="0" * 64))
    assert "was published; start the same command again" in run("some", "--to", str(tmp_path)) and said == []
    pin(monkeypatch, OTHER, a=PublishedFile(sha256="0" * 64))  # of another commit than is asked for
    assert run("some", "--to", str(tmp_path), "--revision", COMMIT) == "" and len(said) == 1


def test_a_revision_in_place_of_the_pinned(
    hub: Hub, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(monkeypatch, OTHER)
    for given in (COMMIT, "v1", "main"):
        target = tmp_path / given
        assert run("some", "--to", str(target), "--revision", given) == ""
        assert json.loads((target / download.REVISIONS).read_text()) == {"some/where": COMMIT}
    assert said == [f"{tmp_path / given}: some/where at {COMMIT} is there" for given in (COMMIT, "v1", "main")]
    assert "cannot be fetched (" in run("some", "--to", str(tmp_path / "x"), "--revision", "v2")
    line = run("text-encoders", "--to", str(tmp_path / "y"), "--revision", "v1")
    assert line.startswith("--revision=v1: must be of one repository, not google/t5-v1_1-xxl, openai/") and hub.asked
    assert not (tmp_path / "y").exists()


def test_without_a_network(hub: Hub, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched whole needs none; of what is missing it is said what to put where."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries of the library
    assert run("some", "--to", str(tmp_path / "whole")) == ""
    hub.content["b/more"] = b"more"
    hub.refuse_from = 0
    assert "cannot be fetched (" in run("some", "--to", str(tmp_path / "part"))
    hub.stop()
    for name in ("b/config.json", "a.safetensors"):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_bytes(hub.content[name])
    assert run("some", "--to", str(tmp_path / "whole")) == ""
    assert run("some", "--to", str(tmp_path / "own"), "--revision", COMMIT) == ""
    assert "does not answer (" in said[-2] and "are compared with what is known here alone" in said[-2]
    line = run("some", "--to", str(tmp_path / "none"))
    assert line.startswith("https://huggingface.co/some/where: cannot be fetched (")
    assert line.endswith(f"{tmp_path}/none/a.safetensors, {tmp_path}/none/b/*")
    assert list((tmp_path / "none").iterdir()) == []


def test_a_licence_that_was_not_accepted(hub: Hub, tmp_path: Path) -> None:
    hub.closed = True
    assert "accept its licence there and set HF_TOKEN, or start" in run("flux1-dev", "--to", str(tmp_path))
    assert "set HF_TOKEN" not in run("some", "--to", str(tmp_path))


def test_errors_of_the_library_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, told that there is no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = run("open-sora-v2-dc-ae", "--to", str(tmp_path))
    assert line.startswith("https://huggingface.co/hpcai-tech/Open-Sora-v2-Video-DC-AE: cannot be fetched (")
    assert line.endswith(f"{tmp_path}/Open_Sora_v2_Video_DC_AE.safetensors, {tmp_path}/F32T4C128_AE.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_hubs_that_are_not_as_they_should_be(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.content["b/../../outside"] = b"x"
    assert "lists a file outside of its folder, 'b/../../outside'" in run("some", "--to", str(tmp_path / "0" / "1"))
    assert not (tmp_path / "0" / "outside").exists() and not (tmp_path / "outside").exists()
    del hub.content["b/../../outside"], hub.content["b/config.json"]
    line = run("some", "--to", str(tmp_path / "2"))
    assert line.endswith(f"has no b/config.json at {COMMIT}; give --revision of a commit that has it")
    monkeypatch.setattr(hub_files, "PART", 1000)
    hub.content |= {"a.safetensors": bytes(2000), "b/config.json": b"{}"}
    hub.parts = False
    assert "its server sends files only as a whole" in run("some", "--to", str(tmp_path / "3"))


def test_two_at_once_and_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold_from, answers = 0, []
    first = threading.Thread(target=lambda: answers.append(run("some", "--to", str(tmp_path))))
    first.start()
    assert hub.held.wait(30)
    assert re.search(r"\.json: another process is fetching it|rs: another", run("some", "--to", str(tmp_path)))
    hub.release.set()
    first.join()
    assert answers == [""]
    (tmp_path / "a.safetensors").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda place: _Usage(6))
    line = run("some", "--to", str(tmp_path))
    assert line.startswith(f"--to={tmp_path}: 0.0 GB are to be fetched, 0.0 GB are free; name a place")
    monkeypatch.setattr("shutil.disk_usage", lambda place: _Usage(7))
    assert run("some", "--to", str(tmp_path)) == ""


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_only_what_is_named_is_fetched(hub: Hub, tmp_path: Path) -> None:
    assert "required: SET" in run("--to", str(tmp_path))
    assert "invalid choice: 'else'" in run("else", "--to", str(tmp_path)) and hub.asked == []


def models_of(name: str) -> list[str]:
    """Where a set puts what a configuration would name: folders with a config.json, and files beside none; a pipeline
    is one folder."""
    places = [f"{one.folder}/{file}".strip("/") for one in SETS[name] for file in one.files]
    if any("model_index.json" in one.files for one in SETS[name]):
        return sorted({place.split("/")[0] for place in places})
    folders = [place.removesuffix("/config.json") for place in places if place.endswith("/config.json")]
    return folders + [place for place in places if not any(place.startswith(f"{folder}/") for folder in folders)]


@pytest.mark.parametrize("name", SETS)
def test_the_command_that_is_told_brings_the_smallest_set_to_the_path(name: str) -> None:
    for model in models_of(name):
        for path in (f"/data/ckpts/{model}", f"ckpts/{model}", model, f"/other/{Path(model).name}"):
            words = how_to_fetch(path).partition("opensora.cli.download ")[2].split(", and name ")
            found, to = words[0].split(" --to ")
            there = {str(Path(to, one)) for one in models_of(found)}
            assert (words[1].removesuffix(", where that puts it") if words[1:] else path) in there
            assert bool(words[1:]) == (path not in there)
            holding = [one for one in SETS if Path(model).name in {Path(place).name for place in models_of(one)}]
            assert len(models_of(found)) == min(len(models_of(one)) for one in holding)


def test_no_command_for_what_another_one_brings() -> None:
    both = ["a/Open_Sora_v2.safetensors", "a/google/t5-v1_1-xxl", "a/openai/clip-vit-large-patch14", "x.csv"]
    fetch = "python -m opensora.cli.download"
    assert how_to_fetch_all(both) == how_to_fetch_all(both[::-1]) == [f"{fetch} open-sora-v2 --to a"]
    assert how_to_fetch_all(["DeepFloyd/t5-v1_1-xxl"]) == [
        f"{fetch} text-encoders --to ., and name google/t5-v1_1-xxl, where that puts it"
    ]
    assert how_to_fetch_all(both[1:]) == [f"{fetch} text-encoders --to a"]
    assert how_to_fetch_all(["b/Open_Sora_v2.safetensors", *both[1:]]) == [
        f"{fetch} open-sora-v2 --to b",
        f"{fetch} text-encoders --to a",
    ]


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith(("wan", "hunyuan"))])
def test_a_part_of_a_pipeline_is_fetched_with_all_of_it(name: str) -> None:
    """Parts have the same names in all of them; one command for all parts of one."""
    (pipeline,) = models_of(name)
    fetch = f"python -m opensora.cli.download {name} --to"
    for part in ("", "/transformer", "/vae", "/transformer/diffusion_pytorch_model.safetensors.index.json"):
        assert set_of(f"ckpts/{pipeline}{part}") == name
        assert how_to_fetch(f"a/b/{pipeline}{part}") == f", or fetch it: {fetch} a/b"
    assert how_to_fetch_all([f"a/{pipeline}/transformer", f"a/{pipeline}", f"a/{pipeline}/vae"]) == [f"{fetch} a"]
    assert set_of("ckpts/transformer") is None


NAMING = [
    path for path in sorted((ROOT / "configs").glob("*/*/*.yaml")) if path.parent.name in ("wan", "hunyuan_video")
]


@pytest.mark.parametrize("path", [path for path in NAMING if "ckpts" in path.read_text(encoding="utf-8")], ids=str)
def test_what_a_configuration_names_can_be_fetched(path: Path) -> None:
    named = set(re.findall(r"ckpts/[\w./-]+", path.read_text(encoding="utf-8")))
    assert len({set_of(place) for place in named} - {None}) == 1 == len(how_to_fetch_all(named)), named


def test_the_table(tmp_path: Path) -> None:
    for repositories in SETS.values():
        for one in repositories:
            assert one.revision is None or re.fullmatch("[0-9a-f]{40}", one.revision)
            for file in one.files:
                assert any(Path(file).match(pattern) for pattern in one.patterns), file
            for known in one.files.values():
                assert known.sha256 is None or re.fullmatch("[0-9a-f]{64}", known.sha256)
    assert set_of("ckpts/Open_Sora_v2.safetensors") == "open-sora-v2" and set_of("x/ae.safetensors") == "flux1-dev"
    assert set_of("ckpts/google/t5-v1_1-xxl") == set_of("openai/clip-vit-large-patch14/") == "text-encoders"
    fetched = ", or fetch it: python -m opensora.cli.download"
    assert how_to_fetch(Path("a/ae.safetensors")) == f"{fetched} flux1-dev --to a" and how_to_fetch("a/b.pt") == ""
    assert how_to_fetch("c/openai/clip-vit-large-patch14") == f"{fetched} text-encoders --to c"
    assert how_to_fetch("Open_Sora_v2.safetensors") == f"{fetched} open-sora-v2 --to ."
    assert set_of("PixArt-XL-2-512x512.pth") == "pixart-512" and set_of("ckpts/OpenSora-STDiT-v3") == "open-sora-v1-2"
    elsewhere = "and name google/t5-v1_1-xxl, where that puts it"
    assert how_to_fetch("DeepFloyd/t5-v1_1-xxl") == f"{fetched} text-encoders --to ., {elsewhere}"
    assert set_of("ckpts/other.safetensors") is None and set_of("config.json") is None
