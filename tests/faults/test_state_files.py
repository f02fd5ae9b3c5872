"""Small files that a run writes and reads again, damaged: rebuilt with a line, or refused in one, never a traceback."""

import errno
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as replace_field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from acceleration.files.sealed_json import seal
from launch import attempts
from opensora.config.load import load_config, save, to_yaml
from opensora.config.run import SAVED_NAME, RunConfig
from opensora.datasets.loading import feature_store
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_export import trained_adapter, write_adapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.models.weights.reader import WeightFile
from opensora.planner.cost_fit import measured
from opensora.train.state import resume, run_lock
from opensora.train.state.disk_check import check_writable
from opensora.train.state.run_lock import DONE, OWNER, RunLock, check_places, finished, write_config, write_done
from opensora.utils import metrics_log
from opensora.utils.errors import UserError
from opensora.utils.files import digests
from opensora.utils.files.safetensors_files import INDEX, write_weights
from opensora.utils.metrics_log import METRICS_NAME, MetricsLogger, read_metrics
from tests.dist.harness import run_distributed
from tests.faults.conftest import CONFIG as TRAINING
from tests.faults.conftest import Tally
from tests.faults.damages import BRACKETS, IN_PLACE, json_bytes, of_bytes, of_values, outcome, replace
from tests.faults.runs import run_with

