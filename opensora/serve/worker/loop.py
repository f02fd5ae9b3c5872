"""The life of a group: what rank 0 claims all processes make, batch by batch, until it is asked to stop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from acceleration.diagnostics.memory_usage import peak_gib
from opensora.serve.jobs import OUT_OF_MEMORY, SAMPLING_FAILED, Job, JobError
from opensora.serve.store import Store
from opensora.serve.worker.describe import Costs, forecast_text
from opensora.serve.worker.desk import DECODED, Desk, read_job
from opensora.serve.worker.finish import already_there, problem_of, write_files
from opensora.serve.worker.models import Model
from opensora.serve.worker.peers import Flag, GroupLost, Outcome, Peers, described
from opensora.serve.worker.sampler import make_clips, mend, same_bits, shares_of, warm_up
from opensora.utils.console import announce

RESTART = 87  # exit code of a group whose memory is beyond help


@dataclass
class Batch:
    """Jobs that are made together, and what is known of that while it goes on."""

    jobs: list[Job]
    clips: Tensor | None = None  # (n, T, H, W, 3) uint8, on rank 0
    marks: list[float] = field(default_factory=list)  # when each step was done, from the first one's beginning on

    @property
    def step_s(self) -> float | None:
        """Seconds of a step; None: there was none."""
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1) if len(self.marks) > 1 else None


class Loop:
    """One process of a group."""

    def __init__(
        self,
        peers: Peers,
        store: Store,
        models: dict[str, Model],
        costs: dict[str, Costs],
        desk: Desk | None,
        *,
        exact: bool = True,
    ) -> None:
        """
        Args:
            desk: on rank 0.
            exact: only what has the same bits together as alone is made together.
        """
        self.exact = exact
        self.peers, self.store, self.models, self.costs, self.desk = peers, store, models, costs, desk
        self._full = 0  # times in a row that a clip did not fit the memory

    def run(self) -> int:
        """Until the group is asked to stop. Returns the exit code.

        Raises:
            GroupLost: a process is gone; the jobs at hand go to another group.
        """
        while True:
            order = self.peers.tell(self.desk.order() if self.desk else None)
            if order["do"] == "stop":
                return 0
            if order["do"] == "sample":
                jobs = [read_job(told) for told in order["jobs"]]
                try:
                    self.take(jobs)
                except GroupLost:
                    if self.desk:
                        self.desk.give_up(jobs)
                    raise
            if self._full > 1:
                announce("memory was full twice in a row: this group starts again")
                return RESTART

    def warm_up(self, job: Job) -> float | None:
        """Steps and pixels of a clip that nobody asked for. Returns seconds of a step. Collective.

        Raises:
            RuntimeError: it did not go well.
        """
        model, found = self.models[job.model], list[float | None]()
        outcome = self.peers.attempt(lambda: found.append(warm_up(self.store, model, job)))
        if outcome.flag != Flag.GO:
            raise RuntimeError(f"models.{job.model}: the first steps failed: {outcome.error or outcome.flag.name}")
        return found[0]

    def take(self, jobs: Sequence[Job]) -> None:
        """Make jobs that were claimed together, in one batch where that changes no bit. Collective."""
        jobs = self._to_make(jobs)
        if not jobs:
            return
        model = self.models[jobs[0].model]
        for _, alike in groupby(jobs, key=model.kind):
            for together in self._batches(model, list(alike)):
                self._make(model, together)

    def _to_make(self, jobs: Sequence[Job]) -> list[Job]:
        """Jobs without those that are ended here: what is no request of this model, and what an earlier group has left
        whole. Collective."""
        left = [job.id for job in jobs if self.desk and self._is_to_be_made(self.desk, job)]
        left = self.peers.tell(left)
        return [job for job in jobs if job.id in left]

    def _is_to_be_made(self, desk: Desk, job: Job) -> bool:
        try:
            found = already_there(self.store, job.id, self.models[job.model].fps(job))
        except (ValueError, KeyError, TypeError) as reason:
            desk.finish(job, "failed", error=JobError(code=SAMPLING_FAILED, message=described(reason)))
            return False
        if found is not None:
            desk.finish(job, "completed", result={**found, "seconds_used": 0.0})
        return found is None

    def _batches(self, model: Model, jobs: list[Job]) -> list[list[Job]]:
        """As many together as may be."""
        groups = model.parts.mesh.data_degree
        if len(jobs) <= groups or self._may_join(model, jobs):
            return [jobs]
        return [jobs[first : first + groups] for first in range(0, len(jobs), groups)]

    def _may_join(self, model: Model, jobs: Sequence[Job]) -> bool:
        """Whether so many clips of this kind have the same bits together as alone: looked at once. Collective."""
        key = (model.shape(jobs[0]), shares_of(len(jobs), model.parts.mesh.data_degree)[0])
        if key not in model.batches and not self.exact:
            model.batches[key] = True  # until they do not fit the memory together
        if key not in model.batches:
            found = [False]

            def work() -> None:
                found[0] = same_bits(self.peers, self.store, model, jobs)

            outcome = self.peers.attempt(work)
            model.batches[key] = found[0] and outcome.flag == Flag.GO
            if outcome.flag != Flag.GO:
                mend(model)
            if not model.batches[key]:
                announce(
                    f"models.{model.name}: {key[1]} clips of this size and kind would not have the bits that they have "
                    "alone, or do not fit together; they are made one by one"
                )
        return model.batches[key]

    def _make(self, model: Model, jobs: list[Job]) -> None:
        batch = Batch(jobs)
        self._say(job=jobs[0].id, batch=len(jobs))

        def on_step(done: int, total: int) -> None:
            batch.marks.append(time.monotonic())
            self.peers.border(self.desk.step(jobs, done, total) if self.desk else Flag.GO)

        def work() -> None:
            batch.clips = make_clips(self.peers, self.store, model, jobs, on_step)

        outcome = self.peers.attempt(work)
        if outcome.flag >= Flag.FAILED:
            mend(model)
        if outcome.flag == Flag.NO_MEMORY and len(jobs) > 1:
            return self._apart(model, jobs)
        self._full = self._full + 1 if outcome.flag == Flag.NO_MEMORY else 0
        if self.desk:
            self._end(self.desk, model, batch, outcome)
            self._say(job=None, batch=0, **self._speed(model, batch))

    def _apart(self, model: Model, jobs: list[Job]) -> None:
        """What does not fit together is made one by one, now and from now on."""
        groups = model.parts.mesh.data_degree
        model.batches[(model.shape(jobs[0]), shares_of(len(jobs), groups)[0])] = False
        announce(f"models.{model.name}: {len(jobs)} clips did not fit the memory together; they are made one by one")
        for first in range(0, len(jobs), groups):
            self._make(model, jobs[first : first + groups])

    def _end(self, desk: Desk, model: Model, batch: Batch, outcome: Outcome) -> None:
        """What becomes of the jobs of a batch. On rank 0."""
        if outcome.flag == Flag.PUT_BACK:
            return desk.put_back(batch.jobs)
        wanted = desk.wanted(batch.jobs)
        if outcome.flag >= Flag.FAILED:
            for job in wanted:
                desk.finish(job, "failed", error=self._problem(model, job, outcome))
            return None
        if batch.clips is not None:
            desk.report(wanted, DECODED, step=model.option(batch.jobs[0]).num_steps, batch=len(batch.jobs))
            for job, clip in zip(batch.jobs, batch.clips, strict=True):
                if job in wanted:
                    self._write(desk, model, job, clip)
        return None

    def _write(self, desk: Desk, model: Model, job: Job, clip: Tensor) -> None:
        desk.lease.moved()
        try:
            result = write_files(self.store, job.id, clip, model.fps(job), model.cfg.crf)
        except Exception as reason:
            self.store.remove(job.id)
            desk.finish(job, "failed", error=problem_of(reason))
            return
        used = time.time() - (desk.began or time.time())
        desk.finish(job, "completed", result={**result, "seconds_used": round(used, 3)})

    def _problem(self, model: Model, job: Job, outcome: Outcome) -> JobError:
        if outcome.flag == Flag.NO_MEMORY:
            message = forecast_text(self.costs[model.name], model.option(job), model.kind(job))
            return JobError(code=OUT_OF_MEMORY, message=message)
        message = outcome.error.replace(f"{self.store.references}/", "")
        return JobError(code=SAMPLING_FAILED, message=message or "sampling failed")

    def _say(self, **told: Any) -> None:
        if self.desk:
            self.desk.lease.say(told)

    def _speed(self, model: Model, batch: Batch) -> dict[str, Any]:
        """Seconds of a step, its share of the device's peak, and memory, for the next word to the web process."""
        told: dict[str, Any] = {"memory_bytes": int(peak_gib(model.parts.device) * 2**30), "model": model.name}
        if (step_s := batch.step_s) is None:
            return told
        option, kind = model.option(batch.jobs[0]), model.kind(batch.jobs[0])
        mfu = self.costs[model.name].mfu(option, kind, len(batch.jobs), step_s)
        return told | {"seconds_per_step": step_s, "mfu": mfu}
