"""ZeRO 0 to 3 and hybrid sharding on FSDP2.

One copy of the model is cut over shard x cfg x ring x ulysses processes and repeated over replicate; where tensor
parallelism has cut the layers before, P is the part of one place on that axis. Each stage keeps, per process
with n processes to a copy and P parameters:

=====  =============  ================================  =============================================
stage  between steps  gradients, while a step runs      parameters in compute type, while a step runs
=====  =============  ================================  =============================================
0      P              P, reduced once per step          P
1      P/n            P until reduced once, then P/n    P, gathered once per step
2      P/n            P/n, reduced every micro-batch    P, gathered once per micro-batch, then freed
3      P/n            P/n, reduced every micro-batch    blocks in use, for forward and again for backward
=====  =============  ================================  =============================================

Between steps means masters, optimizer and average; gradients are cleared. What waits for the last micro-batch waits in
the type of the reduction. Blocks in use are the one that runs, the one gathered ahead, and in backward the gradients of
one before and after reduction: at most four blocks of masters, as tests/dist/test_memory.py counts. Sampling knows no
backward that would free: below stage 3 the gathered copy stays until ``release``.

Gradients are summed, never averaged: the loss handed to backward is this process's share of the global mean.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from acceleration import protocol
from acceleration.config import PrecisionConfig
from acceleration.distributed.collectives import count_all_reduce, nbytes
from acceleration.distributed.comm_timer import WAITING
from acceleration.distributed.mesh import FSDP, REPLICATE, Axis, Mesh, sharding_mesh
from acceleration.lora import LoraLinear, is_adapter
from acceleration.protocol import ParameterSource, PartialSource
from acceleration.sharding import tensor_parallel
from acceleration.sharding.precision import DTYPES, fsdp_policy
from acceleration.sharding.tensor_parallel import Cut


def shard(
    model: nn.Module,
    zero: int,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    offload: bool = False,
    prefetch: int = 0,
    only_trained: bool = False,
) -> None:
    """Shard every block, then what is left, in place. The model may be on the meta device.

    Args:
        only_trained: what is frozen stays whole on every process.
        offload: pieces of weights and gradients stay in CPU memory; what is gathered is on the mesh's device.
        prefetch: blocks gathered ahead of their use, see ``_prefetch``.
    """
    pieces, policy = sharding_mesh(mesh, zero), fsdp_policy(precision)
    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    whole = {p for p in model.parameters() if not p.requires_grad} if only_trained else None
    for part in (*protocol.blocks(model), model):
        fully_shard(
            part,
            mesh=pieces,
            mp_policy=policy,
            reshard_after_forward=zero == 3,
            offload_policy=where,
            ignored_params=whole,
        )
    copies = mesh[REPLICATE]
    for module in fsdp_modules(model):
        module.set_custom_all_gather(_AllGather(mesh[FSDP]))  # type: ignore[arg-type]
        module.set_custom_reduce_scatter(_ReduceScatter(mesh[FSDP]))  # type: ignore[arg-type]
        if copies.degree > 1:
            module.set_all_reduce_hook(lambda reduced: count_all_reduce(reduced, copies))
        # Sum, don't average; the order matters, since gloo has no scaled sum.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        module.frees_weights = zero == 3  # type: ignore[attr-defined]
    if prefetch:
        _prefetch(model, prefetch)


def _prefetch(model: nn.Module, ahead: int) -> None:
    """Gather every block ``ahead`` blocks before it runs: more memory, and more time for the exchange to hide in.

    Blocks are taken to run in the order of their lists; in another order the result is the same, and time is lost.
    """
    forward: list[Any] = protocol.blocks(model)
    backward = forward[::-1]
    root: Any = model  # runs first in both directions: it is left when its last block is done, and comes back first
    for index, part in enumerate((root, *forward)):
        part.set_modules_to_forward_prefetch(forward[index : index + ahead])
    for index, part in enumerate((root, *backward)):
        part.set_modules_to_backward_prefetch(backward[index : index + ahead])


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module that FSDP2 manages on its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def begin_backward(model: nn.Module, zero: int, *, last_microbatch: bool) -> None:
    """Set what the coming backward reduces and frees, by the table above."""
    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(last_microbatch)
    model.set_requires_gradient_sync(last_microbatch or zero >= 2)
    model.set_requires_all_reduce(last_microbatch)  # between copies: once per step at every stage
    model.set_reshard_after_backward(last_microbatch or zero >= 2)


# Renamed after torch 2.11.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class _Buffers:
    """How FSDP2 gets the memory of an exchange."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Buffers):
    """FSDP2's own all-gather, counted."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.axis.bytes_sent += nbytes(input_tensor) * (self.axis.degree - 1)
        with WAITING.on(f"all_gather of weights over {self.axis.name}"):
            return getattr(dist, ALL_GATHER)(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Buffers):
    """FSDP2's own reduce-scatter, counted."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.axis.bytes_sent += nbytes(output_tensor) * (self.axis.degree - 1)
        with WAITING.on(f"reduce_scatter of gradients over {self.axis.name}"):
            return getattr(dist, REDUCE_SCATTER)(output_tensor, input_tensor, group=group, op=op, async_op=async_op)


