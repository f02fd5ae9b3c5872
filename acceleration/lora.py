"""Low-rank adapters: a frozen layer W learns s * B A beside it, with A (rank, in) and B (out, rank) (arXiv:2106.09685).

The model is not touched: chosen linear layers are replaced, on the meta device and before anything else is applied. The
layer keeps the names of its own parameters (``layer.weight``), so weights of the base are read as ever, and gets
``layer.lora_A.weight`` and ``layer.lora_B.weight``, which are peft's names. Everything but the adapters is frozen:
gradients, optimizer state, averages and checkpoints are those of the adapters alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acceleration import protocol
from acceleration.config import LoraConfig
from acceleration.protocol import ParameterSource, PartialSource

A, B = "lora_A.weight", "lora_B.weight"  # parameters of an adapted layer, beside its own


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; on the meta device, as values come afterwards."""

    lora_A: nn.Linear
    lora_B: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device="meta", dtype=base.weight.dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device="meta", dtype=base.weight.dtype)
        self.scale = scale
        self.merged = False  # True: the weights contain the adapter, see sharding.merge_adapters

    def forward(self, x: Tensor) -> Tensor:
        return linear(self, x, self.bias)


def linear(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """What ``layer`` makes of ``x``, with its adapter if it has one, and ``bias`` instead of its own.

    Linear in weight and in adapter: where a layer is cut by inputs, the sum over its parts is the whole.
    """
    out = F.linear(x, layer.weight, bias)
    if not isinstance(layer, LoraLinear) or layer.merged:
        return out
    return out + layer.scale * layer.lora_B(layer.lora_A(x))


def apply(model: nn.Module, cfg: LoraConfig) -> list[str]:
    """Give every linear layer that ``cfg.targets`` names an adapter, and freeze all else. On the meta device.

    Returns:
        The layers' names, in the model's order.

    Raises:
        ValueError: a target that names no linear layer.
    """
    assert cfg.targets is not None, "the family's own are put in where configuration and model meet"
    found = {id(layer) for _, _, layer in protocol.slots(model, cfg.targets, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in found]
    attach(model, {name: (cfg.rank, cfg.scale) for name in names})
    return names


def attach(model: nn.Module, sizes: Mapping[str, tuple[int, float]]) -> None:
    """Give linear layers an adapter each, and freeze all else. On the meta device.

    Args:
        sizes: layer -> (rank, what B A is multiplied by).
    """
    model.requires_grad_(False)
    for name, (rank, scale) in sizes.items():
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear) and not isinstance(layer, LoraLinear), name
        setattr(model.get_submodule(parent), attribute, LoraLinear(layer, rank, scale))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is one of an adapter's."""
    return name.endswith((f".{A}", f".{B}"))


@torch.no_grad()
def init_parameter_(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill the full value of an adapter's parameter: A uniform within 1/sqrt(in), as in peft, and B zero.

    So the adapted model starts as the base. Drawn in fp32 on the CPU.
    """
    if name.endswith(B):
        tensor.zero_()
        return
    bound = 1 / math.sqrt(tensor.shape[1])
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


@dataclass(frozen=True)
class LoraSource:
    """A source of values (see ``sharding.materialize``): adapters from one, everything else from the other."""

    base: ParameterSource
    adapter: ParameterSource

    def __call__(self, name: str, tensor: Tensor) -> None:
        self._source(name)(name, tensor)

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """See ``PartialSource`` in acceleration/protocol.py."""
        source = self._source(name)
        return isinstance(source, PartialSource) and source.read_part(name, start, part)

    def _source(self, name: str) -> ParameterSource:
        return self.adapter if is_adapter(name) else self.base
