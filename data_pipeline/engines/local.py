"""The cores of this machine: a thread for each worker process, which take sources in turn from the same shards."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from data_pipeline.engines.progress import StageProgress
from data_pipeline.journal import ShardTaken
from data_pipeline.limits import SourceLimits
from data_pipeline.log import RunLog
from data_pipeline.shard import InputMissing, ShardRun, ShardTask
from data_pipeline.stages.base import Stage, Unit
from data_pipeline.worker import Worker, WorkerClosed


class LocalEngine:
    """A pool of ``workers`` processes; they start when they are needed, and end with this one."""

    def __init__(self, out: Path, stages: Mapping[str, Stage], limits: SourceLimits, workers: int) -> None:
        """``workers``: 0: one for each core."""
        count = workers or usable_cores()
        self._stages = stages
        self._workers = [Worker(stages, limits) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")  # as long as the processes they start
        self._log = RunLog(out)

    def run(self, stage: str, tasks: Sequence[ShardTask]) -> None:
        """See ``Engine``."""
        progress = StageProgress(stage, tasks)
        queue = _Queue(sorted(tasks, key=lambda task: task.weight, reverse=True), self._log, progress)
        futures = [self._threads.submit(self._work, worker, queue) for worker in self._workers[: self._most(stage)]]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            queue.stop()
            self.close()
            raise
        finally:
            wait(futures)
            queue.close()
            progress.close()

    def close(self) -> None:
        """See ``Engine``."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=False)

    def _most(self, stage: str) -> int:
        """Workers at a time that the cores are enough for, by what the stage says of itself."""
        return max(1, int(len(self._workers) / max(1.0, self._stages[stage].resources.cpus)))

    def _work(self, worker: Worker, queue: "_Queue") -> None:
        try:
            while (item := queue.next()) is not None:
                queue.compute(*item, worker)
        except WorkerClosed:
            return


class _Queue:
    """Sources of one shard after another; a shard is written by whoever finishes its last one."""

    def __init__(self, tasks: Sequence[ShardTask], log: RunLog, progress: StageProgress) -> None:
        self._units = self._all_units(tasks, log)
        self._progress = progress
        self._open: list[ShardRun] = []
        self._guard = threading.Lock()
        self._stopped = False

    def next(self) -> tuple[ShardRun, Unit] | None:
        """None: there is nothing left to begin."""
        with self._guard:
            return None if self._stopped else next(self._units, None)

    def compute(self, run: ShardRun, unit: Unit, worker: Worker) -> None:
        """Raises: as ``run_shard``; WorkerClosed."""
        is_last = run.compute(unit, worker)
        if is_last:
            run.finish()
            with self._guard:
                self._open.remove(run)
        self._progress.add(1, run.weight(unit))

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True

    def close(self) -> None:
        """Leave what is not finished as it is."""
        for run in self._open:
            run.close()

    def _all_units(self, tasks: Sequence[ShardTask], log: RunLog) -> Iterator[tuple[ShardRun, Unit]]:
        for task in tasks:
            try:
                run = ShardRun(task, log)
            except (InputMissing, ShardTaken):
                self._progress.known(len(task.sources), task.weight)
                continue
            known = task.weight - sum(run.weight(unit) for unit in run.pending)
            self._progress.known(len(task.sources) - len(run.pending), known)
            self._open.append(run)
            if not run.pending:
                run.finish()
                self._open.remove(run)
            for unit in run.pending:
                yield run, unit


def usable_cores() -> int:
    """Those that this process may run on: a batch system gives some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
