"""Tensor parallelism: every process holds some heads and some hidden units of every layer (Megatron, arXiv:1909.08053).

A model states in ``tensor_plan`` how each linear layer is cut:

* ``column``: by outputs; the input is the same everywhere, its gradient is summed. One exchange, in backward, for all
  layers of a block that read the same input (``shared_inputs.py``).
* ``row``: by inputs, which the process already holds; outputs are summed, then the bias is added. One, in forward.
* ``gather``: by outputs, which are then joined: for layers outside the stream of tokens, whose weights are large.

and which root-mean-square norms run over the channels of all heads, as those of queries and keys in some models:

* ``norm``: cut as the heads are. The squares of a token are summed over all processes, and in backward what depends on
  them is: one number per token in either direction.

A fused layer is a row of parts (q, k, v, hidden units, ...): each is cut by itself. What is not in the plan is held and
computed by all alike, so its gradient is the same everywhere; only weights that all hold but use for their own heads
(``tensor_shared``: the norms of queries and keys) have partial gradients, which are summed once per step.

An adapter (``lora.py``) is cut with its layer: B by outputs as the weight is, part by part, or A by inputs. The other
matrix is held by all, each of whom uses it for its own outputs or inputs: one more partial gradient, and no exchange
beside those of the layer.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acceleration import lora, protocol
from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis
from acceleration.sharding.shared_inputs import SharedInputs

CUTS, SHARED = "tensor_cuts", "tensor_shared_names"  # attributes of a model that was cut


@dataclass(frozen=True)
class Cut:
    """Which slices of a full parameter this process holds, one after the other along ``dim``."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]  # of the full parameter
    parts: tuple[int, ...]  # sizes along dim that are cut each by itself

    def take(self, full: Tensor) -> Tensor:
        """This process's part."""
        return torch.cat([full.narrow(self.dim, start, stop - start) for start, stop in self.ranges], self.dim)

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The full parameter from the parts of all processes, in rank order."""
        sizes = [size // len(pieces) for size in self.parts]
        by_part = zip(*(piece.split(sizes, self.dim) for piece in pieces), strict=True)
        return torch.cat([part for parts in by_part for part in parts], self.dim)


def check(model: nn.Module, degree: int) -> None:
    """That everything in the plan can be cut. Works on the meta device.

    Raises:
        ValueError: a layer whose parts ``degree`` does not divide.
    """
    for name, _, parts in _planned(model):
        for size, unit in parts:
            if (size // unit) % degree:
                what = "heads" if unit > 1 else "hidden units"
                raise ValueError(f"tensor={degree}: does not divide the {size // unit} {what} of {name}")


def apply(model: nn.Module, axis: Axis) -> None:
    """Cut the model's layers in place. The model must be on the meta device: values come afterwards."""
    cuts: dict[str, Cut] = {}
    shared: list[str] = []
    if axis.degree > 1:
        check(model, axis.degree)
        cuts, shared = _cut(model, axis)
        patterns: tuple[str, ...] = model.tensor_shared  # type: ignore[assignment]
        shared += [n for n, _ in model.named_parameters() if any(protocol.matches(n, p) for p in patterns)]
    setattr(model, CUTS, cuts)
    setattr(model, SHARED, frozenset(shared))


def _cut(model: nn.Module, axis: Axis) -> tuple[dict[str, Cut], list[str]]:
    """(what this process holds of everything in the plan, the parts of adapters that all hold)."""
    cuts: dict[str, Cut] = {}
    shared: list[str] = []
    block, inputs = protocol.block_numbers(model), defaultdict[int | None, SharedInputs](lambda: SharedInputs(axis))
    for name, kind, parts in list(_planned(model)):
        module = model.get_submodule(name)
        sizes = tuple(size for size, _ in parts)
        if kind == "norm":
            found = _cut_norm(module, sizes, axis)
        else:
            found = _cut_linear(module, kind, sizes, axis, inputs[block.get(id(module))])
        cuts |= {f"{name}.{key}": cut for key, cut in found.items()}
        if isinstance(module, lora.LoraLinear):
            shared.append(f"{name}.{lora.B if kind == 'row' else lora.A}")
    return cuts, shared


