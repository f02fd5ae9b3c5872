"""Exports: a flipped bit anywhere is noticed by name, a file is read by one process; no list, no check."""

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.config.run import SAVED_NAME, SampleConfig
from opensora.inference.find import find_source
from opensora.inference.load import verify_export
from opensora.models.weights.adapter_export import trained_adapter, write_adapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.train.setup import start_run
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.digests import NAME, read_digests, write_digests
from opensora.utils.files.safetensors_files import INDEX, SINGLE, write_file, write_weights
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import CONFIG as TRAINING
from tests.faults.conftest import Tally
from tests.faults.damages import outcome, replace
from tests.faults.runs import run_with


@pytest.fixture(scope="module")
def export(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one step leaves for sampling."""
    folder = tmp_path_factory.mktemp("export")
    config = folder / "train.yaml"
    config.write_text(TRAINING.format(output=folder, table=stills))
    more = ["train.steps=1", "optim.warmup_steps=0", "train.export=true"]
    assert run_distributed(run_with, 1, config, more, timeout=100, init=False)[0].end == "finished"
    return folder / "run/exported"


def sharded(folder: Path) -> Path:
    """Three shards with their index."""
    found: dict[str, str] = {}
    write_weights(
        folder, [(f"w{i}", torch.full((4, 5), float(i))) for i in range(3)], {}, shard_bytes=80, digests=found
    )
    write_digests(folder, found)
    return folder


def adapters(folder: Path) -> Path:
    found: dict[str, str] = {}
    values = {f"layer.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (2, 4)), ("B", (4, 2)))}
    write_adapter(folder, trained_adapter(values, 1.0), "peft", metadata={"step": "1"}, digests=found)
    write_digests(folder, found)
    return folder


def source_of(weights: Path) -> Path:
    found = find_source(SampleConfig(weights=str(weights), prompt="x"))
    return found.checkpoint or found.path


def test_what_may_be_given_as_weights(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of an export has the configuration beside it; one checkpoint is refused with what to give; that the
    newest checkpoint is damaged, so that an older one is read, is said."""
    assert source_of(export / SINGLE) == export / SINGLE
    run = shutil.copytree(export.parent, tmp_path / "run")
    good = run / "checkpoints/step-00000001"
    with pytest.raises(UserError, match="is one checkpoint of a run; give the run's folder"):
        source_of(good)
    assert source_of(run) == good and "damaged" not in capsys.readouterr().err
    shutil.copytree(good, run / "checkpoints/step-00000002")
    assert source_of(run) == good
    assert capsys.readouterr().err.count("step-00000002 is damaged; step-00000001 is sampled from instead") == 1


def test_the_list_is_what_sha256sum_reads(export: Path, tmp_path: Path) -> None:
    for folder, names in (
        (export, {SINGLE, SAVED_NAME}),
        (sharded(tmp_path / "sharded"), {INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}),
        (adapters(tmp_path / "adapters"), {WEIGHTS, CONFIG}),
    ):
        assert set(os.listdir(folder)) == {*names, NAME} and set(read_digests(folder) or {}) == names
        done = subprocess.run(["sha256sum", "-c", "--strict", NAME], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == len(names), done.stderr


def test_two_exports_of_the_same_are_the_same_bytes(export: Path, stills: Path, tmp_path: Path) -> None:
    """Another process, the same run: weights and list. The configuration names another folder."""
    config = tmp_path / "train.yaml"
    config.write_text(TRAINING.format(output=tmp_path, table=stills))
    run_distributed(
        run_with, 1, config, ["train.steps=1", "optim.warmup_steps=0", "train.export=true"], timeout=100, init=False
    )
    again = tmp_path / "run/exported"
    assert (again / SINGLE).read_bytes() == (export / SINGLE).read_bytes()
    ours, theirs = ((folder / NAME).read_text().splitlines() for folder in (again, export))
    assert [line for line in ours if SINGLE in line] == [line for line in theirs if SINGLE in line]


def read(folder: Path) -> None:
    """As sampling does: find what is there, then all processes look at the bytes."""
    if (folder / SAVED_NAME).is_file():
        find_source(SampleConfig(weights=str(folder), prompt="x"))
    if (folder / CONFIG).is_file():
        read_adapter(folder)
    verify_export(folder)


def flip(folder: Path, count: int) -> tuple[int, list[str]]:
    """How many flips, and which were not noticed by the name of the file or of the list."""
    rng, done, missed = random.Random(0), 0, []
    assert outcome(lambda: read(folder)) == "fine"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        every = path.name == NAME and not (folder / SAVED_NAME).is_file()  # a configuration takes its time to read
        places = range(len(content)) if every else sorted(rng.choices(range(len(content)), k=count))
        for at in places:
            replace(path, content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
            said = outcome(lambda: read(folder))
            if said == "fine" or said.startswith("WRONG") or not (path.name in said or NAME in said):
                missed.append(f"{path.name} at {at}: {said}")
            done += 1
        replace(path, content)
    assert outcome(lambda: read(folder)) == "fine"
    return done, missed


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("kind", ["export", "shards", "adapters"])
def test_a_flipped_bit_is_noticed(kind: str, count: int, export: Path, tmp_path: Path, tally: Tally) -> None:
    if kind == "export":
        folder = shutil.copytree(export, tmp_path / "copy")
    else:
        folder = {"shards": sharded, "adapters": adapters}[kind](tmp_path / "copy")
    done, missed = run_distributed(flip, 1, folder, count, timeout=850)[0]
    tally("a flipped bit in an export: noticed, the file named", done - len(missed), done)
    assert not missed, "\n".join(missed[:9])


def shares(folder: Path) -> list[str]:
    """Names of the files that this process hashed."""
    hashed: list[str] = []
    whole = digests._digest_of

    def noting(path: Path) -> str:
        hashed.append(path.name)
        return whole(path)

    digests._digest_of = noting
    verify_export(folder)
    return hashed


def test_a_file_that_cannot_be_read_is_not_called_damaged(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner would export again what only needs another permission, or another moment."""
    real = Path.open

    def forbidden(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == SAVED_NAME:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=rf"/{SAVED_NAME}: cannot be read \(Permission denied\); make it readable"):
        digests.verify(export, [SAVED_NAME])


def test_each_file_is_hashed_by_one_process(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "sharded")
    everyone = run_distributed(shares, 3, folder)
    assert sorted(name for hashed in everyone for name in hashed) == sorted(read_digests(folder) or {})
    assert max(map(len, everyone)) == 2


def refused(*places: Path) -> str:
    try:
        verify_export(*places)
    except UserError as error:
        return str(error)
    return "fine"


def test_all_processes_refuse_alike_and_absent_lists_are_allowed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "sharded")
    shard = folder / "model-00003-of-00003.safetensors"
    replace(shard, shard.read_bytes()[:-1] + b"\1")
    said = run_distributed(refused, 2, folder)
    assert said[0] == said[1] and f"{shard}: damaged, or changed since it was exported" in said[0]
    assert run_distributed(refused, 2, folder / INDEX)[0] == said[0]
    assert run_distributed(refused, 1, folder / "model-00001-of-00003.safetensors")[0] == "fine"
    other = adapters(tmp_path / "adapters")
    assert run_distributed(refused, 2, other, folder)[1] == said[0]
    (folder / NAME).unlink()
    assert run_distributed(refused, 2, other, folder) == ["fine", "fine"]


def test_files_that_are_replaced_leave_the_list(tmp_path: Path) -> None:
    """Weights written into an exported folder are not refused later, and other lines stay."""
    folder = sharded(tmp_path / "sharded")
    (folder / "config.yaml").write_text("x")
    write_digests(folder, {**(read_digests(folder) or {}), "config.yaml": digests._digest_of(folder / "config.yaml")})
    write_file(folder / "model-00001-of-00003.safetensors", {"w0": torch.zeros(3)}, {})
    assert "model-00001-of-00003.safetensors" not in (read_digests(folder) or {})
    write_weights(folder, [("w", torch.zeros(3))], {})
    assert set(read_digests(folder) or {}) == {"config.yaml"}
    assert run_distributed(refused, 1, folder)[0] == "fine"
    write_file(folder / "config.yaml", {"w": torch.zeros(1)}, {})
    assert not (folder / NAME).exists()


def start(config: Path, overrides: list[str]) -> Any:
    from opensora.config.load import load_config
    from opensora.config.run import RunConfig

    with start_run(load_config(RunConfig, config, overrides)) as run:
        return run.step


def test_training_from_a_damaged_export_is_refused(export: Path, config: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export, tmp_path / "copy")
    more = ["train.steps=1", "optim.warmup_steps=0", f"train.init_from={folder}"]
    assert run_distributed(start, 2, config, more, timeout=100, init=False) == [0, 0]
    content = (folder / SINGLE).read_bytes()
    replace(folder / SINGLE, content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    with pytest.raises(DistributedFailure, match=f"{SINGLE}: damaged, or changed since it was exported"):
        run_distributed(start, 2, config, [*more, f"output={tmp_path}/other"], timeout=100, init=False)
