"""A job of the service, and what a queue of them does. Standard library only: the web process imports no torch.

    queued -> running -> completed | failed | cancelled;   running -> queued when its lease ends or its group stops

Every write of a worker names the worker and the attempt it claimed: one that lost its lease changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

State = Literal["queued", "running", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "completed", "failed", "cancelled")
FINISHED: tuple[State, ...] = ("completed", "failed", "cancelled")
Order = Literal["asc", "desc"]
LIVES_S = 15.0  # a worker says every second or so that it lives; one that was not heard of for so long is dead

# Codes of errors of jobs, as clients see them
CANCELLED, OUT_OF_MEMORY, WORKER_LOST, SAMPLING_FAILED, DISK_FULL = (
    "cancelled",
    "out_of_memory",
    "worker_lost",
    "sampling_failed",
    "disk_full",
)


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job did not end well."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What is asked, checked by the web process: it fits the model, and can run."""

    id: str  # "video_" and 32 hex digits: 128 random bits
    owner: str  # digest of the API key, "" where none are asked for; others do not see the job
    model: str
    prompt: str
    # sampling: {field of SamplingOption: value}, with seed, width, height, num_frames; neg, cond_type, lora: as asked
    request: Mapping[str, Any]
    references: tuple[str, ...] = ()  # names of files in the store, in order
    steps: int
    batch_key: str  # jobs with the same may be denoised together
    priority: int = 0  # higher ones first
    expires_at: float | None = None  # seconds since 1970, once finished; None: kept
    remixed_from: str | None = None
    idempotency: str | None = None  # the header's text; the same of one owner is the same job
    digest: str = ""  # of the request's body, for the check of that


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A job and where it stands."""

    state: State
    created_at: float  # seconds since 1970, all times
    started_at: float | None = None  # when step 1 of the last attempt began
    completed_at: float | None = None
    progress: int = 0  # percent; never falls within an attempt
    step: int = 0
    batch: int = 1  # jobs that are denoised together with it
    attempt: int = 0  # claims so far, those of jobs that were put back too: no two claims of a job have the same
    worker: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    error: JobError | None = None
    result: Mapping[str, Any] = field(default_factory=dict)  # file, frames, width, height, fps, bytes, seconds_used


class QueueFull(Exception):
    """As many jobs wait as may; the message says which limit."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SameKeyOtherRequest(Exception):
    """An idempotency key came with another request than before."""


class QueueUnavailable(Exception):
    """The database does not answer, or its disk is full: nothing was changed, or nobody knows; later it may do."""


class JobQueue(Protocol):
    """Jobs on disk. Times are passed in, so that tests need not wait; every call is one transaction.

    Every call may raise ``QueueUnavailable``. Threads of a process may share a queue; each process opens its own.
    """

    # of the web process
    def add(self, job: NewJob, now: float, *, most: int, most_of_owner: int) -> Job:
        """The job, durable when this returns; the one of before, with the same owner and idempotency key.

        Raises:
            QueueFull, SameKeyOtherRequest.
        """
        ...

    def get(self, id: str, owner: str | None) -> Job | None:
        """None: there is none, or it is another owner's; ``owner=None``: whoever owns it."""
        ...

    def page(self, owner: str, *, limit: int, after: str | None, order: Order) -> tuple[list[Job], bool]:
        """Jobs by (created_at, id), and whether there are more. ``after``: id of the last one of the page before.

        Raises:
            KeyError: no job of the owner is called ``after``.
        """
        ...

    def position(self, job: Job) -> int | None:
        """How many jobs will be claimed before it; None: it does not wait."""
        ...

    def request_cancel(self, id: str, owner: str, now: float) -> Job | None:
        """A queued job is cancelled when this returns, and one whose lease is over; a running one is asked to, and a
        finished one stays as it is. None: no such job."""
        ...

    def remove(self, id: str, owner: str | None) -> Job | None:
        """Forget a finished job. None: no such job, or not finished."""
        ...

    def expired(self, now: float) -> list[Job]:
        """Finished jobs whose time is over."""
        ...

    def oldest_finished(self, limit: int) -> list[Job]:
        """For a quota of bytes."""
        ...

    def counts(self) -> dict[tuple[str, State], int]:
        """Jobs by model and state."""
        ...

    # of workers
    def claim(self, worker: str, models: Sequence[str], now: float, *, lease_s: float, attempts: int) -> Job | None:
        """The next job: priority, then keys in turn, then age; or a running one whose lease is over.

        One that was claimed ``attempts`` times already is failed with ``worker_lost`` instead, and the next one taken.
        """
        ...

    def claim_like(self, worker: str, job: Job, now: float, *, lease_s: float, most: int) -> list[Job]:
        """Up to ``most`` more queued jobs of its batch_key, in the order of ``claim``."""
        ...

    def renew(self, job: Job, now: float, *, lease_s: float) -> bool:
        """False: the lease is lost, and so is the job."""
        ...

    def cancel_requested(self, jobs: Sequence[Job]) -> set[str]:
        """Ids of those that are to stop, whose lease is lost, or that are gone."""
        ...

    def report(self, job: Job, now: float, *, step: int, progress: int, batch: int) -> bool:
        """False: the lease is lost."""
        ...

    def finish(
        self,
        job: Job,
        now: float,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: JobError | None = None,
    ) -> bool:
        """False: the lease is lost; nothing is changed."""
        ...

    def put_back(self, job: Job, now: float) -> bool:
        """A running job into the queue, its attempt not counted; or cancelled, if that was asked. False: the lease is
        lost."""
        ...

    def recover(
        self,
        finished: Callable[[Job], Mapping[str, Any] | None],
        now: float,
        *,
        attempts: int,
        worker: str | None = None,
    ) -> list[Job]:
        """Ends what a worker that is known to be dead has left, before the leases do; the jobs as they are then.

        A job is completed where ``finished`` gives its result; else cancelled, if that was asked; else failed after as
        many ``attempts``; else queued. ``worker=None``: of all workers, where none lives.
        """
        ...

    # what workers tell the web process
    def publish(self, model: str, info: Mapping[str, Any], now: float) -> None:
        """What a model can do (``model_info.ModelInfo``); kept while no worker runs."""
        ...

    def published(self) -> dict[str, Mapping[str, Any]]: ...

    def beat(self, worker: str, told: Mapping[str, Any], now: float) -> None:
        """That a worker lives: {models, ready, job, seconds_per_step, mfu, memory_bytes, ...}."""
        ...

    def workers(self, now: float, within_s: float) -> dict[str, Mapping[str, Any]]:
        """Those that were heard of within so many seconds."""
        ...

    def close(self) -> None: ...