COUNTS = [50, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(run_lock, "REREAD_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # thousands of files on a busy disk
    path = tmp_path / "train.yaml"
    path.write_text(TRAINING.format(output=tmp_path / "runs", table="clips.csv"))
    made = load_config(RunConfig, path)
    made.folder.mkdir(parents=True)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was announced."""
    lines: list[str] = []
    for module in (run_lock, resume, metrics_log):
        monkeypatch.setattr(module, "announce", lambda line, level=logging.INFO: lines.append(line))
    return lines


@dataclass
class File:
    """A file that is written once, damaged, and read."""

    path: Path
    read: Callable[[], Any]
    rebuilt: bool  # read whatever is in it, with a line; else it may be refused
    also: tuple[bytes, ...] = ()  # damage of its own kind
    content: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.content = self.path.read_bytes()


def config_file(cfg: RunConfig) -> File:
    save(cfg, cfg.folder / SAVED_NAME)
    text = to_yaml(cfg)

    def read() -> None:
        resume.announce_changes(cfg)
        write_config(cfg)
        assert (cfg.folder / SAVED_NAME).read_text() == text

    return File(
        cfg.folder / SAVED_NAME, read, rebuilt=True, also=(b"a: &b [*b]", b"? [a]\n: b", b"- 1\n", b"optim: 3\n")
    )


def owner_file(cfg: RunConfig) -> File:
    lock = RunLock(cfg.folder)
    content = (cfg.folder / OWNER).read_bytes()
    lock.release()
    (cfg.folder / OWNER).write_bytes(content)

    def read() -> None:
        RunLock(cfg.folder, beat_s=0.01, stale_s=0.01).release()
        assert not (cfg.folder / OWNER).exists()

    return File(cfg.folder / OWNER, read, rebuilt=True)


def done_file(cfg: RunConfig) -> File:
    write_done(cfg)

    def read() -> None:
        assert not finished(cfg), "damage taken for an end"
        write_done(cfg)
        assert finished(cfg)

    return File(cfg.folder / DONE, read, rebuilt=True)


def metrics_file(cfg: RunConfig) -> File:
    with MetricsLogger(cfg.folder) as logger:
        for step in range(1, 9):
            logger.log(step, {"loss": 1 / step, "time/step_s": 1.0, "data/wait_s": 0.5})
        logger.log_event("interrupted", 8)

    plan = SimpleNamespace(cost_features=lambda step: np.ones(4))

    def read() -> None:
        records, events = read_metrics(cfg.folder / METRICS_NAME)
        measured(plan, records, {event["step"] for event in events})  # type: ignore[arg-type]
        with MetricsLogger(cfg.folder, resumed_step=8) as logger:
            logger.log(9, {"loss": 0.5})
        records, _ = read_metrics(cfg.folder / METRICS_NAME)
        assert records[-1] == {"step": 9, "loss": 0.5}
        lines = (cfg.folder / METRICS_NAME).read_text().splitlines()
        assert all(isinstance(json.loads(line)["step"], int) for line in lines)

    return File(
        cfg.folder / METRICS_NAME, read, rebuilt=True, also=(b"[" * BRACKETS + b"\n", b"\xff\n", b'{"step": 1e99}\n')
    )


def wandb_file(cfg: RunConfig) -> File:
    metrics_log._wandb_identity(cfg.folder, "run", fresh=True)

    def read() -> None:
        identity = metrics_log._wandb_identity(cfg.folder, "run", fresh=False)
        assert re.fullmatch("run-[0-9a-f]{8}", identity)
        assert metrics_log._wandb_identity(cfg.folder, "run", fresh=False) == identity

    return File(cfg.folder / metrics_log.WANDB_ID_NAME, read, rebuilt=True)


def attempts_file(cfg: RunConfig) -> File:
    path = cfg.folder / "attempts.jsonl"
    command = ["decide", "--run", str(cfg.folder), "--job", str(cfg.folder), "--code", "1"]
    for _ in range(2):
        attempts.main(command)
    return File(path, lambda: attempts.main(command), rebuilt=True, also=(b'{"attempt": []}\n', b"\xff\n"))


def adapter_file(cfg: RunConfig) -> File:
    values = {f"layer.lora_{part}.weight": torch.zeros(shape) for part, shape in (("A", (2, 4)), ("B", (4, 2)))}
    write_adapter(cfg.folder / "lora", trained_adapter(values, 1.0), "peft", metadata={})
    return File(cfg.folder / "lora" / CONFIG, lambda: read_adapter(cfg.folder / "lora"), rebuilt=False)


def adapter_weights(cfg: RunConfig) -> File:
    adapter_file(cfg)
    return File(cfg.folder / "lora" / WEIGHTS, lambda: read_adapter(cfg.folder / "lora"), rebuilt=False)


def index_file(cfg: RunConfig) -> File:
    weights = {f"w{number}": torch.zeros(4) for number in range(3)}
    write_weights(cfg.folder / "weights", weights.items(), {}, shard_bytes=16)
    return File(cfg.folder / "weights" / INDEX, lambda: WeightFile(cfg.folder / "weights", FORMAT), rebuilt=False)


def list_of_digests(cfg: RunConfig) -> File:
    folder = cfg.folder / "listed"
    folder.mkdir()
    save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    digests.write_digests(folder, {"model.safetensors": digests._digest_of(folder / "model.safetensors")})
    digests.verify(folder, ["model.safetensors"])

    def read() -> None:
        digests.verify(folder, ["model.safetensors"])
        raise AssertionError("damage of the list was not noticed")

    return File(folder / digests.NAME, read, rebuilt=False)


def stored(cfg: RunConfig, name: str) -> File:
    """A file of stored features, read as a run does."""
    folder = cfg.folder / "features"
    tensors = {"latents": torch.zeros(2, 1), "txt": torch.zeros(2, 1, 1), "y_vec": torch.zeros(2, 1)}
    part = SimpleNamespace(epoch=0, bucket="32px", sample_ids=(4, 7))
    feature_store.write_null(
        folder, {name: tensor[:1] for name, tensor in tensors.items() if name != "latents"}, "1234"
    )
    feature_store.write_shard(folder, 0, [(part, feature_store.Features(**tensors))], "1234")  # type: ignore[list-item]
    feature_store.write_index(folder, 1, 1, {"seed": 3}, "1234")

    def read() -> None:
        feature_store.verify(folder)
        store = feature_store.FeatureStore(folder)
        assert store.read(part).txt.shape == (2, 1, 1)  # type: ignore[arg-type]
        assert name.startswith("shard"), "damage was not noticed"

    return File(folder / name, read, rebuilt=False)


FILES = {
    **{
        f"features/{n}": partial(stored, name=n)
        for n in (feature_store.MANIFEST, feature_store.INDEX, feature_store.NULL)
    },
    "features/shard": partial(stored, name=feature_store.shard_name(0)),
    "config.yaml": config_file,
    "owner.json": owner_file,
    "DONE": done_file,
    "metrics.jsonl": metrics_file,
    "wandb_id": wandb_file,
    "attempts.jsonl": attempts_file,
    "adapter_config.json": adapter_file,
    "adapter_model.safetensors": adapter_weights,
    "model.safetensors.index.json": index_file,
    "SHA256SUMS": list_of_digests,
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes(name: str, count: int, cfg: RunConfig, said: list[str], tally: Tally) -> None:
    file = FILES[name](cfg)
    wrong = []
    for damaged in [*file.also, *of_bytes(file.content, random.Random(name), count)]:
        replace(file.path, damaged)
        found = outcome(file.read)
        if found.startswith("WRONG") or (file.rebuilt and found != "fine"):
            wrong.append(f"{damaged[:80]!r}: {found}")
    done = count + len(file.also)
    tally("damaged state files: rebuilt with a line, or refused in one", done - len(wrong), done)
    assert not wrong, "\n".join(wrong[:9])


HOLD_JSON = (
    *("owner.json", "DONE", "wandb_id", "features/manifest.json"),
    *("adapter_config.json", "model.safetensors.index.json"),
)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", HOLD_JSON)
def test_valid_json_of_other_values(name: str, count: int, cfg: RunConfig, said: list[str], tally: Tally) -> None:
    """With a digest that vouches for it, where there is one."""
    file = FILES[name](cfg)
    value, wrong = json.loads(file.content), []
    sealed = value.pop("sha256", None)
    readers: dict[str, Callable[[], Any]] = {  # values of the right kind are taken: a DONE may say that it is finished
        "DONE": lambda: finished(cfg),
        "wandb_id": lambda: metrics_log._wandb_identity(cfg.folder, "run", fresh=False),
        "features/manifest.json": lambda: feature_store.read_manifest(cfg.folder / "features"),
    }
    for changed in of_values(value, random.Random(name), count):
        content = seal(changed).encode() if sealed and isinstance(changed, dict) else json_bytes(changed)
        replace(file.path, content)
        found = outcome(readers.get(name, file.read))
        if found.startswith("WRONG"):
            wrong.append(f"{changed!r}: {found}")
    tally("valid JSON of other values: taken, rebuilt, or refused in one line", count - len(wrong), count)
    assert not wrong, "\n".join(wrong[:9])


def test_what_is_rebuilt_says_so_once(cfg: RunConfig, said: list[str]) -> None:
    for name, expected in (
        ("config.yaml", "config.yaml.*damaged, and written anew"),
        ("owner.json", "owner.json: damaged, so nobody knows whose the folder is; waiting"),
        ("DONE", "DONE: damaged .*; the run goes on"),
        ("metrics.jsonl", "metrics.jsonl: 1 damaged line left out"),
        ("wandb_id", "wandb_id: damaged .*; wandb shows a new run"),
    ):
        file = FILES[name](cfg)
        said.clear()
        replace(file.path, b"\0\xff[")
        file.read()
        assert len(said) == 1 and re.search(expected, said[0]), (name, said)
        said.clear()
    records = (cfg.folder / METRICS_NAME).read_text()
    with MetricsLogger(cfg.folder, resumed_step=9):
        pass
    assert said == [] and (cfg.folder / METRICS_NAME).read_text() == records


def test_zeros_of_a_power_cut_cost_the_lines_they_are_in(cfg: RunConfig, said: list[str]) -> None:
    file = metrics_file(cfg)
    lines = file.content.splitlines(keepends=True)
    replace(file.path, b"".join(lines[:3]) + bytes(4096) + b"".join(lines[3:5]) + lines[5][:9] + bytes(100))
    assert [record["step"] for record in read_metrics(file.path)[0]] == [1, 2, 3, 4, 5]
    with MetricsLogger(cfg.folder, resumed_step=5):
        pass
    assert file.path.read_bytes() == b"".join(lines[:5]) and "1 damaged line left out" in said[0]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_something_else_in_the_place_of_a_file_is_named(
    kind: str, cfg: RunConfig, said: list[str], tally: Tally
) -> None:
    """Before anything else is done, with what to do; by every reader too, for those who call them alone."""
    wrong = []
    for name in run_lock.FILES:
        path = cfg.folder / name
        path.unlink(missing_ok=True)
        IN_PLACE[kind](path)
        found = outcome(lambda: check_places(cfg.folder))
        if str(path) not in found or "move it away" not in found:
            wrong.append(f"{name}: {found}")
        if name in (OWNER, run_lock.LOCK) and kind != "a device":
            found = outcome(lambda: RunLock(cfg.folder, beat_s=0.01, stale_s=0.01).release())
            wrong += [f"{name} alone: {found}"] if found.startswith("WRONG") else []
        path.rmdir() if kind == "a folder" else path.unlink()
    for name, make in FILES.items():
        file = make(cfg)
        file.path.unlink()
        IN_PLACE[kind](file.path)
        if name not in ("config.yaml", "DONE", "owner.json", "wandb_id") or kind != "a folder":
            said.clear()
            found = outcome(file.read)
            if name == "DONE" and "the run goes on" in " ".join(said):  # it does not: ``check_places`` refuses
                wrong.append(f"{name}: {said}")
            wrong += [f"{name}: {found}"] if found.startswith("WRONG") and "not noticed" not in found else []
        file.path.rmdir() if file.path.is_dir() else file.path.unlink(missing_ok=True)
    tally("another kind of thing in a file's place: named, refused or replaced", len(FILES), len(FILES))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [*run_lock.EXPORTED, "model-00002-of-00003.safetensors"])
def test_a_folder_in_the_place_of_an_exported_file_is_named_before_the_run(name: str, cfg: RunConfig) -> None:
    """Not after it, when the export is renamed over it."""
    path = cfg.folder / "exported" / name
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: a folder, must be a file; move it away"):
        check_places(cfg.folder)
    path.rmdir()
    path.touch()
    check_places(cfg.folder)


@pytest.mark.parametrize("name", ["checkpoints", "exported", "samples"])
def test_what_a_run_writes_into_is_tried_before_it(name: str, cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cfg.folder / name
    place.mkdir(parents=True, exist_ok=True)
    assert check_writable(cfg) == cfg.folder and os.listdir(place) == []
    real = tempfile.mkdtemp

    def refused(*arguments: Any, dir: Any, **options: Any) -> str:
        if Path(dir).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return real(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(UserError, match=re.escape(f": {place} cannot be written (Permission denied)")):
        check_writable(cfg)


def test_a_link_to_nothing_is_no_place_for_a_run(cfg: RunConfig, tmp_path: Path) -> None:
    """A disk that is not there: what is made in its stead would be a run from the beginning."""
    away = replace_field(cfg, output=str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    away.folder.symlink_to(tmp_path / "unmounted" / "run")
    with pytest.raises(UserError, match=f"{away.folder} is a link to nothing, and should be a folder; choose another"):
        check_writable(away)
    away.folder.unlink()
    assert check_writable(away) == tmp_path / "links"


def test_a_file_in_the_place_of_a_folder_is_named(cfg: RunConfig) -> None:
    check_places(cfg.folder)
    for name in run_lock.FOLDERS:
        (cfg.folder / name).write_text("x")
        with pytest.raises(UserError, match=rf"{cfg.folder / name}: a file, must be a folder; move it away"):
            check_places(cfg.folder)
        (cfg.folder / name).unlink()


def test_an_owner_that_lives_writes_its_name_again(cfg: RunConfig, said: list[str]) -> None:
    """Where locks do not reach, a damaged name must not cost a live run its folder."""

    def no_locks(file: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    lost: list[str] = []
    lock = RunLock(cfg.folder, beat_s=0.05, lock=no_locks, lost=lost.append)
    replace(cfg.folder / OWNER, b"{")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunLock(cfg.folder, beat_s=0.05, stale_s=20, lock=no_locks)
    assert lost == []
    lock.release()


# kind -> what every small file of a run becomes
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "cut short": lambda content: content[: len(content) // 2],
    "not text": lambda content: b"\xff\xfe\0" + content,
    "brackets": lambda content: b"[" * BRACKETS,
    "another kind": lambda content: b"[1, 2]\n",
}


@pytest.mark.parametrize(
    "way", [way if way in ("zeros", "brackets") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_a_run_goes_on_whatever_became_of_its_small_files(way: str, config: Path, tmp_path: Path, tally: Tally) -> None:
    """All of them at once; its checkpoints are good."""
    run = tmp_path / "runs/run"
    first = ["train.steps=2", "optim.warmup_steps=0"]
    assert run_distributed(run_with, 1, config, first, timeout=100, init=False)[0].end == "finished"
    (run / DONE).write_text("x")
    (run / OWNER).write_text("x")
    for name in (SAVED_NAME, METRICS_NAME, DONE, OWNER):
        replace(run / name, WAYS[way]((run / name).read_bytes()))
    again = run_distributed(run_quick, 1, config, ["train.steps=4", "optim.warmup_steps=0"], timeout=100, init=False)[0]
    assert again.end == "finished" and [step for step, _ in again.judged] == [2, 3]
    assert load_config(RunConfig, run / SAVED_NAME).train.steps == 4
    assert [record["step"] for record in read_metrics(run / METRICS_NAME)[0]][-2:] == [3, 4]
    tally("every small file of a run damaged: the run goes on", 1, 1)


def run_quick(config: Path, overrides: list[str]) -> Any:
    """Without the patience for an owner on another machine."""
    run_lock.RunLock.__init__.__kwdefaults__["stale_s"] = 0.5
    return run_with(config, overrides)
