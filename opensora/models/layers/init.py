"""First values of parameters, drawn on the CPU in fp32, so that devices and types agree."""

import math
from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import Tensor


def xavier_(tensor: Tensor, generator: torch.Generator) -> None:
    """Uniform with variance 2 / (inputs + outputs)."""
    bound = math.sqrt(6.0 / (tensor.shape[0] + tensor[0].numel()))
    tensor.copy_(
        torch.empty(tensor.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    )


def unit_(tensor: Tensor, generator: torch.Generator) -> None:
    """Uniform with variance 1 / inputs: Xavier's for square matrices and, unlike Xavier's, the same whether projections
    are fused or not."""
    bound = math.sqrt(3.0 / tensor.shape[1])
    draw = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    tensor.copy_(draw.uniform_(-bound, bound, generator=generator))


def normal_(tensor: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Normal around zero."""
    draw = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    tensor.copy_(draw.normal_(0.0, deviation, generator=generator))


def init_like_dit_(
    name: str, tensor: Tensor, generator: torch.Generator, *, zero: Collection[str], narrow: Collection[str]
) -> None:
    """Fill one parameter as DiT, PixArt and Open-Sora 1.x do, but for what is special to each.

    Tables of modulations and the null text are normal with variance 1 / width, norms of queries and keys one, biases
    zero, matrices Xavier-uniform.

    Args:
        zero: patterns of what starts at zero.
        narrow: patterns of weights that are normal with a deviation of 0.02.
    """
    if name.endswith(("scale_shift_table", "scale_shift_table_temporal", "y_embedding")):
        normal_(tensor, tensor.shape[-1] ** -0.5, generator)
    elif name.endswith(("_norm.weight", ".norm.weight")):
        tensor.fill_(1.0)
    elif name.endswith(".bias") or any(fnmatchcase(name, pattern) for pattern in zero):
        tensor.zero_()
    elif any(fnmatchcase(name, pattern) for pattern in narrow):
        normal_(tensor, 0.02, generator)
    else:
        xavier_(tensor, generator)