def materialize(
    model: nn.Module,
    precision: PrecisionConfig,
    device: torch.device,
    fill: ParameterSource,
    on_host: Callable[[nn.Module], Sequence[Tensor]] = lambda model: (),
) -> None:
    """Allocate a meta model on ``device``, what ``on_host`` names of it in (pinned) CPU memory, and give every
    parameter its value.

    ``fill(name, tensor)`` writes the full value of one parameter into a CPU tensor of the type it is kept in; every
    process keeps its piece. A ``PartialSource`` is asked for the piece alone. No process ever holds more than its
    pieces and one full parameter, or one piece, and values do not depend on the layout. What is frozen beside adapters
    needs no master: kept in the compute type it takes less memory, and the numbers that blocks compute with are the
    same. Without adapters it is saved and exported, and keeps its digits.
    """
    master, compute = DTYPES[precision.master], DTYPES[precision.compute]
    still = compute if any(is_adapter(name) for name, _ in model.named_parameters()) else master
    model._apply(lambda x: x.to(master if x.requires_grad else still))  # as model.to, which knows one type only
    pinned, elsewhere = device.type == "cuda", set(map(id, on_host(model)))
    model._apply(
        lambda x: (
            torch.empty_like(x, device="cpu", pin_memory=pinned)
            if id(x) in elsewhere
            else torch.empty_like(x, device=device)
        )
    )
    with torch.no_grad():
        cuts = tensor_parallel.cuts(model)
        for name, parameter in model.named_parameters():
            cut = cuts.get(name)
            parts = chunks(parameter, cut)
            if not parts or (
                isinstance(fill, PartialSource) and all(fill.read_part(name, start, part) for start, part in parts)
            ):
                continue
            whole = torch.empty(cut.shape if cut else parameter.shape, dtype=parameter.dtype)
            fill(name, whole)
            for start, part in parts:
                part.copy_(whole[tuple(slice(s, s + size) for s, size in zip(start, part.shape, strict=True))])


def chunks(held: Tensor, cut: Cut | None = None) -> list[tuple[tuple[int, ...], Tensor]]:
    """(start in the full parameter, view) of everything that this process holds of it; nothing if it holds nothing.

    Sharding cuts rows of what tensor parallelism (``cut``) has left, of which there may be several ranges.
    """
    mine, first_row = held, 0
    if isinstance(held, DTensor):
        mine = held.to_local()
        _, offsets = compute_local_shape_and_global_offset(held.shape, held.device_mesh, held.placements)
        first_row = offsets[0]
    if mine.numel() == 0:
        return []
    if cut is None:
        return [((first_row, *(0 for _ in mine.shape[1:])), mine)]
    last_row = first_row + mine.shape[0]
    found: list[tuple[tuple[int, ...], Tensor]] = []
    position = 0  # along cut.dim, in what tensor parallelism left
    for start, stop in cut.ranges:
        width = stop - start
        if cut.dim == 0:
            low, high = max(first_row, position), min(last_row, position + width)
            if low < high:
                offset = (start + low - position, *(0 for _ in mine.shape[1:]))
                found.append((offset, mine[low - first_row : high - first_row]))
        else:
            found.append(((first_row, start), mine[:, position : position + width]))
        position += width
    return found


