"""The queue of the service under SIGKILL, power cuts and damaged bytes. OPENSORA_QUEUE_JOBS, _KILLS and
_DAMAGES say how many."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opensora.serve.config import ServeConfig
from opensora.serve.jobs import JobQueue
from opensora.serve.queues import open_queue
from opensora.serve.store import Store
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.faults.conftest import Tally
from tests.patience import patience
from tests.queue_place import MANY, QueuePlace, added, claimed, new_job

JOBS = int(os.environ.get("OPENSORA_QUEUE_JOBS", "60"))
KILLS = int(os.environ.get("OPENSORA_QUEUE_KILLS", "6"))
DAMAGES = int(os.environ.get("OPENSORA_QUEUE_DAMAGES", "40"))
pytestmark = pytest.mark.timeout(900)
LIMIT_S = 100.0  # of a machine with nothing else to do


class Victim:
    """A process of tests/queue_process.py, and what it said, also before it was killed."""

    def __init__(self, what: str, place: QueuePlace, name: str) -> None:
        self._file = place.out / f"{name}.said"
        self._command = [sys.executable, "-m", "tests.queue_process", what, str(place.out), place.url, name]
        self.start()

    def start(self) -> None:
        with open(self._file, "ab") as said:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=said)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def lines(self) -> list[list[str]]:
        """Whole ones: it is killed within one too."""
        return [line.split() for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.timeout(300)
def test_every_job_is_done_once(make_queue: QueuePlace, tally: Tally) -> None:
    """Two workers that are killed at random instants: no job is lost, and none has two results."""
    draw, queue = random.Random(7), make_queue()
    jobs = [added(queue, float(index), owner=str(index % 3)) for index in range(JOBS)]
    victims = [Victim("work", make_queue, name) for name in ("one", "two")]
    kills, begun = 0, time.monotonic()
    while any(victim.process.poll() is None for victim in victims):
        assert time.monotonic() - begun < patience(2 * LIMIT_S)
        time.sleep(draw.uniform(0.0, 1.2))
        if kills < KILLS:
            victim = draw.choice(victims)
            victim.kill()
            victim.start()
            kills += 1
    done = [line for victim in victims for line in victim.lines()]
    assert max(Counter(id for id, _, _ in done).values()) == 1, "none is finished twice"
    told = {id: {"worker": worker, "attempt": int(attempt)} for id, worker, attempt in done}
    found = {job.id: seen for job in jobs if (seen := queue.get(job.id, None))}
    right = [id for id, seen in found.items() if seen.state == "completed" and seen.result == told.get(id, seen.result)]
    tally(f"jobs done once by two workers, {kills} SIGKILLs ({make_queue.name})", len(right), JOBS)
    assert len(right) == JOBS and queue.counts() == {("demo", "completed"): JOBS}


@pytest.mark.timeout(300)
def test_what_was_promised_is_there_after_a_kill(make_queue: QueuePlace, tally: Tally) -> None:
    """SIGKILL within a change: the next one reads a sound database that has every job that was answered."""
    draw, promised, kept = random.Random(3), 0, 0
    make_queue().close()
    for index in range(KILLS):
        victim, begun = Victim("add", make_queue, f"adder{index}"), time.monotonic()
        while not victim.lines():
            assert victim.process.poll() is None and time.monotonic() - begun < patience(LIMIT_S)
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.3))
        victim.kill()
        queue = make_queue()
        ids = [id for (id,) in victim.lines()]
        promised, kept = promised + len(ids), kept + sum(queue.get(id, None) is not None for id in ids)
        jobs, _ = queue.page(f"adder{index}", limit=MANY, after=None, order="asc")
        assert len(ids) <= len(jobs) <= len(ids) + 1, "at most the one that it was about to tell"
        queue.close()
    tally(f"answered jobs after SIGKILL ({make_queue.name})", kept, promised)
    assert kept == promised > 0
    assert not list(make_queue.out.glob("*.damaged*"))


def sqlite_queue(out: Path) -> JobQueue:
    return open_queue(ServeConfig(), Store(out))


def test_the_power_goes(tmp_path: Path, tally: Tally) -> None:
    """The disk has the log up to any byte: all that was answered until then is there, and nothing in part."""
    queue = sqlite_queue(tmp_path / "live")
    log = tmp_path / "live" / "queue.sqlite-wal"
    ids: list[str] = []
    ends: list[int] = []
    for index in range(12):
        ids.append(added(queue, float(index)).id)
        ends.append(log.stat().st_size)
    base, whole = (tmp_path / "live" / "queue.sqlite").read_bytes(), log.read_bytes()
    draw, right = random.Random(5), 0
    cuts = [*ends, *(draw.randrange(len(whole)) for _ in range(DAMAGES))]
    for index, cut in enumerate(cuts):
        out = tmp_path / f"cut{index}"
        out.mkdir()
        (out / "queue.sqlite").write_bytes(base)
        (out / "queue.sqlite-wal").write_bytes(whole[:cut])
        after = sqlite_queue(out)
        jobs, _ = after.page("", limit=100, after=None, order="asc")
        after.close()
        answered = sum(end <= cut for end in ends)
        right += [job.id for job in jobs] == ids[:answered] and not list(out.glob("*.damaged*"))
    queue.close()
    tally("power cuts after which all answered jobs are there", right, len(cuts))
    assert right == len(cuts)


def full(out: Path) -> dict[str, Any]:
    """A queue of jobs in all states, closed; by id as they are."""
    queue = sqlite_queue(out)
    jobs = [added(queue, float(index), owner=str(index % 3), prompt="red " * 50) for index in range(40)]
    for _ in range(25):
        assert queue.finish(claimed(queue, 50.0), 60.0, "completed", result={"file": "x.mp4"})
    claimed(queue, 70.0)
    found = {job.id: queue.get(job.id, None) for job in jobs}
    queue.close()
    return found


def test_damaged_bytes(tmp_path: Path, tally: Tally) -> None:
    """Any damage: the queue opens, put aside with a line if it shows, or is refused in one line; what is listed can be
    read, and nothing is invented. Then it works."""
    before, draw = full(tmp_path / "whole"), random.Random(11)
    right, aside, kept = 0, 0, 0
    for index in range(DAMAGES):
        out = tmp_path / f"damaged{index}"
        shutil.copytree(tmp_path / "whole", out)
        damage(out / "queue.sqlite", draw)
        try:
            queue = sqlite_queue(out)
        except UserError as error:
            assert "\n" not in str(error) and "queue.sqlite" in str(error)
            right += 1
            continue
        jobs = [job for owner in "012" for job in queue.page(owner, limit=MANY, after=None, order="asc")[0]]
        assert {job.id for job in jobs} <= before.keys()
        moved = list(out.glob("queue.sqlite.damaged-*"))
        assert moved or len(jobs) == len(before), "less is there, and nothing was said"
        aside, kept = aside + bool(moved), kept + (len(jobs) if moved else 0)
        new = added(queue, 60.0, priority=9)
        job = claimed(queue, 60.0)
        assert job.id == new.id and queue.finish(job, 61.0, "completed")
        queue.close()
        again = sqlite_queue(out)
        assert len(list(out.glob("queue.sqlite.damaged-*"))) == len(moved), "mended once"
        assert sum(again.counts().values()) == len(jobs) + 1
        again.close()
        right += 1
    tally("damaged queues that open again or are refused in a line", right, DAMAGES)
    tally("jobs that could be read of those put aside", kept, aside * len(before))
    assert right == DAMAGES and aside > DAMAGES / 4 and kept > aside * len(before) / 5


def damage(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    how = draw.choice(("bit", "block", "cut", "zeros"))
    if how == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "block":
        data[at : at + 300] = draw.randbytes(len(data[at : at + 300]))
    elif how == "zeros":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    else:
        del data[at:]
    path.write_bytes(data)


@pytest.mark.parametrize("spec", ["'x'", "CAST(x'fffe' AS TEXT)"])
def test_what_is_said_of_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str], spec: str) -> None:
    before = full(tmp_path)
    path = tmp_path / "queue.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE jobs SET spec = {spec} WHERE rowid = 3")
    connection.commit()
    connection.close()
    damaged = path.read_bytes()
    queue = sqlite_queue(tmp_path)
    found = list(tmp_path.glob("queue.sqlite.damaged-*"))
    assert len(found) == 1
    aside = found[0]
    assert aside.read_bytes() == damaged
    assert sum(queue.counts().values()) == len(before) - 1
    assert all(seen == before[seen.id] for seen in queue.oldest_finished(MANY))
    queue.close()
    said = [line for line in capfd.readouterr().err.splitlines() if "queue.sqlite: damaged" in line]
    assert len(said) == 1 and f"put aside as {aside.name}; of its jobs 39 could be read" in said[0]


def test_nothing_is_mended_under_another_process(tmp_path: Path) -> None:
    """Who has it open has looked; the file stays where it is."""
    before = full(tmp_path)
    first = sqlite_queue(tmp_path)
    connection = sqlite3.connect(tmp_path / "queue.sqlite")
    connection.execute("UPDATE jobs SET spec = 'x' WHERE rowid = 3")
    connection.commit()
    connection.close()
    second = sqlite_queue(tmp_path)
    assert not list(tmp_path.glob("*.damaged*"))
    assert first.counts() == second.counts() and sum(first.counts().values()) == len(before)
    second.close()
    first.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"no database at all " * 300])
def test_files_that_are_no_queue(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "queue.sqlite").write_bytes(content)
    queue = sqlite_queue(tmp_path)
    assert queue.add(new_job(), 1.0, most=1, most_of_owner=1).state == "queued"
    queue.close()
    assert [path.read_bytes() for path in tmp_path.glob("queue.sqlite.damaged-*")] == ([content] if content else [])


def test_a_database_of_another_program(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "queue.sqlite")
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    before = (tmp_path / "queue.sqlite").read_bytes()
    with pytest.raises(UserError, match="is a database of another program; give another out="):
        sqlite_queue(tmp_path)
    assert (tmp_path / "queue.sqlite").read_bytes() == before


@pytest.mark.parametrize("what", ["a folder", "no folder"])
def test_a_place_that_cannot_be_opened(tmp_path: Path, what: str) -> None:
    store = Store(tmp_path / "out")
    if what == "a folder":
        store.queue_file.mkdir()
    else:
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"queue\.sqlite: cannot be opened: .*out=FOLDER must be one to write in"):
        open_queue(ServeConfig(), store)
