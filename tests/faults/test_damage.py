"""Checkpoints whose bytes are not those that were written: every one is noticed, said, and an older one taken."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from acceleration.checkpoint import CheckpointManager, atomic_dir
from acceleration.checkpoint.atomic_dir import MANIFEST
from tests.dist.harness import run_distributed
from tests.faults.conftest import Tally
from tests.faults.saving import state

OLD, NEW = "step-00000001", "step-00000002"
SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")
BLOCK = 64


def save_two(folder: Path) -> None:
    """Steps 1 and 2, of two processes."""
    manager = CheckpointManager(folder, keep=0)
    for step in (1, 2):
        manager.save(step, state(step, dist.get_rank(), 2), {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(save_two, 2, folder)
    return folder


def flips(content: bytes, rng: random.Random, *, every_bit: bool) -> Iterator[bytes]:
    """One bit is another, in every byte."""
    for at in range(len(content)):
        for bit in range(8) if every_bit else [rng.randrange(8)]:
            yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def cuts(content: bytes) -> Iterator[bytes]:
    """The file ends anywhere, or goes on beyond its end."""
    yield from (content[:at] for at in range(len(content)))
    yield from (content + more for more in (b"\0", b" ", b"\n", content))


def zeros(content: bytes) -> Iterator[bytes]:
    """A block was not written, or nothing from a point on: what a power cut leaves."""
    for at in range(0, len(content), BLOCK):
        yield content[:at] + bytes(len(content[at : at + BLOCK])) + content[at + BLOCK :]
        yield content[:at] + bytes(len(content) - at)


def altered_bytes(every_bit: bool) -> dict[str, Callable[[bytes], Iterator[bytes]]]:
    """Kinds of damage to a file's content."""
    rng = random.Random(0)
    return {
        "a flipped bit": lambda content: flips(content, rng, every_bit=every_bit),
        "cut short, or longer": cuts,
        "zeros": zeros,
    }


def swap(new: Path, old: Path) -> None:
    os.rename(new / SHARDS[0], new / "aside")
    os.rename(new / SHARDS[1], new / SHARDS[0])
    os.rename(new / "aside", new / SHARDS[1])