def local(x: Tensor) -> Tensor:
    """The plain tensor this process holds of ``x``."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """The whole value of ``x`` on every process; collective if ``x`` is sharded, and then on the mesh's device."""
    if not isinstance(x, DTensor):
        return x
    with WAITING.on("joining of a sharded tensor"):
        return (x if x.device.type == x.device_mesh.device_type else to_mesh_device(x)).full_tensor()


def to_mesh_device(x: DTensor) -> DTensor:
    """``x`` where its mesh exchanges tensors: nccl does not reach into CPU memory.

    Not by ``x.to``, which has no rule of its own for what a norm leaves to be summed.
    """
    return DTensor.from_local(
        x.to_local(), x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def frees_weights(model: nn.Module) -> bool:
    """Whether processes gather a block's weights whenever it runs, and free them behind it (ZeRO 3)."""
    found: list[Any] = fsdp_modules(model)
    return any(module.frees_weights for module in found)


def gather(block: nn.Module) -> None:
    """Gather a block's weights as its forward would. Collective, unless they are whole."""
    if isinstance(block, FSDPModule):
        block.unshard()


def let_go(block: nn.Module) -> None:
    """Free what ``gather`` made, where the block's forward would free it."""
    if isinstance(block, FSDPModule) and block.frees_weights:
        block.reshard()


def release(model: nn.Module) -> None:
    """Free what was gathered for a forward pass that no backward pass follows."""
    for module in fsdp_modules(model):
        module.reshard()


def settle(model: nn.Module) -> None:
    """After a forward that an error ended: what was gathered is freed, what was asked for has come, and the next
    forward begins as the first one did. Whoever was in the middle of an exchange is not helped by this."""
    for module in fsdp_modules(model):
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # one of them before torch 2.13
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.wait_for_unshard()
                group._training_state = type(group._training_state).IDLE
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
    release(model)


@torch.no_grad()
def add_differences(model: nn.Module, values: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Parameters += scale * values, in place, rounded once; each process adds to what it holds. No exchange.

    Args:
        values: parameter -> what is added to the whole of it, the same on every process.
    """
    cuts = tensor_parallel.cuts(model)
    for name, parameter in model.named_parameters():
        if name in values:
            add_part(parameter, values[name], scale, cuts.get(name))


def add_part(parameter: Tensor, value: Tensor, scale: float, cut: Cut | None) -> None:
    """What this process holds of a parameter += scale * its part of a whole value."""
    for start, part in chunks(parameter, cut):
        own = value[tuple(slice(s, s + size) for s, size in zip(start, part.shape, strict=True))].to(part.device)
        exact = torch.promote_types(part.dtype, own.dtype)
        part.copy_(part.to(exact).add(own.to(exact), alpha=scale))


@torch.no_grad()
def merge_adapters(model: nn.Module, scale: float = 1.0) -> None:
    """W += scale * s * B A (see ``lora.py``), in place: afterwards the adapters cost no time. Collective.

    Sharding and tensor parallelism cut the rows of B as they cut those of W, and tensor parallelism the columns of A
    as those of W, so each process adds to what it holds; only the rows of A are gathered.
    """
    for module in model.modules():
        if isinstance(module, LoraLinear) and not module.merged:
            weight = local(module.weight)
            down = full(module.lora_A.weight).to(weight.device)
            weight.addmm_(local(module.lora_B.weight), down, alpha=scale * module.scale)
            module.merged = True
