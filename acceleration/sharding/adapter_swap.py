"""Adapters in turn: those of one file after those of another are merged into the weights of a model that samples.

The layers stay plain. Their weights without adapters are kept in CPU memory from the first change on, so that what a
turn leaves behind is what was there before it, to the bit. What a turn makes of them are the bits of a model that was
built with these adapters and had them merged (``fsdp.merge_adapters``): the same product, of the same parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from acceleration.lora import A, B
from acceleration.protocol import ParameterSource
from acceleration.sharding import fsdp, tensor_parallel
from acceleration.sharding.tensor_parallel import Cut


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """Adapters of one file."""

    sizes: Mapping[str, tuple[int, float]]  # layer -> (rank, what B A is multiplied by), as ``lora.attach`` takes them
    values: ParameterSource  # of ``layer.lora_A.weight`` and ``layer.lora_B.weight``
    scale: float = 1.0  # of all of them
    differences: Mapping[str, Tensor] = field(default_factory=dict)  # parameter -> what is added to the whole of it


@dataclass
class AdapterSwap:
    """Which adapters the weights of one model contain."""

    model: nn.Module
    device: torch.device  # where products are computed, as in a model that is built with adapters
    now: str | None = None
    _before: dict[str, Tensor] = field(default_factory=dict)  # by parameter: this process's part of it, on the CPU
    _changed: list[str] = field(default_factory=list)

    @torch.no_grad()
    def use(self, name: str | None, file: AdapterFile | None) -> None:
        """The weights contain these adapters, and no others, afterwards. ``None``: none. No exchange."""
        if name == self.now:
            return
        fsdp.release(self.model)  # what was gathered for a forward is of the adapters before
        for changed in self._changed:
            fsdp.local(self.model.get_parameter(changed)).copy_(self._before[changed])
        self._changed, self.now = [], None
        if file is not None:
            for layer, (rank, scale) in file.sizes.items():
                self._merge(layer, rank, file.scale * scale, file.values)
            for one, value in file.differences.items():
                self._keep(one)
                cut = tensor_parallel.cuts(self.model).get(one)
                fsdp.add_part(self.model.get_parameter(one), value, file.scale, cut)
        self.now = name

    def _keep(self, name: str) -> None:
        """Remember a parameter's value, before its first change."""
        if name not in self._before:
            self._before[name] = fsdp.local(self.model.get_parameter(name)).to("cpu", copy=True)
        self._changed.append(name)

    def _merge(self, layer: str, rank: int, scale: float, values: ParameterSource) -> None:
        name = f"{layer}.weight"
        parameter, cut = self.model.get_parameter(name), tensor_parallel.cuts(self.model).get(name)
        held = fsdp.local(parameter)
        rows, columns = cut.shape if cut else parameter.shape
        up, down = (torch.empty(shape, dtype=held.dtype) for shape in ((rows, rank), (rank, columns)))
        values(f"{layer}.{A}", down)
        values(f"{layer}.{B}", up)
        self._keep(name)
        if held.numel():
            up, down = (part.to(self.device) for part in _parts(parameter, cut, up, down))
            held.copy_(self._before[name].to(self.device, copy=True).addmm_(up, down, alpha=scale))


def _parts(parameter: Tensor, cut: Cut | None, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of B and the columns of A whose products are what this process holds of a weight."""
    found = fsdp.chunks(parameter, cut)
    if cut is not None and cut.dim == 1:
        (first, _), height = found[0][0], found[0][1].shape[0]
        return up[first : first + height], cut.take(down)
    return torch.cat([up[start : start + part.shape[0]] for (start, _), part in found]), down