def cuts(model: nn.Module) -> dict[str, Cut]:
    """Parameter name -> what this process holds of it; empty for a model that was not cut."""
    return getattr(model, CUTS, {})


def sum_shared_gradients(model: nn.Module, axis: Axis, device_type: str) -> None:
    """Make the gradients of weights that all hold, but use for their own heads, those of all heads.

    They are exchanged on a device of this type, wherever they are.
    """
    names: frozenset[str] = getattr(model, SHARED, frozenset())
    gradients = [_local(p.grad) for name, p in model.named_parameters() if name in names and p.grad is not None]
    if axis.degree == 1 or not gradients:
        return
    flat = collectives.all_reduce_(torch.cat([g.flatten() for g in gradients]).to(device_type), axis)
    for gradient, values in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


def full(name: str, value: Tensor, model: nn.Module, axis: Axis) -> Tensor:
    """The whole parameter from what this process holds of it along the axis. Collective."""
    cut = cuts(model).get(name)
    if cut is None:
        return value
    stacked = collectives.all_gather(value[None], 0, [1] * axis.degree, axis)
    return cut.join(list(stacked.unbind(0)))


def planned_kinds(model: nn.Module) -> dict[str, str]:
    """Name of every layer and norm that tensor parallelism cuts -> how."""
    return {name: kind for name, kind, _ in _planned(model)}


def _planned(model: nn.Module) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
    """(name, kind, parts) for everything in the model's plan; a layer without parts is one part."""
    for pattern, (kind, parts) in model.tensor_plan().items():  # type: ignore[operator]
        wanted = protocol.RMSNorm if kind == "norm" else nn.Linear
        for name, module in list(model.named_modules()):
            if isinstance(module, wanted) and protocol.matches(name, pattern):
                yield name, kind, parts or ((module.out_features, 1),)  # type: ignore[union-attr]


def _cut_norm(norm: nn.Module, parts: tuple[int, ...], axis: Axis) -> dict[str, Cut]:
    assert isinstance(norm, protocol.RMSNorm), norm
    found = {}
    for key, gain in list(norm.named_parameters(recurse=False)):
        assert gain.shape == (sum(parts),), (gain.shape, parts)
        found[key] = Cut(0, _ranges(parts, axis), tuple(gain.shape), parts)
        setattr(norm, key, _share_of(gain, found[key], axis.degree))
    norm.forward = _Norm(norm, sum(parts), axis)
    return found


def _cut_linear(
    linear: nn.Module, kind: str, parts: tuple[int, ...], axis: Axis, inputs: SharedInputs
) -> dict[str, Cut]:
    assert isinstance(linear, nn.Linear), linear
    dim = 1 if kind == "row" else 0
    size = linear.weight.shape[dim]
    assert sum(parts) == size, (parts, size)
    ranges = _ranges(parts, axis)
    found = {"weight": Cut(dim, ranges, tuple(linear.weight.shape), parts)}
    if linear.bias is not None and kind != "row":
        found["bias"] = Cut(0, ranges, tuple(linear.bias.shape), parts)
    if isinstance(linear, lora.LoraLinear):
        key = lora.A if kind == "row" else lora.B
        found[key] = Cut(dim, ranges, tuple(linear.get_parameter(key).shape), parts)
    for key, cut in found.items():
        _shrink(linear, key, cut, axis.degree)
    # The forward is replaced, not the module wrapped: parameter names stay what checkpoints say.
    linear.forward = FORWARDS[kind](linear, parts, axis, inputs)  # type: ignore[method-assign, assignment]
    return found


