"""Normalisation of queries and keys."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, with a learned ``scale`` (named as in Flux files)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    @property
    def gain(self) -> Tensor:
        """What kernels for norms of any model ask for."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale.shape, self.scale, self.eps)


class QKNorm(nn.Module):
    """Per-head norms that bound the attention logits."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q_BLHD: Tensor, k_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q_BLHD), self.key_norm(k_BLHD)


class HeadRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of a head, with a learned ``weight`` (the name of Open-Sora 1.x)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    @property
    def gain(self) -> Tensor:
        """What kernels for norms of any model ask for."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class AllHeadsRMSNorm(HeadRMSNorm):
    """Root-mean-square norm over the channels of all heads at once, before they are split (Wan).

    Tensor parallelism, which leaves a process some of the heads, cuts ``weight`` as it cuts them and sums the squares
    of all: a model says so by the kind ``norm`` in its ``tensor_plan``.
    """


class ExactLayerNorm(nn.LayerNorm):
    """Layer norm with scale and shift in the type of what it reads, where that is more exact than its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def plain_norm(hidden: int) -> nn.LayerNorm:
    """Layer norm whose shift and scale come from a modulation."""
    return nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
