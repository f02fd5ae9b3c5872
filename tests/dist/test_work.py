"""Shared work: every process gets every result, in order, with the bits one process computes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import SAMPLE_AXES
from acceleration.distributed.tasks import DistributedRunner
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import tile_runner
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig
from opensora.models.mmdit import MMDiTConfig
from opensora.models.vae import AutoencoderConfig, DCTConfig, Flux2DConfig, HunyuanConfig, build_autoencoder
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.train.preparation import Preparation, Tokens
from opensora.utils.tasks import Task, one_by_one
from tests.dist.harness import run_distributed
from tests.dist.problem import FakeBatch, FakeText

CPU = torch.device("cpu")
SHAPES = [(2, 3), (4,), (1, 0, 2), (5, 1), (3, 3), (2, 2), (7,)]
LAYOUTS = [(2, {"cfg": 2}), (4, {"ring": 2, "tensor": 2}), (4, {"shard": 2, "ulysses": 2})]


def pieces(count: int, ran: list[int]) -> list[Task]:
    def compute(index: int) -> Tensor:
        ran.append(index)
        return torch.full(SHAPES[index], float(index), dtype=torch.bfloat16)

    return [Task(partial(compute, index), SHAPES[index]) for index in range(count)]


def shared(degrees: dict[str, int], count: int) -> tuple[list[Tensor], list[int], int]:
    """(results, which pieces ran here, bytes sent)."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), CPU)
    ran: list[int] = []
    results = DistributedRunner(*(mesh[name] for name in SAMPLE_AXES))(pieces(count, ran))
    return results, ran, sum(mesh[name].bytes_sent for name in SAMPLE_AXES)


@pytest.mark.parametrize(("world", "degrees"), LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_all_get_all(world: int, degrees: dict[str, int], count: int) -> None:
    """Also with fewer pieces than processes, and pieces that are empty."""
    wanted = one_by_one(pieces(count, []))
    members = prod(degree for name, degree in degrees.items() if name in SAMPLE_AXES)
    for results, ran, _ in run_distributed(shared, world, degrees, count):
        assert len(ran) == -(-count // members)
        for found, truth in zip(results, wanted, strict=True):
            assert found.dtype == truth.dtype and torch.equal(found, truth)


def test_bytes_are_those_of_the_formula() -> None:
    """Two axes of two: what a process holds goes to one peer, what both then hold to another; the longest counts."""
    sizes = [sum(prod(shape) for shape in SHAPES[rank::4]) for rank in range(4)]
    second = max(sizes[0] + sizes[1], sizes[2] + sizes[3])
    for rank, (_, _, sent) in enumerate(run_distributed(shared, 4, {"ring": 2, "tensor": 2}, len(SHAPES))):
        pair = sizes[:2] if rank < 2 else sizes[2:]
        assert sent == 2 * (max(pair) + second)


def coded(
    degrees: dict[str, int], cfg: AutoencoderConfig, size: tuple[int, int, int]
) -> tuple[Tensor, Tensor, int, int]:
    """(latents, pixels, pieces in all, pieces computed here)."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), CPU) if degrees else meshes.view({})
    run_all = DistributedRunner(*(mesh[name] for name in SAMPLE_AXES))
    listed, ran = [], []

    def noting(piece: Task) -> Tensor:
        ran.append(piece)
        return piece.run()

    def run(work: Sequence[Task]) -> list[Tensor]:
        listed.extend(work)
        return run_all([Task(partial(noting, piece), piece.shape) for piece in work])

    autoencoder = build_autoencoder(cfg, "cpu", torch.float64)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = autoencoder.encode(pixels, run)
    return latents, autoencoder.decode(latents, run), len(listed), len(ran)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AutoencoderConfig]:
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoders")
    sizes: dict[str, Any] = dict(block_out_channels=(4, 4, 4, 4), latent_channels=4, norm_num_groups=2)
    AutoencoderKLHunyuanVideo(layers_per_block=1, **sizes).save_pretrained(folder / "hunyuan")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **sizes
    ).save_pretrained(folder / "flux2d")
    return {
        "dct": DCTConfig(channels=16),
        "hunyuan": HunyuanConfig(path=str(folder / "hunyuan"), temporal_tiling=True, tile_frames=16),
        "flux2d": Flux2DConfig(path=str(folder / "flux2d"), micro_batch=5),
    }


CODERS = [
    pytest.param(kind, world, marks=[] if (kind, world) in (("dct", 4), ("hunyuan", 2)) else pytest.mark.slow)
    for kind in ("dct", "hunyuan", "flux2d")
    for world in (2, 4)
]


@pytest.mark.parametrize(("kind", "world"), CODERS)
def test_a_clip_is_coded_once_by_all(kind: str, world: int, autoencoders: dict[str, AutoencoderConfig]) -> None:
    """All get the same bits, and those of one process up to rounding.

    Tiles are computed in fp64 and returned in fp32: where weights lie in memory changes the last bits, and random
    weights amplify them.
    """
    cfg, size = autoencoders[kind], (29, 16, 24)
    degrees = {"cfg": 2} if world == 2 else {"cfg": 2, "tensor": 2}
    latents, pixels, pieces, ran = coded({}, cfg, size)
    assert pieces == ran and pieces > 2 * world
    results = run_distributed(coded, world, degrees, cfg, size)
    for found_latents, found_pixels, _, ran in results:
        assert torch.equal(found_latents, results[0][0]) and torch.equal(found_pixels, results[0][1])
        assert (found_latents - latents).abs().max() <= 1e-6 and (found_pixels - pixels).abs().max() <= 1e-6
        assert ran <= -(-pieces // world) + 1  # encoding and decoding round up each


def prepared() -> tuple[Tokens, Tokens, list[int]]:
    """A micro-batch encoded by all together, and by this process alone; bytes sent on every axis for the first."""
    mesh = meshes.build(MeshConfig(ulysses=2, tensor=2), dist.get_world_size(), CPU)
    autoencoder = build_autoencoder(DCTConfig(channels=16), CPU, torch.float32)
    model = MMDiTConfig(in_channels=16, patch_size=1, context_in_dim=12, vec_in_dim=12, cond_embed=False)
    prepare = Preparation(
        encoders=Encoders(
            autoencoder=autoencoder, text_encoder=FakeText(), device=CPU, run_tiles=tile_runner("on", autoencoder, mesh)
        ),
        objective=RectifiedFlow(RectifiedFlowConfig()),
        conditioning=ConditioningConfig(),
        model=model,
        layout=token_layout(model, SequenceParallel(mesh)),
        seed=7,
    )
    assert tile_runner("auto", autoencoder, mesh) is one_by_one  # cheaper to compute than to send
    pixels = torch.randint(0, 256, (2, 3, 9, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch: Any = FakeBatch(pixels, ["a", "b c"], (4, 9))
    together = prepare(batch, 5)
    sent = [mesh[name].bytes_sent for name in ("ulysses", "tensor")]
    return together, replace(prepare, encoders=replace(prepare.encoders, run_tiles=one_by_one))(batch, 5), sent


def test_a_micro_batch_is_encoded_by_all_that_work_on_it() -> None:
    for together, alone, sent in run_distributed(prepared, 4):
        assert all(sent)
        assert torch.allclose(together.targets["velocity"], alone.targets["velocity"], atol=1e-6)
        assert torch.allclose(together.inputs["img"], alone.inputs["img"], atol=1e-6)
