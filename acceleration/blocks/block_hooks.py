"""Where a block begins and ends in backward, seen from outside, as FSDP2 does it: on its outputs and its inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def on_backward_begin(out: Any, note: Callable[[], None]) -> bool:
    """Call ``note`` when a gradient of an output is there, once for each of them; whether there will be any."""
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    for x in outputs:
        x.register_hook(lambda _: note())
    return bool(outputs)


def on_backward_end(args: tuple[Any, ...], note: Callable[[], None]) -> tuple[Any, ...]:
    """The inputs of a block, for it to run on; ``note`` is called when all their gradients are there, if any will be.

    All go through one node, so that no backward of a block above is left when that of a block below begins.
    """
    flat, spec = tree_flatten(args)
    trains = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
    through = _Bottom.apply(note, *(flat[i] for i in trains))
    for i, x in zip(trains, through or (), strict=True):
        flat[i] = x
    return tree_unflatten(flat, spec)


class _Bottom(torch.autograd.Function):
    """The inputs of a block as they are; says when all their gradients are there."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.note()
        return None, *gradients
