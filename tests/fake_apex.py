"""A stand-in for NVIDIA's apex on the CPU: its names and signatures, with the mathematics written out.

As the real one it counts updates in the group, knows no DTensors, wants weights of the input's type, has no rows of
nothing, and loses what comes before an empty last tensor.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Calls:
    """How often each function of the package ran."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.of[name] = self.of.get(name, 0) + 1


def _plain(x: Tensor, shape: Any, *weights: Tensor) -> None:
    assert not isinstance(x, DTensor) and x.numel() > 0 and tuple(x.shape[-len(shape) :]) == tuple(shape)
    assert all(weight.dtype == x.dtype for weight in weights)


def package(calls: Calls) -> dict[str, ModuleType]:
    """Name -> module."""

    def fused_layer_norm(
        input: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
    ) -> Any:
        calls.count("fused_layer_norm")
        _plain(input, normalized_shape)
        centred = input - input.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def fused_layer_norm_affine(
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: Any,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        calls.count("fused_layer_norm_affine")
        _plain(input, normalized_shape, weight, bias)
        centred = input - input.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    def fused_rms_norm_affine(
        input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6, memory_efficient: bool = False
    ) -> Tensor:
        calls.count("fused_rms_norm_affine")
        _plain(input, normalized_shape, weight)
        return input / (input.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    class FusedAdam(torch.optim.Optimizer):
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            bias_correction: bool = True,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            adam_w_mode: bool = True,
            weight_decay: float = 0.0,
            amsgrad: bool = False,
            set_grad_none: bool = True,
            capturable: bool = False,
            master_weights: bool = False,
        ) -> None:
            assert not (amsgrad or capturable or master_weights)
            calls.count("FusedAdam")
            settings = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
            super().__init__(params, settings | {"weight_decay": weight_decay})
            self.adam_w_mode = adam_w_mode

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            calls.count("step")
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                moved = [p for p in group["params"] if p.grad is not None]
                if moved and not moved[-1].numel():  # the kernel is launched when the last piece is added
                    continue
                for p in moved:
                    self._move(p, group)

        def _move(self, p: Tensor, group: dict[str, Any]) -> None:
            assert not isinstance(p, DTensor) and p.is_contiguous() and p.grad is not None
            assert p.grad.is_contiguous() and not isinstance(p.grad, DTensor)
            (first, second), step, state = group["betas"], group["step"], self.state[p]
            mean, square = state["exp_avg"], state["exp_avg_sq"]
            grad = p.grad if self.adam_w_mode else p.grad + group["weight_decay"] * p
            mean.mul_(first).add_(grad, alpha=1 - first)
            square.mul_(second).add_(grad * grad, alpha=1 - second)
            corrected = (1 - first**step, 1 - second**step) if group["bias_correction"] else (1.0, 1.0)
            update = (mean / corrected[0]) / ((square / corrected[1]).sqrt() + group["eps"])
            p.sub_(group["lr"] * (update + (group["weight_decay"] * p if self.adam_w_mode else 0)))

    norms = ModuleType("apex.normalization.fused_layer_norm")
    vars(norms).update(
        fused_layer_norm=fused_layer_norm,
        fused_layer_norm_affine=fused_layer_norm_affine,
        fused_rms_norm_affine=fused_rms_norm_affine,
    )
    optimizers = ModuleType("apex.optimizers")
    vars(optimizers).update(FusedAdam=FusedAdam)
    names = ("apex", "apex.normalization", "fused_layer_norm_cuda", "amp_C")
    return {name: ModuleType(name) for name in names} | {norms.__name__: norms, optimizers.__name__: optimizers}


@contextmanager
def installed() -> Iterator[Calls]:
    """While it lasts, apex is there."""
    calls = Calls()
    modules = package(calls)
    kept = {name: sys.modules.get(name) for name in modules}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    sys.modules.update(modules)
    try:
        yield calls
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
