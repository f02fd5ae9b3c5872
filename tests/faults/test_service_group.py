"""What breaks in a worker group, and what becomes of the jobs: every one has exactly one result, and the group lives on
where it can."""

import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.serve.jobs import DISK_FULL, OUT_OF_MEMORY, SAMPLING_FAILED, WORKER_LOST
from tests.dist.harness import DistributedFailure, run_distributed
from tests.faults.conftest import Tally
from tests.serving import Hook, add, asked, configured, jobs_in, named_group, queue_of, work

pytestmark = pytest.mark.timeout(900)
HOG, BAD = "a hog", "a bad prompt"


def rank() -> int:
    return int(os.environ["RANK"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """``act`` is called with the arguments of ``owner.name`` before it is."""
    real = getattr(owner, name)

    def acting(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, acting)


def kills(point: str, victim: int) -> None:
    """Hook: process ``victim`` is killed at a point of the first job."""
    from opensora.serve.worker import loop, sampler
    from opensora.serve.worker.desk import Desk

    named_group("group-0")()
    if rank() != victim:
        return
    if point == "claim" and victim == 0:
        before(Desk, "_gather", lambda *args: die())
    elif point == "claim":
        before(loop.Loop, "take", lambda *args: die())
    elif point == "step":
        steps = [0]

        def count(self: Any, *args: Any) -> None:
            steps[0] += 1
            if steps[0] == 4:  # of the first job, which has six, and a border before them
                die()

        before(sampler.Paced, "__call__", count)
    elif point == "decode":
        before(sampler, "pixels_of", lambda *args: die())
    elif point == "row":
        before(Desk, "finish", lambda *args, **kwargs: die())


KILLS = [("claim", 0), ("claim", 1), ("step", 0), ("step", 1), ("decode", 0), ("decode", 1), ("row", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "victim"), KILLS)
def test_a_process_is_killed(point: str, victim: int, tmp_path: Path, tally: Tally) -> None:
    """The next group of the supervisor takes the job over at once, and makes what one that lives would have made."""
    config = configured(tmp_path)
    add(config, asked(1, num_steps=6), asked(2))
    with pytest.raises(DistributedFailure):
        run_distributed(work, 2, config, partial(kills, point, victim), init=False)
    first = jobs_in(config)
    assert first[1].attempt == 1 and first[2].state == "queued"
    assert run_distributed(work, 2, config, None, "group-0", init=False) == [0, 0]
    after, (_, store) = jobs_in(config), queue_of(config)
    done = all(job.state == "completed" for job in after.values())
    whole = sorted(path.name for path in store.videos.glob("*.mp4")) == [job.result["file"] for job in after.values()]
    assert done and whole
    assert after[1].attempt == (1 if point == "row" else 2) and after[2].attempt == 1
    tally("service: SIGKILL, each job exactly one result", int(done and whole), 1)


def raises(prompts: dict[str, BaseException], ranks: tuple[int, ...] = (0, 1), late: bool = False) -> None:
    """Hook: in the middle of a forward, or after all steps, an error for jobs of these prompts."""
    from opensora.serve.worker import sampler

    now: list[BaseException | None] = [None]
    real = sampler.denoised

    def denoised(store: Any, model: Any, jobs: Any, option: Any, kind: str, on_step: Any) -> Any:
        now[0] = prompts.get(jobs[0].prompt) if rank() in ranks else None
        if late:
            made = real(store, model, jobs, option, kind, on_step)
            if now[0] is not None:
                raise now[0]
            return made
        handle = model.parts.model.double_blocks[1].register_forward_hook(lambda *args: fail())
        try:
            return real(store, model, jobs, option, kind, on_step)
        finally:
            handle.remove()

    def fail() -> None:
        if now[0] is not None:
            raise now[0]

    sampler.denoised = denoised


ERROR = ValueError("a mistake\nin two lines")


@pytest.mark.parametrize(("ranks", "late"), [((0, 1), False), ((1,), True), ((0,), True)])
def test_a_bad_job_leaves_the_group_alive(ranks: tuple[int, ...], late: bool, tmp_path: Path, tally: Tally) -> None:
    config = configured(tmp_path)
    add(config, asked(1), asked(2, prompt=BAD), asked(3))
    hook = partial(raises, {BAD: ERROR}, ranks, late)
    assert run_distributed(work, 2, config, hook, init=False) == [0, 0]
    jobs, (_, store) = jobs_in(config), queue_of(config)
    assert [job.state for job in jobs.values()] == ["completed", "failed", "completed"]
    assert jobs[2].error is not None and (jobs[2].error.code, jobs[2].error.message) == (SAMPLING_FAILED, "a mistake")
    alone = tmp_path / "alone"
    alone.mkdir()
    truth = configured(alone)
    add(truth, asked(3))
    assert run_distributed(work, 2, truth, init=False) == [0, 0]
    files = [store.video(jobs[3].id).read_bytes(), queue_of(truth)[1].video(jobs[3].id).read_bytes()]
    assert files[0] == files[1]  # nothing of the error is left in the model
    tally("service: an error in a job, the group lives on", 1, 1)


def test_a_request_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    config = configured(tmp_path)
    names = (f"video_{2:032x}-0.png",)
    add(
        config,
        asked(1, num_steps=0),
        asked(2, references=names, cond_type="i2v_head"),
        asked(3, lora="other"),
        asked(4),
    )
    assert run_distributed(work, 1, config, init=False) == [0]
    jobs = jobs_in(config)
    messages = [job.error.message if job.error else "" for job in jobs.values()]
    assert "num_steps=0: must be" in messages[0] and "lora=other: must be one of none" in messages[2]
    assert "no such file" in messages[1] and str(tmp_path) not in messages[1]
    assert jobs[4].state == "completed"


def test_full_memory(tmp_path: Path, tally: Tally) -> None:
    """One that does not fit is told the forecast; the second in a row ends the group, which is started again."""
    config = configured(tmp_path)
    add(config, asked(1, prompt=HOG), asked(2), asked(3, prompt=HOG), asked(4, prompt=HOG), asked(5))
    hook = partial(raises, {HOG: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")})
    assert run_distributed(work, 2, config, hook, init=False) == [87, 87]
    jobs = jobs_in(config)
    assert [job.state for job in jobs.values()] == ["failed", "completed", "failed", "failed", "queued"]
    error = jobs[1].error
    assert error is not None and error.code == OUT_OF_MEMORY and "5 frames of 32x24" in error.message
    assert "forecast 0." in error.message and "GiB a process" in error.message
    tally("service: out of memory, told with the forecast", 3, 3)


def test_full_disk(tmp_path: Path, tally: Tally) -> None:
    config = configured(tmp_path)
    add(config, asked(1), asked(2))
    assert run_distributed(work, 1, config, disk_is_full, init=False) == [0]
    jobs, (_, store) = jobs_in(config), queue_of(config)
    assert jobs[1].error is not None and jobs[1].error.code == DISK_FULL and str(tmp_path) not in jobs[1].error.message
    assert jobs[2].state == "completed"
    assert {path.stem for path in store.videos.iterdir()} == {jobs[2].id}
    tally("service: full disk, the group lives on", 1, 1)


def disk_is_full() -> None:
    """Hook: for the first clip."""
    from opensora.serve.worker import finish

    real, calls = finish.write_clip, [0]

    def write_clip(path: Path, *args: Any) -> None:
        calls[0] += 1
        path.write_bytes(b"half a file")
        if calls[0] == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *args)

    finish.write_clip = write_clip


def cancels(config: Path, at: int, numbers: tuple[int, ...]) -> None:
    """Hook: rank 0 sees these jobs cancelled at a border."""
    from opensora.serve.worker import desk

    desk.LOOK_S = 0.0

    def cancel(self: Any, jobs: Any, done: int, total: int) -> None:
        if done == at and jobs[0].id == asked(numbers[0]).id:
            for number in numbers:
                self.queue.request_cancel(asked(number).id, "", time.time())

    before(desk.Desk, "step", cancel)


def counted(config: Path, hook: Hook) -> tuple[int, int]:
    """(exit code, steps of the job with the most steps) of this process."""
    from opensora.serve.worker import sampler

    most = [0]

    def count(self: Any, done: int, total: int) -> None:
        most[0] = max(most[0], done if total == 50 else 0)

    before(sampler.Paced, "__call__", count)
    return work(config, hook), most[0]


def test_cancelled_while_it_runs(tmp_path: Path, tally: Tally) -> None:
    """All processes leave at the same border, and the next job is the first one's to the bit."""
    config = configured(tmp_path)
    add(config, asked(1, num_steps=50), asked(2))
    found = run_distributed(counted, 2, config, partial(cancels, config, 3, (1,)), init=False)
    assert found == [(0, 3), (0, 3)]
    jobs = jobs_in(config)
    assert jobs[1].state == "cancelled" and jobs[1].error is not None and jobs[1].error.code == "cancelled"
    assert jobs[2].state == "completed" and not queue_of(config)[1].video(jobs[1].id).exists()
    tally("service: cancel frees all processes within a step", 1, 1)


def test_one_of_a_batch_is_cancelled(tmp_path: Path) -> None:
    """The others are finished."""
    config = configured(tmp_path, batch_size=3, exact=False)
    add(config, *(asked(number, num_steps=4) for number in (1, 2, 3)))
    assert run_distributed(work, 2, config, partial(cancels, config, 2, (1,)), init=False) == [0, 0]
    jobs = jobs_in(config)
    assert [job.state for job in jobs.values()] == ["cancelled", "completed", "completed"]
    assert [jobs[number].batch for number in (2, 3)] == [3, 3]


def test_a_batch_over_data_parallel_groups(tmp_path: Path) -> None:
    """Three jobs on two groups of one process each: every one has its own clip."""
    config = configured(tmp_path, batch_size=3, exact=False, mesh="{shard: 2}")
    add(config, *(asked(number) for number in (1, 2, 3)))
    assert run_distributed(work, 2, config, init=False) == [0, 0]
    apart = tmp_path / "apart"
    apart.mkdir()
    other = configured(apart, mesh="{shard: 2}")
    add(other, *(asked(number) for number in (1, 2, 3)))
    assert run_distributed(work, 2, other, init=False) == [0, 0]
    for number, job in jobs_in(config).items():
        assert job.state == "completed" and job.batch == 3
        files = [queue_of(path)[1].video(job.id).read_bytes() for path in (config, other)]
        assert files[0] == files[1], number


def stops(config: Path, at: int) -> None:
    """Hook: the group is asked to stop at a step."""
    from opensora.serve.worker import desk

    def stop(self: Any, jobs: Any, done: int, total: int) -> None:
        if done == at:
            self._stopped = lambda: 0.0  # long ago

    before(desk.Desk, "step", stop)


def test_asked_to_stop_while_it_samples(tmp_path: Path, tally: Tally) -> None:
    config = configured(tmp_path, grace_s=0)
    add(config, asked(1, num_steps=50), asked(2))
    assert run_distributed(work, 2, config, partial(stops, config, 3), init=False) == [0, 0]
    assert [job.state for job in jobs_in(config).values()] == ["queued", "queued"]
    assert run_distributed(work, 2, config, init=False) == [0, 0]
    assert [job.state for job in jobs_in(config).values()] == ["completed", "completed"]
    tally("service: a stop puts the running job back", 1, 1)


def always_dies() -> None:
    kills("decode", 1)


@pytest.mark.slow
def test_a_job_that_kills_every_group_is_given_up(tmp_path: Path) -> None:
    config = configured(tmp_path)
    add(config, asked(1))
    for number in range(3):
        with pytest.raises(DistributedFailure):
            run_distributed(work, 2, config, partial(dies_as, f"group-{number}"), init=False)
    assert run_distributed(work, 2, config, None, "group-2", init=False) == [0, 0]
    job = jobs_in(config)[1]
    assert job.state == "failed" and job.error is not None and job.error.code == WORKER_LOST and job.attempt == 3


def dies_as(name: str) -> None:
    always_dies()
    named_group(name)()


def two_groups(config: Path) -> int:
    """Each process is a group of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return work(config)


@pytest.mark.slow
def test_two_groups_on_one_queue(tmp_path: Path, tally: Tally) -> None:
    config = configured(tmp_path)
    add(config, *(asked(number, num_steps=1, num_frames=1) for number in range(40)))
    assert run_distributed(two_groups, 2, config, init=False, timeout=240) == [0, 0]
    jobs = jobs_in(config)
    ends = [(job.state, job.attempt) for job in jobs.values()]
    assert ends == [("completed", 1)] * 40 and len({job.worker for job in jobs.values()}) == 2
    tally("service: two groups, each job exactly one result", 40, 40)