def replace_by(make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    """Something else is where a shard was."""

    def damage(new: Path, old: Path) -> None:
        (new / SHARDS[1]).unlink()
        make(new / SHARDS[1])

    return damage


# name -> what is done to step 2, beside which step 1 is
MISPLACED: dict[str, Callable[[Path, Path], object]] = {
    "shards swapped": swap,
    "one shard twice": lambda new, old: shutil.copy(new / SHARDS[0], new / SHARDS[1]),
    "a shard of another step": lambda new, old: shutil.copy(old / SHARDS[0], new / SHARDS[0]),
    "the manifest of another step": lambda new, old: shutil.copy(old / MANIFEST, new / MANIFEST),
    "all shards of another step": lambda new, old: [shutil.copy(old / name, new / name) for name in SHARDS],
    "no manifest": lambda new, old: (new / MANIFEST).unlink(),
    "no shard": lambda new, old: (new / SHARDS[0]).unlink(),
    "nothing at all": lambda new, old: [path.unlink() for path in new.iterdir()],
    "a folder for a shard": replace_by(Path.mkdir),
    "a pipe for a shard": replace_by(os.mkfifo),
    "a link in a circle for a shard": replace_by(lambda path: path.symlink_to(path)),
    "a link to nowhere for a shard": replace_by(lambda path: path.symlink_to("nowhere")),
    "a device for a shard": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "a manifest that is a list": lambda new, old: (new / MANIFEST).write_text("[]"),
    "a manifest of a million brackets": lambda new, old: (new / MANIFEST).write_text("[" * 10**6),
    "a manifest that is not text": lambda new, old: (new / MANIFEST).write_bytes(b"\xff\xfe{}"),
}


class Newest:
    """Asks for the newest good checkpoint, and whether step 2 was passed over with a word."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.manager = CheckpointManager(folder, keep=0, report=self.said.append)

    def passed_over(self) -> bool:
        self.said.clear()
        line = f"{self.folder / NEW} is damaged ("
        return self.manager.latest() == self.folder / OLD and len(self.said) == 1 and self.said[0].startswith(line)


def alter_bytes(folder: Path, every_bit: bool) -> dict[str, tuple[int, list[str]]]:
    """For each kind of damage how often it was done to a file of step 2, and where it was not noticed."""
    newest = Newest(folder)
    results: dict[str, tuple[int, list[str]]] = {}
    for kind, damage in altered_bytes(every_bit).items():
        done, missed = 0, []
        for path in sorted((folder / NEW).iterdir()):
            content = path.read_bytes()
            for altered in damage(content):
                if altered != content:
                    path.write_bytes(altered)
                    missed += [] if newest.passed_over() else [f"{path.name}, {done}: {newest.said}"]
                    done += 1
            path.write_bytes(content)
        results[kind] = done, missed
    assert not newest.passed_over() and newest.said == []
    return results


def misplace(folder: Path) -> list[str]:
    """Kinds of damage that were not noticed."""
    newest, missed, kept = Newest(folder), [], folder.with_name("kept")
    shutil.copytree(folder / NEW, kept)
    for kind, damage in MISPLACED.items():
        damage(folder / NEW, folder / OLD)
        missed += [] if newest.passed_over() else [f"{kind}: {newest.said}"]
        shutil.rmtree(folder / NEW)
        shutil.copytree(kept, folder / NEW)
    assert not newest.passed_over() and newest.said == []
    return missed


@pytest.mark.parametrize("every_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_altered_bytes_are_noticed(saved: Path, tmp_path: Path, every_bit: bool, tally: Tally) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    for kind, (done, missed) in run_distributed(alter_bytes, 1, folder, every_bit)[0].items():
        tally(f"damage noticed: {kind}", done - len(missed), done)
        assert not missed, missed
        assert done > 50


def test_misplaced_files_are_noticed(saved: Path, tmp_path: Path, tally: Tally) -> None:
    missed = run_distributed(misplace, 1, shutil.copytree(saved, tmp_path / "copy"))[0]
    tally(
        "damage noticed: files missing, swapped, stale, of another kind", len(MISPLACED) - len(missed), len(MISPLACED)
    )
    assert not missed, missed


def spoil_all(folder: Path) -> list[str]:
    """What is said when no checkpoint is good, for each file of the newest; the older one is spoiled before."""
    (folder / OLD / SHARDS[0]).write_bytes(b"")
    answers = []
    for path in sorted((folder / NEW).iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        try:
            answers.append(str(Newest(folder).manager.latest()))
        except ValueError as error:
            answers.append(str(error))
        path.write_bytes(content)
    return answers


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(saved: Path, tmp_path: Path, tally: Tally) -> None:
    answers = run_distributed(spoil_all, 1, shutil.copytree(saved, tmp_path / "copy"))[0]
    assert all("no checkpoint is complete; move the damaged step-* folders away" in answer for answer in answers)
    tally("every checkpoint damaged: refused, no fresh start", len(answers), len(answers))


def keep_two(folder: Path) -> tuple[list[str], list[str]]:
    """Five saves with ``keep=2`` among things that are not the run's, damage done meanwhile; (names left, said)."""
    said: list[str] = []
    manager = CheckpointManager(folder, keep=2, report=said.append)
    foreign = ("notes.txt", ".tmp-mine/draft", "step-00000009.zip", "step-best/weights", "steps/a", "other/b")
    for name in foreign:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "step-00000000").symlink_to(folder / "other")
    for step in (1, 2, 3):
        manager.save(step, state(step, 0, 1), {})
    (folder / "step-00000002/notes.txt").write_text("mine")
    shard = folder / "step-00000003" / SHARDS[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xee")
    manager = CheckpointManager(folder, keep=2, report=said.append)  # a new process: knows nothing of the files
    for step in (4, 5):
        manager.save(step, state(step, 0, 1), {})
        kept = sorted(path.name for path in folder.glob("step-0000000?") if not path.is_symlink())
        if step == 4:  # the damaged third does not count, so the second stays
            assert kept == ["step-00000002", "step-00000003", "step-00000004"]
            assert atomic_dir.read_manifest(folder / kept[0]) is not None
    assert all((folder / name).read_text() == "mine" for name in foreign)
    return sorted(str(path.relative_to(folder)) for path in folder.glob("step-0*/*")), said


def test_what_is_kept_are_checkpoints_that_verify_and_files_of_others(tmp_path: Path, tally: Tally) -> None:
    left, _ = run_distributed(keep_two, 1, tmp_path)[0]
    wanted = [f"step-0000000{step}/{name}" for step in (4, 5) for name in (MANIFEST, SHARDS[0])]
    assert left == ["step-00000000/b", "step-00000002/notes.txt", *wanted]
    tally("retention: damaged ones not counted, foreign files and links untouched", 1, 1)
