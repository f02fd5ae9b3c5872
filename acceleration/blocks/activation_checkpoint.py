"""Gradient checkpointing: a recomputed block keeps its inputs only and runs again in backward.

=========  ============================================================================
kind       what runs again in backward
=========  ============================================================================
none       nothing
full       every block
first      the first ``blocks`` blocks, in the order in which they run, over all block lists
every      one block of every ``every``, the first of them, counted the same way
selective  every block but for attention, whose output and log-sum-exp are kept
=========  ============================================================================

With ``offload`` what recomputed blocks keep (inputs, attention) waits on the CPU.

For ``selective`` the attention functions themselves hand over what they computed (``kept``). A policy over operators,
as of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``, would keep every hop of a ring apart and
transfer keys and values again, and would recompute an operator that is missing from its list without a word. Queries,
keys and values do run again, since their gradients need them; with Ulysses so does their exchange.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from acceleration import protocol
from acceleration.blocks.activation_offload import Offload, Parcel
from acceleration.config import RecomputeConfig


def apply(model: nn.Module, cfg: RecomputeConfig) -> None:
    """Make the chosen blocks run again in backward, in place. Kind ``selective`` needs slots that use ``kept``."""
    blocks = protocol.blocks(model)
    offload = Offload() if cfg.offload else None
    for index in chosen(cfg, len(blocks)):
        # The forward is replaced, not the module wrapped: parameter names stay what checkpoints say.
        block = blocks[index]
        block.forward = _Recomputed(block.forward, cfg.kind == "selective", offload)


def chosen(cfg: RecomputeConfig, count: int) -> range:
    """Which of ``count`` blocks run again."""
    if cfg.kind == "first":
        return range(min(cfg.blocks, count))
    return range(0, 0 if cfg.kind == "none" else count, cfg.every if cfg.kind == "every" else 1)


def kept(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``compute()``, or what it gave the first time where a block of kind ``selective`` runs again.

    For the inside of an ``autograd.Function``, where tensors have no history. Calls within a block keep their order.
    """
    run = _RUN.get()
    return compute() if run is None else run.result(compute)


class _Recomputed:
    """The forward of a block that runs again in backward."""

    def __init__(self, forward: Callable[..., Any], selective: bool, offload: Offload | None) -> None:
        self._forward, self._selective, self._offload = forward, selective, offload

    def __call__(self, *args: Any) -> Any:
        if self._offload is None or not torch.is_grad_enabled():
            return self._checkpoint(None, args)
        parcel = self._offload.parcel(args)
        # These hooks see the inputs, which checkpoint saves first; what the block saves is hidden from them.
        with saved_tensors_hooks(parcel.pack, parcel.unpack):
            return self._checkpoint(parcel, args)

    def _checkpoint(self, parcel: Parcel | None, args: tuple[Any, ...]) -> Any:
        contexts = functools.partial(_runs, parcel) if self._selective else noop_context_fn
        # No generator state is saved: blocks draw no random numbers.
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _Run:
    """One run of a block; what attention computed in the first is taken from it in the second."""

    def __init__(self, results: list[list[Any]], parcel: Parcel | None, *, first: bool) -> None:
        self._results, self._parcel, self._first = results, parcel, first

    def __enter__(self) -> None:
        self._position = 0  # a retained graph runs the block in every backward
        self._token: Token[_Run | None] = _RUN.set(self)

    def __exit__(self, *error: object) -> None:
        _RUN.reset(self._token)

    def result(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """See ``kept``."""
        pack, unpack = (self._parcel.pack, self._parcel.unpack) if self._parcel else (Tensor.detach, Tensor.detach)
        if self._first:
            computed = compute()
            # Without its history, which would lead back to this list.
            self._results.append([pack(x) for x in computed])
            return computed
        self._position += 1
        return tuple(unpack(x) for x in self._results[self._position - 1])


# A value per thread: on CUDA backward runs in threads of its own.
_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)


def _runs(parcel: Parcel | None) -> tuple[_Run, _Run]:
    """The first run of a block, and those after it."""
    results: list[list[Any]] = []
    return _Run(results, parcel, first=True), _Run(results, parcel, first=False)
