"""What engines share that keep their state in flat memory and cut it by themselves (DeepSpeed, ColossalAI).

What a process holds of a parameter is a run of its elements, perhaps none. Moving average and checkpoints work on those
runs in place, under the names and shapes of the native engine: any engine can load what any other has saved.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.checkpoint import tensor_shards
from acceleration.config import OptimConfig
from acceleration.engines.base import Weights
from acceleration.optim.ema import EMA
from acceleration.optim.optimizers import build_optimizer, ema_decay_at

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for every element


@dataclass(frozen=True)
class Run:
    """What this process holds of one parameter: ``values`` are its elements from ``start`` on, in row-major order."""

    shape: torch.Size  # of the whole parameter
    start: int
    values: Tensor  # (n,) view of the fp32 masters; n may be 0
    moments: dict[str, Tensor]  # views of the same elements' moments


class FlatEngine(ABC):
    """The part of the contract (``engines.base``) that follows from the runs; a vendor adds backward and update."""

    model: nn.Module
    optim: OptimConfig
    device: torch.device
    replicated = False  # every process holds every parameter as a whole
    ema: EMA | None = None

    @abstractmethod
    def runs(self) -> dict[str, Run]:
        """Where the vendor keeps each parameter now, by its name in the model that was given."""

    @abstractmethod
    def updates(self) -> Tensor:
        """Scalar that counts AdamW's updates; a checkpoint is read into it."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer that takes the steps."""

    def start_average(self) -> None:
        """Begin the moving average at the weights as they are."""
        self.ema = EMA(self.master_params()) if self.optim.ema_decay else None

    def update_average(self, step: int) -> None:
        """After update number ``step``."""
        if self.ema:
            self.ema.update(self.master_params(), ema_decay_at(step, self.optim))

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups():
            group["lr"] = lr

    def master_params(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, run.values) for name, run in self.runs().items())

    def held(self) -> Iterator[tuple[str, Tensor]]:
        for name, run in self.runs().items():
            yield name, run.values
            yield from ((f"{name}.{key}", value) for key, value in run.moments.items())
        if self.ema:
            yield from ((f"{name}.ema", shadow) for name, shadow in self.ema.shadow.items())

    def full_weights(self, which: Weights = "live") -> Iterator[tuple[str, Tensor]]:
        if which == "ema" and self.ema is None:
            raise ValueError("this run keeps no moving average: set optim.ema_decay, or export the live weights")
        for name, run in self.runs().items():
            held = self.ema.shadow[name] if which == "ema" and self.ema else run.values
            whole = torch.zeros(run.shape.numel(), dtype=held.dtype, device=self.device)
            whole[run.start : run.start + len(held)] = held
            if not self.replicated:  # every element is held by one process
                dist.all_reduce(whole)
            yield name, whole.view(run.shape).cpu()

    def averaged(self) -> AbstractContextManager[bool]:
        """Weights are copies that the vendor makes of the masters: the average is for the export alone."""
        return nullcontext(False)

    def state_dict(self) -> dict[str, Any]:
        runs = self.runs()
        state: dict[str, Any] = {
            "model": {name: self._piece(run, run.values) for name, run in runs.items()},
            "optimizer": {},
        }
        settings = self._settings()
        for name, run in runs.items():
            held: dict[str, Any] = {key: self._piece(run, values) for key, values in run.moments.items()}
            if self.optim.kind == "adamw":
                held["step"] = self.updates()
            state["optimizer"] |= {f"state.{name}.{key}": value for key, value in held.items()}
            state["optimizer"] |= {f"param_groups.{name}.{key}": value for key, value in settings.items()}
        if self.ema:
            state["ema"] = {name: self._piece(runs[name], values) for name, values in self.ema.shadow.items()}
        return state

    def _piece(self, run: Run, values: Tensor) -> tensor_shards.TensorShards:
        first_copy = not self.replicated or dist.get_rank() == 0
        return tensor_shards.run(values, run.shape, run.start, first_copy=first_copy)

    def _settings(self) -> dict[str, Any]:
        """What torch's optimizer calls its settings: the native engine saves them and wants them back."""
        group = build_optimizer([nn.Parameter(torch.zeros(1))], self.optim).param_groups[0]
        return {key: value for key, value in group.items() if key != "params"} | {"lr": self.param_groups()[0]["lr"]}
