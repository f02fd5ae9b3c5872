"""AdamW whose update is apex's: torch's optimizer with torch's state, so that either goes on from what the other saved.

apex counts updates in the host's memory, and once for a whole group of parameters; torch in a tensor of each parameter.
The tensors are kept up to date, and read only after somebody else has written them. What the kernels get are the plain
tensors that this process holds: they know neither DTensors, nor parameters of which it has nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acceleration import nvidia_apex
from acceleration.sharding.fsdp import local

SETTINGS = ("lr", "betas", "eps", "weight_decay")
MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT = 8  # sets of parameters that had gradients together


class _Count(NamedTuple):
    """Updates of a parameter, as they were read from a tensor at one of its versions."""

    tensor: Tensor
    version: int
    updates: int


class _Fused(NamedTuple):
    """apex's optimizer, and the plain tensors that it updates."""

    views: list[nn.Parameter]
    optimizer: torch.optim.Optimizer


class FusedAdamW(torch.optim.AdamW):
    """Takes what ``torch.optim.AdamW`` takes, and has its state and settings."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._counts: dict[nn.Parameter, _Count] = {}
        self._kept: dict[tuple[int, ...], _Fused] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                self._start(p)
            by_count: dict[int, list[nn.Parameter]] = {}
            for p, updates in zip(moved, self._updates(moved), strict=True):
                by_count.setdefault(updates, []).append(p)
            for updates, parameters in by_count.items():
                self._update(group, parameters, updates)
        return loss

    def _start(self, p: nn.Parameter) -> None:
        """The state that torch's AdamW begins with."""
        if not self.state[p]:
            self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in MOMENTS:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _updates(self, parameters: list[nn.Parameter]) -> list[int]:
        """How many updates each has had; the device is asked once, and only for tensors that others have written."""
        unknown = []
        for p in parameters:
            known, tensor = self._counts.get(p), self.state[p]["step"]
            if known is None or known.tensor is not tensor or known.version != tensor._version:
                unknown.append(p)
        if unknown:
            read = torch.stack([self.state[p]["step"].float() for p in unknown]).tolist()
            for p, updates in zip(unknown, read, strict=True):
                tensor = self.state[p]["step"]
                self._counts[p] = _Count(tensor, tensor._version, int(updates))
        return [self._counts[p].updates for p in parameters]

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter], updates: int) -> None:
        """By apex, of parameters that have had equally many updates."""
        held = [p for p in parameters if local(p).numel()]
        if held:
            fused = self._fused(held)
            fused.optimizer.param_groups[0].update({name: group[name] for name in SETTINGS}, step=updates)
            for view, p in zip(fused.views, held, strict=True):
                assert p.grad is not None
                view.grad = local(p.grad).contiguous()
                fused.optimizer.state[view] = {name: local(self.state[p][name]) for name in MOMENTS}
            fused.optimizer.step()
            for view in fused.views:
                view.grad = None
        tensors = [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(tensors, 1)
        for p, tensor in zip(parameters, tensors, strict=True):
            self._counts[p] = _Count(tensor, tensor._version, updates + 1)

    def _fused(self, held: list[nn.Parameter]) -> _Fused:
        """apex's optimizer of these parameters: it is made once, since that waits for the device."""
        key = tuple(map(id, held))
        fused = self._kept.get(key)
        if fused is None or any(v.data_ptr() != local(p).data_ptr() for v, p in zip(fused.views, held, strict=True)):
            views = [nn.Parameter(local(p.detach()), requires_grad=False) for p in held]
            if len(self._kept) == KEPT:
                self._kept.clear()
            fused = self._kept[key] = _Fused(views, nvidia_apex.fused_adam(views))
        return fused