def _shrink(linear: nn.Linear, key: str, cut: Cut, degree: int) -> None:
    """Put a parameter of this process's size in the place of the full one."""
    owner, _, attribute = key.rpartition(".")
    layer = linear.get_submodule(owner)
    assert isinstance(layer, nn.Linear)
    new = _share_of(layer.get_parameter(attribute), cut, degree)
    setattr(layer, attribute, new)
    if attribute == "weight":
        layer.out_features, layer.in_features = new.shape


def _share_of(full: nn.Parameter, cut: Cut, degree: int) -> nn.Parameter:
    """Without a value."""
    shape = list(cut.shape)
    shape[cut.dim] //= degree
    return nn.Parameter(torch.empty(shape, dtype=full.dtype, device="meta"), requires_grad=full.requires_grad)


def _ranges(parts: tuple[int, ...], axis: Axis) -> tuple[tuple[int, int], ...]:
    ranges, start = [], 0
    for size in parts:
        share = size // axis.degree
        ranges.append((start + axis.rank * share, start + (axis.rank + 1) * share))
        start += size
    return tuple(ranges)


@dataclass(frozen=True)
class _CutLinear:
    linear: nn.Linear
    parts: tuple[int, ...]
    axis: Axis
    inputs: SharedInputs  # of the layer's block

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Column(_CutLinear):
    def __call__(self, x: Tensor) -> Tensor:
        return lora.linear(self.linear, self.inputs(x), self.linear.bias)


class _Row(_CutLinear):
    def __call__(self, x: Tensor) -> Tensor:
        summed = collectives.sum_shares(lora.linear(self.linear, x, None), self.axis)
        return summed if self.linear.bias is None else summed + self.linear.bias


class _Gather(_CutLinear):
    def __call__(self, x: Tensor) -> Tensor:
        out = lora.linear(self.linear, self.inputs(x), self.linear.bias)
        degree = self.axis.degree
        joined = collectives.join(out, [out.shape[-1]] * degree, self.axis)  # (..., rank x parts)
        sizes = [size // degree for size in self.parts]
        by_rank = [piece.split(sizes, dim=-1) for piece in joined.chunk(degree, dim=-1)]
        return torch.cat([part for parts in zip(*by_rank, strict=True) for part in parts], dim=-1)


@dataclass(frozen=True)
class _Norm:
    """The root mean square is over ``channels`` channels, of which this process holds those of its heads."""

    norm: protocol.RMSNorm
    channels: int
    axis: Axis

    @torch.compiler.disable  # see compile.py
    def __call__(self, x: Tensor) -> Tensor:
        """(..., channels here), in the type of ``x``; computed in fp32 at least."""
        return _AllHeadsRMSNorm.apply(x, self.norm.gain, self.norm.eps, self.channels, self.axis)


class _AllHeadsRMSNorm(torch.autograd.Function):
    """y = g x / r with r = sqrt(S / C + eps), S the sum of squares over the C channels of all processes.

    dL/dx = (g dy - x / r^2 * sum(x g dy) / C) / r, where the sum is over all processes, too. Kept are x and 1/r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, channels: int, axis: Axis) -> Tensor:
        exact = x.to(_exact(x))
        squares = collectives.all_reduce_(exact.square().sum(dim=-1, keepdim=True), axis)
        inverse = (squares / channels + eps).rsqrt()
        ctx.save_for_backward(x, gain, inverse)
        ctx.channels, ctx.axis = channels, axis
        return (exact * inverse * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, gain, inverse = ctx.saved_tensors
        normed, grad = x.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
        of_x = of_gain = None
        if ctx.needs_input_grad[0]:
            scaled = grad * gain
            shared = collectives.all_reduce_((normed * scaled).sum(dim=-1, keepdim=True), ctx.axis)
            of_x = ((scaled - normed * (shared / ctx.channels)) * inverse).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_gain = (grad * normed).flatten(0, -2).sum(dim=0).to(gain.dtype)
        return of_x, of_gain, None, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


FORWARDS: dict[str, type[_CutLinear]] = {"column": _Column, "row": _Row, "gather": _Gather}


def _local(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x
