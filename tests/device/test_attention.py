"""Attention by torch on the simulated device: each type, width and mask, against fp64 on the CPU."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opensora.utils.rng import torch_generator
from tests.device.simulated import CUDA, simulated_cuda
from tests.dist.harness import run_distributed

CPU = torch.device("cpu")
# What a result may be off by, where queries, keys and values are about 1: rounding of the result and of what the
# gradients are made of, several times the last place of the type.
NEAR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}
# Fused kernels read 16 bytes at a time, and no fp64: the rest goes by the formula.
SHAPES = [(torch.float64, 16), (torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 7), (torch.bfloat16, 7)]
MASKS: dict[str, Tensor | None] = {
    "no mask": None,
    "keys": torch.tensor([[True] * 3 + [False] * 3, [False] + [True] * 5])[:, None, None],  # (2, 1, 1, 6)
    "queries and keys": torch.ones(5, 6).tril(1).bool(),
    "bias": torch.zeros(5, 6).index_fill_(1, torch.tensor([2, 4]), -math.inf) + torch.arange(6.0) / 4,
}


def attended(dtype: torch.dtype, width: int, mask: Tensor | None, *, fp64: bool, device: torch.device) -> list[Tensor]:
    """The output, and the gradients of q, k and v, of what is drawn in ``dtype``; on the CPU, in fp64."""
    generator, computed = torch_generator("attention"), torch.float64 if fp64 else dtype
    drawn = [torch.randn(2, 3, length, width, generator=generator).to(dtype) for length in (5, 6, 6, 5)]
    *qkv, grad = (x.to(computed).to(device) for x in drawn)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.to(computed)).to(device)
    leaves = [x.requires_grad_() for x in qkv]
    out = scaled_dot_product_attention(*leaves, attn_mask=mask)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    return [x.detach().cpu().double() for x in found]


def differences(names: list[str]) -> dict[str, float]:
    """Mask -> the largest difference, over all types and widths, in units of what the type allows."""
    with simulated_cuda():  # before the CPU's: torch counts devices once
        ours = {name: [attended(*shape, MASKS[name], fp64=False, device=CUDA) for shape in SHAPES] for name in names}
    return {name: max(map(_apart, ours[name], SHAPES, [MASKS[name]] * len(SHAPES))) for name in names}


def _apart(ours: list[Tensor], shape: tuple[torch.dtype, int], mask: Tensor | None) -> float:
    truth = attended(*shape, mask, fp64=True, device=CPU)
    largest = torch.stack([(a - b).abs().max() for a, b in zip(ours, truth, strict=True)]).max().item()
    return largest / NEAR[shape[0]] if math.isfinite(largest) else math.inf


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    (every,) = run_distributed(differences, 1, list(MASKS), timeout=60)
    return dict(every)


@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_that_of_the_cpu(found: dict[str, float], mask: str) -> None:
    assert found[mask] < 1
