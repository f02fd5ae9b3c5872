"""Ring attention by itself and around Ulysses: output, gradients and bytes, for any lengths, heads and masks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.attention import core as attention
from acceleration.attention.kernels import KERNELS
from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import RingAttention, SequenceParallel, UlyssesAttention
from tests.dist.harness import run_distributed
from tests.dist.toy import Core

BATCH, HEADS, DIM = 2, 3, 6


def qkv(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(3, BATCH, tokens, HEADS, DIM, generator=generator, dtype=torch.float64)


def mask_of(tokens: int) -> Tensor:
    """The second sample sees nothing of the first third, where a whole part of the ring may lie."""
    mask = torch.rand(BATCH, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1, : tokens // 3] = False
    mask[:, -1] = True
    return mask


def truth(tokens: int, masked: bool) -> tuple[Tensor, Tensor]:
    whole = qkv(tokens).requires_grad_()
    out = Core()(*whole, key_mask=mask_of(tokens) if masked else None)
    (out**3).sum().backward()
    assert whole.grad is not None
    return out.detach(), whole.grad


def attend(cfg: MeshConfig, tokens: int, masked: bool, kernel: str) -> tuple[Tensor, Tensor, int]:
    """Output and gradient of q, k, v for the whole sequence, and what this process sent over the ring in forward."""
    mesh = meshes.build(cfg, dist.get_world_size(), torch.device("cpu"))
    ring, ulysses, sequence = mesh["ring"], mesh["ulysses"], SequenceParallel(mesh)
    core: Any = RingAttention(KERNELS[kernel], ring, ulysses.degree)
    if ulysses.degree > 1:
        core = UlyssesAttention(core, ulysses, ring.rank)
    local = sequence.shard(qkv(tokens), dim=2).requires_grad_()
    mask = sequence.shard(mask_of(tokens)) if masked else None
    out = core(*local, key_mask=mask, context=sequence.context(0, tokens))
    sent = ring.bytes_sent
    (out**3).sum().backward()
    assert local.grad is not None
    return sequence.gather(out.detach(), tokens), sequence.gather(local.grad, tokens, dim=2), sent


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("mesh", "tokens", "kernel"),
    [
        ({"ring": 2}, 9, "cpu"),
        ({"ring": 3}, 7, "math"),
        ({"ring": 4}, 3, "cpu"),  # the last process holds nothing
        ({"ring": 2, "ulysses": 2}, 11, "cpu"),  # three heads over two processes
    ],
)
def test_equals_one_process(mesh: dict[str, int], tokens: int, kernel: str, masked: bool) -> None:
    world = mesh["ring"] * mesh.get("ulysses", 1)
    out, gradient = truth(tokens, masked)
    for found, found_gradient, _ in run_distributed(attend, world, MeshConfig(**mesh), tokens, masked, kernel):
        assert torch.allclose(found, out, atol=1e-12, rtol=0)
        assert torch.allclose(found_gradient, gradient, atol=1e-11, rtol=0)


def test_bytes_are_those_of_the_formula() -> None:
    """Keys and values of every part but one: 2 * B * N * D * (p-1)/p."""
    tokens, world = 12, 3
    predicted = 2 * BATCH * tokens * HEADS * DIM * 8 * (world - 1) // world
    for _, _, sent in run_distributed(attend, world, MeshConfig(ring=world), tokens, False, "cpu"):
        assert sent == predicted


@pytest.mark.parametrize("kernel", ["math", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_equal_torch(kernel: str, masked: bool) -> None:
    out, gradient = truth(10, masked)
    whole = qkv(10).requires_grad_()
    found = attention.attend(KERNELS[kernel], *whole, mask_of(10) if masked else None)
    (found**3).sum().backward()
    assert torch.allclose(found, out, atol=1e-12, rtol=0)
    assert whole.grad is not None and torch.allclose(whole.grad, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["math", "cpu"])
def test_a_sample_without_a_key_gets_zeros(kernel: str) -> None:
    whole = qkv(5).requires_grad_()
    mask = torch.ones(BATCH, 5, dtype=torch.bool)
    mask[1] = False
    out = attention.attend(KERNELS[kernel], *whole, mask)
    (out**3).sum().backward()
    assert whole.grad is not None
    assert not out[1].any() and not whole.grad[:, 1].any() and whole.grad[:, 0].abs().min() > 0
    _, lse = attention.forward(KERNELS[kernel], *whole.detach(), mask)
    assert (lse[1] == -torch.inf).all() and torch.isfinite(lse[0]).all()


def test_merging_with_nothing_changes_nothing() -> None:
    q, k, v = qkv(6)
    out, lse = attention.forward(KERNELS["cpu"], q, k, v, None)
    nothing = attention.forward(KERNELS["cpu"], q, k[:, :0], v[:, :0], None)
    for parts in ((out, lse, *nothing), (*nothing, out, lse)):
        merged, whole = attention.merge(*parts)
        assert torch.equal(merged, out) and torch.equal(whole, lse)
    empty, still_nothing = attention.merge(*nothing, *nothing)
    assert not empty.any() and (still_nothing == -torch.inf).all()
