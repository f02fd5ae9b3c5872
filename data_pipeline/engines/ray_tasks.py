"""Tasks of a Ray cluster: one for each shard, by the same function as on one machine. Paths travel, no frames do.

Ray places tasks and starts those again whose process or machine was lost. What is done is in the folder of the run,
which every machine of the cluster must see under the same path; no state of Ray matters, and starting anew is safe.
"""

import contextlib
import hashlib
import os
import pickle
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.engines.config import EngineConfig
from data_pipeline.engines.progress import StageProgress
from data_pipeline.journal import ShardTaken
from data_pipeline.limits import SourceLimits
from data_pipeline.log import RunLog
from data_pipeline.shard import InputMissing, ShardTask, run_shard
from data_pipeline.stages.base import Resources, Stage
from data_pipeline.worker import Worker
from opensora.utils.command_line.command import ending_of
from opensora.utils.errors import UserError, one_line

_ROOT = Path(__file__).resolve().parents[2]
_RETRIES = 10  # of a task whose process or machine was lost; a source that kills its worker costs none of them
_LISTENS_S = 10.0  # that whoever listens at an address takes to answer
_LOCAL = "engine.kind=local, the cores of this machine"
_STORE_BYTES = 128 * 2**20  # for what travels: paths and settings
# Before Ray is imported. Its agents may take minutes to start on a machine that is busy; and it reports to nobody.
_ENVIRONMENT = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks without a GPU do not hide those that there are
}


class RayEngine:
    """Tasks of a running cluster, or of one on this machine that ends with this process."""

    def __init__(self, out: Path, stages: Mapping[str, Stage], limits: SourceLimits, config: EngineConfig) -> None:
        """
        Raises:
            UserError: Ray is not installed, or no cluster answers.
        """
        self._ray = _started(config)
        self._stages = stages
        self._setup = self._ray.put((dict(stages), limits, out))
        self._make = self._ray.remote(_make)
        self._workers = config.workers

    def run(self, stage: str, tasks: Sequence[ShardTask]) -> None:
        """See ``Engine``."""
        make = self._make.options(**self._resources(self._stages[stage].resources))
        progress = StageProgress(stage, tasks)
        waiting = iter(sorted(tasks, key=lambda task: task.weight, reverse=True))
        running: dict[Any, ShardTask] = {}
        try:
            while True:
                for task in _some(waiting, self._most(self._stages[stage].resources) - len(running)):
                    running[make.remote(replace(task, stage=None), stage, self._setup)] = task  # type: ignore[arg-type]
                if not running:
                    return
                (ended,), _ = self._ray.wait(list(running), num_returns=1)
                task = running.pop(ended)
                self._check(ended)
                progress.add(len(task.sources), task.weight)
        finally:
            for left in running:
                with contextlib.suppress(Exception):
                    self._ray.cancel(left, force=True)
            progress.close()

    def close(self) -> None:
        """See ``Engine``."""
        self._ray.shutdown()

    def _check(self, ended: Any) -> None:
        try:
            refusal = self._ray.get(ended)
        except self._ray.exceptions.WorkerCrashedError as error:
            raise UserError(f"ray: the processes of a task were lost {_RETRIES + 1} times in a row ({error})") from None
        if refusal:
            raise UserError(refusal)

    def _most(self, needs: Resources) -> int:
        """Tasks at a time: one core stays free for Ray's own processes, without which it stands still."""
        cores = self._ray.cluster_resources().get("CPU", 1.0) - 1.0
        most = max(1, int(cores / needs.cpus)) if needs.cpus else 2**16
        return min(most, self._workers) if self._workers else most

    def _resources(self, needs: Resources) -> dict[str, Any]:
        """
        Raises:
            UserError: no machine of the cluster has them, so that the task would wait for ever.
        """
        most: dict[str, float] = {}
        for node in self._ray.nodes():
            for name, amount in node["Resources"].items() if node["Alive"] else ():
                most[name] = max(most.get(name, 0.0), amount)
        for name, amount in (("CPU", needs.cpus), ("GPU", needs.gpus)):
            if amount > most.get(name, 0.0):
                raise UserError(f"engine.kind=ray: a stage asks for {amount:g} {name}, which no machine has")
        return {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": _RETRIES}


def _some(tasks: Iterator[ShardTask], count: int) -> Iterator[ShardTask]:
    for _ in range(count):
        if (task := next(tasks, None)) is None:
            return
        yield task


def _started(config: EngineConfig) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError(f"engine.kind=ray: the package ray is not installed; pip install ray, or {_LOCAL}") from None
    _check_address(config.address)
    path = os.pathsep.join([str(_ROOT), *(entry for entry in sys.path if entry)])
    asked: dict[str, Any] = {"address": config.address, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    if not config.address:
        os.environ["PYTHONPATH"] = path
        asked = {"address": "local", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    try:
        with _said_aside() as said, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**asked, log_to_driver=True, logging_level="error", configure_logging=True)
    except Exception as error:  # Ray has several of its own, and lets those of gRPC through
        reason = one_line(str(error)).split(". ")[0] or type(error).__name__
        raise UserError(_no_cluster(config.address, reason)) from error
    sys.stderr.write(said())
    return ray


def _no_cluster(address: str, reason: str) -> str:
    if not address:
        return f"engine.kind=ray: Ray cannot start on this machine ({reason}); set {_LOCAL}"
    remedy = "ray start --head starts one, and says its address"
    return f"engine.address={address}: no cluster of Ray answers ({reason}); {remedy}; without one set {_LOCAL}"


def _check_address(address: str) -> None:
    """That somebody listens there: Ray itself asks for minutes, and ends the process.

    Raises:
        UserError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # auto, a name that Ray knows, or one that it refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _LISTENS_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise UserError(_no_cluster(address, reason)) from error


@contextlib.contextmanager
def _said_aside() -> Iterator[Callable[[], str]]:
    """What is written to the error output meanwhile, also by libraries in C++: Ray's warnings come before the one line
    that says what they mean. Gives what to ask for it by, behind the block."""
    sys.stderr.flush()
    kept, before = os.dup(2), ""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: before
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            before = file.read().decode(errors="replace")


_WORKERS: dict[str, tuple[Worker, RunLog]] = {}  # of this process of Ray's, for the tasks that follow


def _make(task: ShardTask, stage: str, setup: tuple[Mapping[str, Stage], SourceLimits, Path]) -> str:
    """One output, in a process of Ray's. Returns what ends the run, as one line; empty: nothing does."""
    stages, limits, out = setup
    os.environ["OMP_NUM_THREADS"] = "1"
    key = hashlib.sha256(pickle.dumps(setup)).hexdigest() + os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if key not in _WORKERS:
        for worker, _ in _WORKERS.values():
            worker.close()
        _WORKERS.clear()
        _WORKERS[key] = Worker(stages, limits), RunLog(out)
    try:
        run_shard(replace(task, stage=stages[stage]), *_WORKERS[key])
    except (InputMissing, ShardTaken):
        pass
    except (UserError, OSError) as error:
        ending = ending_of(error)
        if ending is None:
            raise
        return ending[0].removeprefix("error: ")
    return ""
