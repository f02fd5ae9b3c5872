"""Damaged clips, stills and archives: frames or one line, in time, and nothing printed.

Each file is read in a process of its own kind, as training does, so that a crash inside a library would be seen and
counted. A file that was found to escape is found again by its kind, number and seed: ``path_of(Case(...))``.
"""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Tally
from tests.faults.media_fuzz import BASES, PATIENCE_S, Case, Outcome, attempt, path_of, work, write_bases

SEED = 10


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder)
    return folder


class Reader:
    """A process at work, and the case it has."""

    def __init__(self, bases: Path, scratch: Path) -> None:
        scratch.mkdir(exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, bases, scratch), daemon=True)
        self.process.start()
        theirs.close()
        self.case: Case | None = None
        self.since = time.monotonic()

    def give(self, case: Case | None) -> None:
        self.case, self.since = case, time.monotonic()
        self.connection.send(case)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def outcomes(cases: list[Case], bases: Path, scratch: Path, processes: int) -> Iterator[tuple[Case, Outcome]]:
    """Read all; a process that dies or hangs is an escape of its case, and replaced."""
    left = iter(cases)
    readers = [Reader(bases, scratch / str(i)) for i in range(processes)]
    for reader in readers:
        reader.give(next(left, None))
    try:
        while any(reader.case for reader in readers):
            connections: list[Any] = [reader.connection for reader in readers if reader.case]
            ready: list[Connection | Any] = wait(connections, timeout=1.0)
            for i, reader in enumerate(readers):
                if reader.case is None:
                    continue
                outcome = _answer(reader, reader.connection in ready)
                if outcome is None:
                    continue
                yield reader.case, outcome
                if outcome.escape.startswith("process"):
                    reader.end()
                    reader = readers[i] = Reader(bases, scratch / str(i))
                reader.give(next(left, None))
    finally:
        for reader in readers:
            reader.end()


def _answer(reader: Reader, ready: bool) -> Outcome | None:
    spent = time.monotonic() - reader.since
    if ready:
        try:
            return reader.connection.recv()
        except (EOFError, OSError):
            reader.process.join()
            return Outcome(False, spent, f"process died: exit code {reader.process.exitcode}")
    return Outcome(False, spent, f"process hung for {spent:.0f} s") if spent > PATIENCE_S else None


def fuzz(count: int, bases: Path, scratch: Path, tally: Tally) -> None:
    """``count`` cases of every kind."""
    cases = [Case(kind, number, SEED) for number in range(count) for kind in BASES]
    read, longest, escapes = Counter[str](), 0.0, []
    for case, outcome in outcomes(cases, bases, scratch, min(4, os.cpu_count() or 1)):
        read[case.kind] += outcome.frames
        longest = max(longest, outcome.seconds)
        if outcome.escape:
            escapes.append((case, outcome.escape))
    printed = b"".join(path.read_bytes() for path in scratch.glob("*/output"))
    print(f"{len(cases)} damaged files of {len(BASES)} kinds: {sum(read.values())} gave frames, the others one line;")
    print(f"{len(escapes)} escapes, longest {longest:.1f} s, {len(printed)} bytes printed by libraries")
    tally("damaged clips, stills, archives: frames or one line", len(cases) - len(escapes), len(cases))
    assert not escapes, escapes[:20]
    assert not printed, printed[:2000]
    assert sum(read.values()) > len(cases) // 20  # the damage is not so large that nothing is parsed


def test_undamaged_files_are_read(bases: Path, tmp_path: Path) -> None:
    """Or the fuzz would try nothing."""
    refused = {}
    for kind, (suffix, _) in BASES.items():
        path = str(bases / f"{kind}{suffix}")
        path += {".tar": "#a.mp4", ".zip": "#a.mp4", ".bin": f"#a.mp4@0+{os.path.getsize(path)}"}.get(suffix, "")
        outcome = attempt(path)
        assert not outcome.escape, (kind, outcome)
        if not outcome.frames:
            refused[kind] = outcome
    assert set(refused) == {"zip deflated"}


def test_damage_is_the_same_each_time(bases: Path, tmp_path: Path) -> None:
    case = Case("mp4 h264", 3, SEED)
    first = Path(path_of(case, bases, tmp_path)).read_bytes()
    assert first == Path(path_of(case, bases, tmp_path)).read_bytes() != (bases / "mp4 h264.mp4").read_bytes()


def test_damaged_media(bases: Path, tmp_path: Path, tally: Tally) -> None:
    fuzz(8, bases, tmp_path, tally)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damaged_media_for_long(bases: Path, tmp_path: Path, tally: Tally) -> None:
    fuzz(int(os.environ.get("OPENSORA_FUZZ", 400)), bases, tmp_path, tally)
