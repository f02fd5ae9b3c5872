"""Cut layers that read the same input exchange its gradient once; those that read different tensors once each.

That losses and gradients are those of one process, with adapters on some of q, k and v, recomputation, compiled blocks
and tokens that are cut, is shown in test_tensor_norms.py and test_jobs.py, beside bytes that equal the formula's. Here
they equal what is counted by hand.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import lora
from acceleration.accounting.activation_memory import spread
from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.exchange_count import step_exchanges
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.collectives import nbytes
from acceleration.sequence import SequenceParallel
from acceleration.sharding.shared_inputs import SharedInputs
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.models.wan import WanConfig
from opensora.planner.meta_model import denoiser_inputs, structure
from tests.dist.harness import run_distributed

HIDDEN, SAMPLES, TEXT, IMAGE, PICTURE = 96, 3, 13, 37, 9
BATCH = MicroBatch(samples=SAMPLES, txt=TEXT, img=IMAGE, picture=PICTURE)
RANKS = [2, 4]


def wan(depth: int) -> WanConfig:
    return WanConfig(
        in_channels=4, hidden_size=HIDDEN, num_heads=12, depth=depth, ffn_dim=144, text_dim=12, references="clip",
        image_dim=16,
    )  # fmt: skip


def mmdit(depth: int) -> MMDiTConfig:
    return MMDiTConfig(
        in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=HIDDEN, num_heads=12, axes_dim=(4, 2, 2), depth=1,
        depth_single_blocks=depth, fused_qkv=False,
    )  # fmt: skip


def sent(cfg: Any, degree: int, kind: str = "none", adapters: LoraConfig | None = None) -> int:
    """Bytes that a process sends along the axis in forward and backward, which are those of the formula."""
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=1, tensor=degree), recompute=RecomputeConfig(kind=kind))  # type: ignore[arg-type]
    mesh = meshes.view({"tensor": degree}, 1)
    with torch.device("meta"):
        model: nn.Module = build_model(cfg)
    if adapters:
        lora.apply(model, adapters)
    spread(model, parallel, mesh, "cpu")
    model(**denoiser_inputs(cfg, BATCH, SequenceParallel(mesh))).sum().backward()
    place, profile = RankLayout(meshes.view({"tensor": degree}, 1), parallel), structure(cfg, False, adapters)
    once = step_bytes(profile, place, [])
    assert mesh["tensor"].bytes_sent == step_bytes(profile, place, [BATCH])["tensor"] - once["tensor"]
    return mesh["tensor"].bytes_sent


def all_reduces(degree: int, *values: int, itemsize: int = 2) -> int:
    """Of so many values of a sample each, in bf16."""
    return sum(2 * (degree - 1) * SAMPLES * count * itemsize // degree for count in values)


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("degree", RANKS)
def test_a_block_of_wan(degree: int, kind: str) -> None:
    """Three sums in forward; in backward those of what q, k and v read, of what cross-attention's q reads, of the text,
    of the picture and of what the MLP reads. Beside them a number per token for every norm, either way."""
    forward = all_reduces(degree, *[IMAGE * HIDDEN] * 3)
    backward = all_reduces(degree, *[IMAGE * HIDDEN] * 3, TEXT * HIDDEN, PICTURE * HIDDEN)
    norms = all_reduces(degree, *[IMAGE] * 3, TEXT, PICTURE, itemsize=4)
    again = forward + norms if kind == "full" else 0
    assert sent(wan(5), degree, kind) - sent(wan(4), degree, kind) == forward + backward + 2 * norms + again


@pytest.mark.parametrize("degree", RANKS)
def test_a_single_block_of_an_mmdit_with_separate_projections(degree: int) -> None:
    """One sum in forward, and the modulation's parts are joined; one in backward for q, k and what is v and MLP, one
    for what the modulation reads."""
    tokens, joined = (TEXT + IMAGE) * HIDDEN, SAMPLES * 3 * HIDDEN * 2 // degree * (degree - 1)
    assert sent(mmdit(5), degree) - sent(mmdit(4), degree) == all_reduces(degree, tokens, tokens, HIDDEN) + joined


@pytest.mark.parametrize("layers", [("v",), ("q", "v"), ("q", "k", "v", "o")])
def test_adapters_on_some_layers(layers: tuple[str, ...]) -> None:
    """Frozen projections hand on the gradient of what they read, too; and nobody wants one of the text."""
    adapters = LoraConfig(rank=4, targets=tuple(f"blocks.*.self_attn.{layer}" for layer in layers))
    norms = all_reduces(2, *[IMAGE] * 3, TEXT, PICTURE, itemsize=4) + all_reduces(2, *[IMAGE] * 3, itemsize=4)
    expected = all_reduces(2, *[IMAGE * HIDDEN] * 6) + norms
    assert sent(wan(5), 2, adapters=adapters) - sent(wan(4), 2, adapters=adapters) == expected


def test_exchanges() -> None:
    place = RankLayout(meshes.view({"tensor": 2}), ParallelConfig(zero=0, mesh=MeshConfig(tensor=2)))
    five, four = (step_exchanges(structure(wan(depth)), place, [BATCH])["tensor"] for depth in (5, 4))
    assert five - four == 3 + 5 + 2 * 5


def of_different_tensors() -> tuple[Tensor, Tensor, int]:
    """(the gradient here, what it must be, all-reduces)."""
    axis = meshes.build(MeshConfig(shard=1, tensor=2), 2, torch.device("cpu"))["tensor"]
    shared, start = SharedInputs(axis), torch.ones(3, dtype=torch.float64, requires_grad=True)
    mine, other = axis.rank + 1.0, 2.0 - axis.rank
    x = start * 2
    total = shared(x) * mine + shared(x) * 10 * mine + shared(x.clone()) * 100 * mine + x * 1000
    x.mul_(3)  # no more what was read
    total = total + shared(x) * 10000 * mine + shared(x) * 20000 * mine
    total.sum().backward()
    assert start.grad is not None
    return start.grad, 2 * ((mine + other) * (111 + 3 * 30000) + 1000) * torch.ones(3), axis.bytes_sent // nbytes(start)


def test_different_tensors_are_summed_by_themselves() -> None:
    """One that is equal, and one that was written to: 3 exchanges, and the gradient is that of all uses."""
    for gradient, expected, exchanges in run_distributed(of_different_tensors, 2):
        assert torch.equal(gradient, expected.double()) and exchanges == 3


def test_what_was_read_is_not_kept() -> None:
    axis = meshes.view({"tensor": 2})["tensor"]
    shared, start = SharedInputs(axis), torch.ones(3, device="meta", requires_grad=True)
    x = start * 2
    first, second, gone = shared(x), shared(x), weakref.ref(x)
    assert first is second and first is not x
    del x
    assert gone() is None
    with torch.no_grad():
        y = start * 2
        assert shared(y) is y
    assert shared(y) is y  # that needs no gradient
