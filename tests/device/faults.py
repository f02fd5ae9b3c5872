"""The usual first failures on a GPU, made on purpose, each as small as it would slip in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from acceleration.attention.kernels import KERNELS
from acceleration.blocks.activation_offload import Offload
from acceleration.engines.native import NativeEngine
from acceleration.optim.ema import EMA
from acceleration.sequence.segments import Segments
from opensora.assembly import token_layout
from opensora.models.layers import joint_blocks
from opensora.models.layers.attention import SDPACore
from opensora.models.vae.dct import DCTAutoencoder
from opensora.schedulers.rectified_flow import RectifiedFlow
from opensora.train.preparation import Preparation
from tests.device.layouts import PACKED

Change = Callable[[Any], Any]  # the right function -> the wrong one
OFFLOAD = {"parallel.recompute.kind": "full", "parallel.recompute.offload": "true"}


@dataclass(frozen=True)
class Fault:
    """Something wrong, and the words by which it is noticed."""

    name: str
    patches: tuple[tuple[Any, str, Change], ...]
    says: str
    changes: dict[str, Any] = field(default_factory=dict)


def then(do: Callable[[Any], Any]) -> Change:
    """The result of the right function is what ``do`` makes of it."""
    return lambda right: lambda *args, **kwargs: do(right(*args, **kwargs))


def looked_at(look: Callable[[Tensor], Any]) -> Change:
    """The same result, after somebody has looked at it."""

    def do(result: Any) -> Any:
        look(result[0] if isinstance(result, tuple) else result)
        return result

    return then(do)


def _attention(look: Callable[[Tensor], Any]) -> tuple[tuple[Any, str, Change], ...]:
    return ((SDPACore, "forward", looked_at(look)),)


def _in_backward(right: Any) -> Any:
    def forward(self: Any, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = right(self, q, *args, **kwargs)
        if out.requires_grad:
            out.register_hook(lambda grad: grad * (grad.sum().item() ** 0))
        return out

    return forward


def _ema_on_the_host(right: Any) -> Any:
    def __init__(self: Any, parameters: Any) -> None:
        self.shadow = {name: p.detach().to_local().cpu() for name, p in parameters}

    return __init__


def _norm_on_the_host(right: Any) -> Any:
    return lambda self, gradients: torch.tensor(float(right(self, gradients)))


def _kernel_of_the_cpu(right: Any) -> Any:
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = KERNELS["cpu"].forward(q, k, v, None)[0]
        return out

    return forward


def _repeated(x: Tensor) -> Tensor:
    return x.flatten().repeat_interleave(torch.ones(x.numel(), dtype=torch.int64, device=x.device))


def _basis_on_the_host(right: Any) -> Any:
    return lambda self, x, frames, basis, gain: right(self, x, frames, basis.cpu(), gain.cpu())


def _scale_on_the_host(right: Any) -> Any:
    return lambda x, shift, scale: right(x, shift, torch.ones(scale.shape, dtype=scale.dtype))


def _not_pinned(right: Any) -> Any:
    return lambda self, x, device: x.to(device)


def _zeros_in_backward(right: Any) -> Any:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad + torch.zeros(grad.shape)

    return lambda self, *args, **kwargs: Scaled.apply(right(self, *args, **kwargs))


def _times_stay(right: Any) -> Any:
    return lambda self, x: x if x.dtype.is_floating_point and x.ndim == 1 else right(self, x)


FAULTS = [
    Fault(
        "zeros without a device, in the noisy input",
        ((RectifiedFlow, "noised", then(lambda found: found._replace(x=found.x + torch.zeros(found.x.shape)))),),
        "WrongDevice: aten.add.Tensor",
    ),
    Fault(
        "positions without a device",
        ((token_layout, "image_ids", lambda right: lambda grid, patch, device: right(grid, patch)),),
        "waits: upload",  # FSDP2 moves the inputs of the model, and would hide it
    ),
    Fault(
        "times left on the CPU",
        ((Preparation, "_upload", _times_stay),),
        "waits: upload",
    ),
    Fault("zeros without a device, in backward", ((SDPACore, "forward", _zeros_in_backward),), "WrongDevice: aten.add"),
    Fault("item() in a block", _attention(lambda x: x.sum().item()), "waits: value"),
    Fault("item() in backward", ((SDPACore, "forward", _in_backward),), "waits: value"),
    Fault("bool() in a block", _attention(lambda x: bool((x > 1e9).any())), "waits: value"),
    Fault("tolist() in a block", _attention(lambda x: x.sum().tolist()), "waits: download"),
    Fault("cpu() in a block", _attention(lambda x: x.cpu()), "waits: download"),
    Fault("numpy() in a block", _attention(lambda x: x.detach().numpy()), "numpy() is not supported"),
    Fault("printing in a block", _attention(lambda x: f"{float(x.max()):g}"), "waits: value"),
    Fault("nonzero in a block", _attention(lambda x: x.nonzero()), "waits: shape"),
    Fault("a mask as an index", _attention(lambda x: x[x > 0]), "waits: shape"),
    Fault("unique in a block", _attention(lambda x: torch.unique(x)), "waits: shape"),
    Fault("repeats that the device counts", _attention(_repeated), "waits: shape"),
    Fault("an index made on the CPU", _attention(lambda x: x[torch.tensor([0])]), "waits: upload"),
    Fault("a constant made on the CPU and moved", _attention(lambda x: torch.ones(3).to(x.device)), "waits: upload"),
    Fault("equal() in a block", _attention(lambda x: torch.equal(x, x)), "waits: value"),
    Fault("a kernel of the CPU", ((SDPACore, "forward", _kernel_of_the_cpu),), "NoKernel"),
    Fault("the average on the CPU", ((EMA, "__init__", _ema_on_the_host),), "WrongDevice: aten._foreach_lerp"),
    Fault("the norm read too early", ((NativeEngine, "_norm", _norm_on_the_host),), "waits: "),
    Fault("a basis left on the CPU", ((DCTAutoencoder, "_to_latents", _basis_on_the_host),), "WrongDevice: aten.mm"),
    Fault("offloaded activations in plain memory", ((Offload, "move", _not_pinned),), "waits: download", OFFLOAD),
    Fault(
        "segments left on the CPU",
        ((Segments, "of", lambda right: lambda samples, device: right(samples, "cpu")),),
        "waits: upload",
        PACKED,
    ),
    Fault("modulation by a CPU tensor", ((joint_blocks, "modulate", _scale_on_the_host),), "WrongDevice"),
]


def _no_wait(right: Any) -> Any:
    return lambda self: self._moving.clear()


def _transposed(right: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = right(self, *args, **kwargs)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return forward


# What only a GPU shows, see LIMITS of simulated.py: each passes here.
UNSEEN = [
    Fault("copies that nobody waits for", ((Offload, "settle", _no_wait),), "", OFFLOAD),
    Fault("strides that a kernel may refuse", ((SDPACore, "forward", _transposed),), ""),
]
