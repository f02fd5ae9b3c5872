"""The cores of this machine: a thread for each worker process, which take sources in turn from the same shards."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

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
        self._workers = [Worker(stages, limits) for _ in range(count)]
        self._log = RunLog(out)

    def run(self, stage: str, tasks: Sequence[ShardTask]) -> None:
        """See ``Engine``."""
        queue = _Queue(tasks, self._log)
        total = sum(len(task.sources) for task in tasks)
        with tqdm(total=total, desc=f"{stage:>10}", unit="source", disable=None) as bar:
            with ThreadPoolExecutor(len(self._workers), thread_name_prefix=stage) as pool:
                futures = [pool.submit(self._work, worker, queue, bar) for worker in self._workers]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                except BaseException:
                    queue.stop()
                    self.close()
                    raise
                finally:
                    queue.close()
            bar.update(total - bar.n)

    def close(self) -> None:
        """See ``Engine``."""
        for worker in self._workers:
            worker.close()

    def _work(self, worker: Worker, queue: "_Queue", bar: tqdm) -> None:
        while (item := queue.next()) is not None:
            run, unit = item
            with contextlib.suppress(WorkerClosed):
                run.compute(unit, worker)
                queue.finished(run)
            bar.update()


class _Queue:
    """Sources of one shard after another; a shard is written by whoever finishes its last one."""

    def __init__(self, tasks: Sequence[ShardTask], log: RunLog) -> None:
        self._units = self._all_units(tasks, log)
        self._left: dict[int, int] = {}  # id of a run -> its units that are not done
        self._open: dict[int, ShardRun] = {}
        self._guard = threading.Lock()
        self._stopped = False

    def next(self) -> tuple[ShardRun, Unit] | None:
        """None: there is nothing left to begin."""
        with self._guard:
            return None if self._stopped else next(self._units, None)

    def finished(self, run: ShardRun) -> None:
        """One unit of a run is done."""
        with self._guard:
            self._left[id(run)] -= 1
            is_last = self._left[id(run)] == 0
        if is_last:
            run.finish()
            with self._guard:
                self._open.pop(id(run), None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True

    def close(self) -> None:
        """Leave what is not finished as it is."""
        for run in self._open.values():
            run.close()

    def _all_units(self, tasks: Sequence[ShardTask], log: RunLog) -> Iterator[tuple[ShardRun, Unit]]:
        for task in tasks:
            try:
                run = ShardRun(task, log)
            except (InputMissing, ShardTaken):
                continue
            self._open[id(run)], self._left[id(run)] = run, len(run.pending)
            if not run.pending:
                self._open.pop(id(run))
                run.finish()
            for unit in run.pending:
                yield run, unit


def usable_cores() -> int:
    """Those that this process may run on: a batch system gives some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
