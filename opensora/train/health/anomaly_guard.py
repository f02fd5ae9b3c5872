"""What a run does when numbers go wrong: leave an update out, go back to an older checkpoint, stop.

An update whose loss or gradient norm is not finite, or spikes, is left out on all processes alike, before optimizer,
average and window: its samples are consumed, nothing else happens. When more than ``guard.max_bad`` in a row are bad,
or one is and the weights themselves are not finite, the run goes back to a checkpoint older than the first of them.
The first time it makes the same updates again, bit for bit, so that what was transient, such as a fault of memory, is
as if it had not been. If the same trouble comes again, its cause is in the numbers: the run goes back and leaps over
all samples up to the last bad ones. Then it stops. Copies of the state that differ are a reason to go back as well,
and never to leap.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.diagnostics import replica_check
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import Mesh
from acceleration.engines import Engine
from opensora.config.run import GuardConfig
from opensora.utils.console import announce

RECOVERED = 100  # updates beyond the last bad one after which a trouble is over


class TrainingDiverged(Exception):
    """Numbers that stay wrong after every remedy."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What became of one update; equal on every process."""

    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    bad: str | None = None  # why it was left out


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Where to go back to."""

    why: str
    before: int  # a checkpoint of at most so many updates
    skip_to: int | None  # then go on with this update; None: with the one after the checkpoint


class AnomalyGuard:
    """Judges updates by what all processes know, so all judge alike. Its state is a few numbers in the checkpoint."""

    def __init__(self, cfg: GuardConfig, step: int = 0, state: dict[str, Any] | None = None) -> None:
        """``state``: as ``state`` gave it when the checkpoint of ``step`` updates was written."""
        state = state or {}
        self.cfg = cfg
        self.skipped = int(state.get("skipped", state.get("left_out", 0)))  # updates, since the run began; the old name
        self._row = int(state.get("row", 0))  # bad updates one after the other
        self._first, self._last = state.get("bad", (-1, -1))  # of them
        self._rollbacks = int(state.get("returns", 0))  # for the trouble at hand
        self._equal = step  # updates made when copies were last known to be equal: they are read from one file
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=cfg.spike_window)
        self._norms: deque[float] = deque(state.get("norms", ()), maxlen=cfg.spike_window)

    @property
    def last_step_ok(self) -> bool:
        """The last update was good: its state is worth keeping."""
        return self._row == 0

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON."""
        return {
            "skipped": self.skipped,
            "row": self._row,
            "bad": [self._first, self._last],
            "returns": self._rollbacks,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def update(self, engine: Engine, mesh: Mesh, step: int, share: Tensor) -> Update:
        """Make update ``step`` if its numbers are good. ``share``: this process's of the loss. Collective."""
        asked: list[Update] = []

        def accept(norm: Tensor) -> bool:
            asked.append(self.judge(step, *_global(mesh, share, norm)))
            return asked[-1].bad is None

        norm = engine.step(step, accept)
        if not asked:  # the engine does not ask: what is bad is known afterwards, and is in the weights
            accept(norm)
            if asked[-1].bad:
                self._row = self.cfg.max_bad + 1
        update = asked[-1]
        if update.bad:
            announce(f"step {step}: {update.bad}: update left out, {self._row} in a row")
        return update

    def judge(self, step: int, loss: float, norm: float) -> Update:
        """Whether update ``step`` is to be made, by its loss and gradient norm."""
        bad = self._complaint(loss, norm)
        if bad is None:
            self._row = 0
            self._losses.append(loss)
            self._norms.append(norm)
            if self._rollbacks and step > self._last + RECOVERED:
                self._rollbacks = 0
        else:
            self.skipped += 1
            self._row += 1
            self._first, self._last = (step if self._row == 1 else self._first), step
        return Update(loss=loss, grad_norm=norm, bad=bad)

    def _complaint(self, loss: float, norm: float) -> str | None:
        for name, value, window in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if self.cfg.spike_sigma and len(window) >= self.cfg.spike_window // 2:
                mean, deviation = fmean(window), pstdev(window)
                if value > mean + self.cfg.spike_sigma * deviation > mean:
                    return f"{name} {value:.4g} is {(value - mean) / deviation:.1f} deviations above {mean:.4g}"
        return None

    def wants_rollback(self, engine: Engine, mesh: Mesh, step: int, enter: Callable[[str], None]) -> Rollback | None:
        """Whether to go back, and where to, after ``step`` updates. Collective.

        Args:
            enter: is told the phase ``replicas`` where copies are compared.

        Raises:
            TrainingDiverged: it was done often enough.
        """
        ruined = self._row == 1 and not replica_check.is_finite(engine, mesh)
        wanted = self._bad_row(ruined) or self._unequal(engine, mesh, step, enter)
        if wanted is None:
            return None
        self._rollbacks += 1
        if self._rollbacks > self.cfg.max_rollbacks:
            raise TrainingDiverged(
                f"{wanted.why} again, after going back {self.cfg.max_rollbacks} times; checkpoints of "
                f"{wanted.before} and fewer steps are good: change optim.lr, the data, or the machine"
            )
        self._row = 0
        return wanted

    def _bad_row(self, ruined: bool = False) -> Rollback | None:
        if self._row <= self.cfg.max_bad and not ruined:
            return None
        why = f"{self._row} bad updates in a row from step {self._first} on"
        if ruined:
            why = f"values of the state are not finite at step {self._first}"
        return Rollback(why=why, before=self._first, skip_to=self._last + 1 if self._rollbacks else None)

    def _unequal(self, engine: Engine, mesh: Mesh, step: int, enter: Callable[[str], None]) -> Rollback | None:
        if not self.cfg.replicas_every or step % self.cfg.replicas_every:
            return None
        enter("replicas")
        ranks = replica_check.differing(engine, engine.model, mesh)
        if not ranks:
            self._equal = step
            return None
        names = ", ".join(str(rank) for rank in ranks)
        self._last = step
        why = f"the state of rank {names} differs from its copies, which were equal at step {self._equal}"
        return Rollback(why=why, before=self._equal, skip_to=None)

    def rolled_back(self, returned: "AnomalyGuard") -> "AnomalyGuard":
        """The guard of a checkpoint that was gone back to, which knows of the trouble to come."""
        returned.skipped = self.skipped
        returned._rollbacks, returned._first, returned._last = self._rollbacks, self._first, self._last
        return returned


def _global(mesh: Mesh, share: Tensor, norm: Tensor) -> tuple[float, float]:
    """(loss of the global batch, gradient norm), the same bits on every process. Collective."""
    # Processes along the tensor axis hold the same share: one of them counts, a NaN of any does.
    share = share.detach() * (mesh["tensor"].rank == 0)
    both = torch.stack([share.double(), norm.detach().to(share.device).double() / mesh.world_size])
    with WAITING.on("all_reduce of loss and gradient norm"):
        dist.all_reduce(both)
    loss, norm_everywhere = both.tolist()
    return loss, norm_everywhere
