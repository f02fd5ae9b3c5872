"""The parity test can fail: each of these mistakes, made on purpose, is found by it.

Most of them leave the loss of the first step as it is and change gradients only.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import collectives
from acceleration.distributed.mesh import Axis
from acceleration.engines.native import NativeEngine
from acceleration.sharding import tensor_parallel
from opensora.models.mmdit import MMDiTModel
from opensora.train import preparation
from tests.dist import test_parity
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64
from tests.dist.parity import Outcome, worst_error
from tests.dist.test_parity import on_one_process, on_this_layout

FOUND = 1e-6  # every mistake is far above the tolerance of 1e-10
ULYSSES, RING, TENSOR, SHARD = {"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"shard": 2}
Patch = Any


def divide_by_the_degree() -> Patch:
    right = NativeEngine.backward
    return mock.patch.object(
        NativeEngine, "backward", lambda self, loss, **options: right(self, loss / dist.get_world_size(), **options)
    )


def count_the_text_projection_twice() -> Patch:
    right = MMDiTModel.forward

    def wrong(self: MMDiTModel, *args: Any, **inputs: Any) -> Tensor:
        with self.txt_in.register_forward_hook(lambda module, args, out: out + (out - out.detach())):
            return right(self, *args, **inputs)

    return mock.patch.object(MMDiTModel, "forward", wrong)


def drop_the_mask_in_one_hop() -> Patch:
    right = collectives.all_gather

    def wrong(x: Tensor, dim: int, sizes: Any, axis: Axis) -> Tensor:
        whole = right(x, dim, sizes, axis)
        if x.dtype == torch.bool and axis.name == "ring":
            whole[:, : sizes[0]] = True
        return whole

    return mock.patch.object(collectives, "all_gather", wrong)


def draw_noise_per_process() -> Patch:
    right = preparation.draw_per_sample
    return mock.patch.object(preparation, "draw_per_sample", lambda seed, *rest: right(seed + dist.get_rank(), *rest))


def permute_heads() -> Patch:
    """Processes hold each other's queries, keys and values, but their own output projection."""
    right = tensor_parallel._ranges

    def wrong(parts: tuple[int, ...], axis: Axis) -> tuple[tuple[int, int], ...]:
        swapped = Axis(axis.name, axis.degree, axis.degree - 1 - axis.rank, axis.group)
        return right(parts, swapped if len(parts) == 3 else axis)

    return mock.patch.object(tensor_parallel, "_ranges", wrong)


def accumulate_without_weights() -> Patch:
    """Every micro-batch counts the same, whatever its size."""
    right = test_parity.loss_share

    def wrong(model: Any, tokens: Any, elements: int) -> Tensor:
        return right(model, tokens, tokens.targets["velocity"].numel() * len(test_parity.batches(0)))

    return mock.patch.object(test_parity, "loss_share", wrong)


def clip_on_the_local_norm() -> Patch:
    return mock.patch.object(
        NativeEngine, "_norm", lambda self, gradients: torch.nn.utils.get_total_norm([g.to_local() for g in gradients])
    )


def forget_the_shared_norms() -> Patch:
    return mock.patch.object(tensor_parallel, "sum_shared_gradients", lambda *arguments: None)


MISTAKES: dict[str, tuple[Callable[[], Patch], dict[str, int]]] = {
    "gradients divided by the degree": (divide_by_the_degree, ULYSSES),
    "text projection counted twice": (count_the_text_projection_twice, ULYSSES),
    "mask dropped in one hop": (drop_the_mask_in_one_hop, RING),
    "noise differs inside a group": (draw_noise_per_process, RING),
    "heads permuted": (permute_heads, TENSOR),
    "accumulation without weights": (accumulate_without_weights, SHARD),
    "clipping on a local norm": (clip_on_the_local_norm, SHARD),
    "norms of heads not summed": (forget_the_shared_norms, TENSOR),
}


def with_mistake(name: str) -> Outcome:
    mistake, mesh = MISTAKES[name]
    with ExitStack() as stack:
        stack.enter_context(mistake())
        return on_this_layout(ParallelConfig(zero=3, mesh=MeshConfig(**mesh), precision=FP64))


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_found(name: str) -> None:
    results = run_distributed(with_mistake, 2, name, timeout=60)
    truth = on_one_process()
    assert max(worst_error(found, truth) for found in results) > FOUND
