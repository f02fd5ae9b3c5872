"""A run in memory: what it is made of, and what can be done with it as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from acceleration.checkpoint import CheckpointManager, SaveError
from acceleration.diagnostics.lost_peers import check_lost
from acceleration.diagnostics.memory_usage import peak_gib
from acceleration.distributed import runtime as runtimes
from acceleration.distributed.agreement import StopRequest
from acceleration.distributed.mesh import Mesh
from acceleration.distributed.runtime import Runtime
from acceleration.engines import Engine
from acceleration.optim.optimizers import lr_at
from opensora.config.run import RunConfig
from opensora.inference.prompts import Job
from opensora.planner.checks import Traffic
from opensora.train.garbage_collection import GarbageCollection
from opensora.train.health.anomaly_guard import AnomalyGuard, Update
from opensora.train.health.data_health import DataHealth
from opensora.train.health.step_timer import StepTimer
from opensora.train.held_out import HeldOutLoss
from opensora.train.metrics import Metrics
from opensora.train.preparation import Preparation
from opensora.train.state.export import exported, write_export
from opensora.train.state.resume import checkpoint_info
from opensora.train.state.run_lock import RunLock
from opensora.train.step_data import StepData
from opensora.utils import signal_handler
from opensora.utils.console import announce


@dataclass(kw_only=True)
class Run:
    """A run in memory. ``step`` counts updates made or left out and is, with the engine's tensors and what the guard
    remembers, its whole state."""

    cfg: RunConfig
    runtime: Runtime
    mesh: Mesh
    engine: Engine
    data: StepData
    prepare: Preparation
    checkpoints: CheckpointManager
    metrics: Metrics
    reads: DataHealth
    stop: StopRequest
    guard: AnomalyGuard
    timer: StepTimer
    step: int
    traffic: Traffic | None  # on the process that writes records
    base: str | None = None  # fingerprint of the weights that adapters are trained beside
    held_out: HeldOutLoss | None = None  # the loss on clips that are not trained on
    prompts: Sequence[Job] = ()  # the clips of a round of validation
    lock: RunLock | None = None  # on the main process
    garbage: GarbageCollection = field(default_factory=GarbageCollection)

    def lr_at(self, step: int) -> float:
        """Learning rate of update ``step``."""
        return lr_at(step, self.cfg.optim, self.cfg.train.steps)

    def enter(self, phase: str) -> None:
        """``phase`` begins: for the watchdog, and the account of times."""
        self.timer.enter(phase, self.step)

    def zero_loss(self) -> Tensor:
        """Where the shares of a step are added up."""
        return torch.zeros((), dtype=torch.float64 if self.runtime.device.type == "cpu" else torch.float32).to(
            self.runtime.device
        )

    def tokens(self, step: int) -> int:
        """Image tokens that update ``step`` works on, all processes together."""
        denoising = self.prepare.layout.denoising
        return self.data.latent_values(step) // (denoising.latent_channels * prod(denoising.patch))

    def record(self, update: Update, *, last: bool) -> None:
        """Note the update just made or left out (``step`` counts it). Collective when a record is due."""
        made = self.step - 1
        predicted = self.traffic.of_step(made) if self.traffic else {}
        self.metrics.add(update, self.data.bucket_samples(made), self.tokens(made), predicted)
        if update.bad:
            self.metrics.log_event("left_out", self.step, why=update.bad)
        if not last and not self.metrics.is_due(self.step):
            return
        values = self.metrics.values(self.mesh, self.data.waited_s)
        values |= {"lr": self.lr_at(made), "epoch": self.data.plan.epoch_of(made)}
        values |= {"mem/peak_gib": peak_gib(self.runtime.device), "guard/left_out": self.guard.skipped}
        values |= self.reads.due() | self.timer.due(self.mesh, self.metrics.steps, self.step)
        self.begin_record()
        self.metrics.write(self.step, values)

    def begin_record(self) -> None:
        """The next record counts from here."""
        self.metrics.begin(self.mesh, self.data.waited_s)

    def save(self) -> None:
        """Write a checkpoint of the state after ``step`` updates. Collective."""
        self.enter("save")
        self.reads.check_agreement()
        with self.metrics.excluded("save", self.mesh), signal_handler.install().saving():
            info = checkpoint_info(self.cfg, self.runtime, self.data.table, self.base) | {"guard": self.guard.state()}
            self.checkpoints.save(self.step, self.engine.state_dict(), info)

    def finish_saving(self) -> None:
        """Wait until the checkpoint is on disk. Collective."""
        self.enter("save")
        with signal_handler.install().saving():
            self.checkpoints.wait()

    def where_stopped(self) -> str | None:
        """After an interruption: where the state is and how to go on; None if this step's state could not be saved."""
        if self.checkpoints.failures:
            return None
        name = signal_handler.install().name
        path = self.checkpoints.folder / f"step-{self.step:08d}"
        return (
            f"stopped by {name or 'a signal to another process'}: step {self.step} of {self.cfg.train.steps} is saved "
            f"in {path}; the same command goes on from there"
        )

    def export(self) -> None:
        """Write what sampling should use: of weights or adapters the moving average, if there is one. Collective.

        Raises:
            SaveError: it could not be written; the state is in the last checkpoint.
        """
        self.enter("export")
        problem = write_export(self.cfg, self.engine, self.step, self.base, write=self.runtime.is_main)
        problem = self.checkpoints.from_main(problem)
        if problem:
            raise SaveError(f"not exported, {problem}; the run itself is saved: start it again when this is mended")
        announce(f"exported {exported(self.cfg)} weights of step {self.step} to {self.cfg.folder / 'exported'}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the data workers and leave the process group. Collective, unless an error is on its way out.

        Signals kill again: a process that failed must not outlive its launcher's patience.

        Raises:
            PeerLost: in place of an error that only says that another process has gone.
        """
        self.garbage.restore()
        if kind is not None:
            signal_handler.uninstall()
        self.data.close()
        self.metrics.close()
        self.checkpoints.close()
        self.timer.close()
        if kind is None:
            runtimes.stop()
        if self.lock is not None:
            self.lock.release()
        signal_handler.uninstall()
        if error is not None:
            check_lost(error, self.runtime, f"step {self.step}")
