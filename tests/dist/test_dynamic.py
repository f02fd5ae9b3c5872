"""Samples of one step cut over different numbers of processes: the same loss, gradients and weights, and every byte as
predicted."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import AXES, Mesh
from opensora.assembly.components import tile_runner
from opensora.datasets.plan.dynamic_sp import SequenceSharing
from opensora.models.vae import build_autoencoder
from opensora.models.vae.dct import DCTConfig
from opensora.train.preparation import Tokens
from tests.dist import test_engines, test_parity
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.parity import TOLERANCE, Outcome, relative, worst_error
from tests.dist.problem import TEXT_TOKENS, FakeBatch
from tests.dist.test_parity import assign, on_one_process, on_this_layout, preparation

CPU = torch.device("cpu")
# ulysses -> how many processes cut the samples of each of the problem's micro-batches, which have 2, 1, 3 and 1
DEGREES = {2: (2, 2, 1, 1), 3: (3, 3, 1, 1), 4: (2, 4, 1, 2)}


def divided(step: int, mesh: Mesh) -> list[FakeBatch]:
    """This process's part of its rank's micro-batches; who has no sample repeats one."""
    ulysses, mine = mesh["ulysses"], []
    sharing = SequenceSharing(degree=ulysses.degree, rank=ulysses.rank, text_tokens=TEXT_TOKENS)
    for batch in assign(step, mesh.data_rank, mesh.data_degree):
        degree = DEGREES[ulysses.degree][batch.sample_ids[0] // 10 % 10]
        part = sharing.local_rows(len(batch.sample_ids), degree)
        found = slice(part.start, part.stop) if part else slice(0, 1)
        mine.append(
            FakeBatch(
                batch.pixels[found],
                batch.prompts[found],
                batch.sample_ids[found],
                weight=batch.weight if part else 0.0,
                degree=degree,
            )
        )
    return mine


def on_dynamic(cfg: ParallelConfig) -> Outcome:
    return on_this_layout(cfg, divided)


@pytest.fixture(scope="module")
def truth() -> Outcome:
    return on_one_process()


def layout(mesh: dict[str, int], zero: Any, recompute: str = "none") -> ParallelConfig:
    cfg = MeshConfig(**mesh, dynamic=True)
    return ParallelConfig(zero=zero, mesh=cfg, recompute=RECOMPUTE[recompute], precision=FP64)


QUICK = [({"shard": 2, "ulysses": 2}, 3, "full")]
SLOW = [
    ({"ulysses": 4}, 2, "none"),
    ({"ulysses": 2}, 3, "full"),
    ({"ulysses": 4}, 0, "full"),
    ({"ulysses": 2}, 0, "none"),
    ({"ulysses": 3}, 1, "selective"),
    ({"ulysses": 4}, 3, "selective"),
    ({"ulysses": 2, "tensor": 2}, 3, "full"),
    ({"ulysses": 2, "tensor": 2}, 2, "none"),
    ({"replicate": 2, "ulysses": 2}, 3, "every"),
    ({"shard": 2, "ulysses": 4}, 2, "offload"),
    ({"replicate": 2, "ulysses": 2, "tensor": 2}, 1, "first"),
]


@pytest.mark.parametrize(
    ("mesh", "zero", "recompute"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_any_degrees_equal_one_process(truth: Outcome, mesh: dict[str, int], zero: int, recompute: str) -> None:
    """Several degrees in a step, fillers, uneven lengths, masks; three steps of SGD in fp64."""
    world = int(np.prod(list(mesh.values())))
    cfg = layout({"shard": 1} | mesh, zero, recompute)
    for rank, found in enumerate(run_distributed(on_dynamic, world, cfg, timeout=100)):
        assert worst_error(found, truth) <= TOLERANCE, f"rank {rank}"
        for counted, formula in found.traffic:
            assert counted == formula, f"rank {rank}"
            assert counted["ulysses"] > 0


def on_deepspeed(zero: Any) -> list[test_engines.Step]:
    mesh_cfg = MeshConfig(shard=1, ulysses=2, dynamic=True)
    cfg = ParallelConfig(engine="deepspeed", zero=zero, mesh=mesh_cfg, precision=test_engines.FP32)
    mesh, engine = test_engines.build(cfg, test_engines.SGD)
    with mock.patch.object(test_engines, "assign", lambda step, *place: divided(step, mesh)):
        return test_engines.take_steps(engine, mesh, test_engines.SGD, 0, test_engines.STEPS, look=True)


@pytest.mark.slow
@test_engines.needs_deepspeed
@pytest.mark.parametrize("zero", [1, 3])
def test_on_another_engine(truth: Outcome, zero: int) -> None:
    _, near, gradient, weight = test_engines.EXACT["deepspeed"]
    for steps in run_distributed(on_deepspeed, 2, zero, timeout=110):
        for (loss, norm, gradients, _), (true_loss, true_norm, truths) in zip(steps, truth.steps, strict=True):
            assert relative(loss, true_loss) <= near and relative(norm, true_norm) <= near
            assert test_engines.farthest(gradients, truths)[0] <= gradient
        assert test_engines.farthest(steps[-1][3], truth.weights)[0] <= weight


def scale_what_few_cut() -> Outcome:
    """Every group taken for all of the micro-batch: its gradients are too large, its loss is as it was."""
    right = test_parity.loss_share

    def wrong(model: Any, tokens: Tokens, elements: int) -> Tensor:
        share = right(model, tokens, elements)
        part = tokens.inputs["context"].ulysses
        return share if part is None else share * 2 - share.detach()  # the gradient alone is wrong

    with mock.patch.object(test_parity, "loss_share", wrong):
        return on_dynamic(layout({"shard": 1, "ulysses": 2}, 2))


def test_the_mistake_is_found(truth: Outcome) -> None:
    assert max(worst_error(found, truth) for found in run_distributed(scale_what_few_cut, 2, timeout=60)) > 1e-6


def groups() -> list[tuple[int, list[int]]]:
    """(degree, processes) of every part that this process belongs to."""
    mesh = meshes.build(MeshConfig(shard=2, ulysses=4, tensor=1, dynamic=True), 8, CPU)
    return [(d, dist.get_process_group_ranks(part.group)) for d, part in mesh.subgroups.items() if part.group]


@pytest.mark.slow
def test_parts_have_groups() -> None:
    for rank, found in enumerate(run_distributed(groups, 8)):
        first = rank // 2 * 2
        assert found == [(2, [first, first + 1])]


def encoded() -> tuple[bool, bool, list[int]]:
    """Whether every process has the latents of its own clip, and of the common one; bytes sent for each."""
    mesh = meshes.build(MeshConfig(shard=1, ulysses=2, dynamic=True), 2, CPU)
    autoencoder = build_autoencoder(DCTConfig(channels=16), CPU, torch.float32)
    whole = replace(preparation(mesh).encoders, autoencoder=autoencoder)
    together = replace(whole, run_tiles=tile_runner("on", autoencoder, mesh))
    apart = replace(whole, run_tiles=tile_runner("on", autoencoder, mesh.submesh(1)))
    same, sent = [], []
    for seed, encoders in ((dist.get_rank(), apart), (7, together)):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (1, 3, 9, 16, 24), generator=generator, dtype=torch.uint8)
        batch: Any = FakeBatch(pixels, ["a"], (4,))
        before = mesh["ulysses"].bytes_sent
        found = encoders.encode(batch).latents
        sent.append(mesh["ulysses"].bytes_sent - before)
        same.append(torch.allclose(found, replace(whole).encode(batch).latents, atol=1e-6))
    return same[0], same[1], sent


def test_processes_with_clips_of_their_own_encode_them_alone() -> None:
    for apart, together, sent in run_distributed(encoded, 2):
        assert apart and together
        assert sent[0] == 0 < sent[1]


def test_a_narrow_mesh_is_the_whole_but_for_ulysses() -> None:
    for rank in range(16):
        mesh = meshes.view({"shard": 2, "ulysses": 4, "tensor": 2}, rank)
        part = mesh.submesh(2)
        assert part["ulysses"].degree == 2 and part["ulysses"].rank == mesh["ulysses"].rank % 2
        assert all(part[name] is mesh[name] for name in AXES if name != "ulysses")
        assert mesh.submesh(None) is mesh.submesh(4) is mesh
        part["ulysses"].bytes_sent += 3
        assert mesh["ulysses"].bytes_sent == mesh.bytes_sent()["ulysses"] == 3
        members = [ranks for ranks in meshes.part_ranks({"shard": 2, "ulysses": 4, "tensor": 2}, 2) if rank in ranks]
        assert members == [[rank - 2 * part["ulysses"].rank, rank - 2 * part["ulysses"].rank + 2]]
