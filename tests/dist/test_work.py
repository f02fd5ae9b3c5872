"""Shared work: every process gets every result, in order, with the bits one process computes."""

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration import mesh as meshes
from acceleration.config import MeshConfig
from acceleration.mesh import SAMPLE_AXES
from acceleration.work import SharedWork
from opensora.models.vae import AutoencoderConfig, DCTConfig, Flux2DConfig, HunyuanConfig, build_autoencoder
from opensora.utils.work import Work, one_by_one
from tests.dist.harness import run_distributed

CPU = torch.device("cpu")
SHAPES = [(2, 3), (4,), (1, 0, 2), (5, 1), (3, 3), (2, 2), (7,)]
LAYOUTS = [(2, {"cfg": 2}), (4, {"ring": 2, "tensor": 2}), (4, {"shard": 2, "ulysses": 2})]


def pieces(count: int, ran: list[int]) -> list[Work]:
    def compute(index: int) -> Tensor:
        ran.append(index)
        return torch.full(SHAPES[index], float(index), dtype=torch.bfloat16)

    return [Work(partial(compute, index), SHAPES[index]) for index in range(count)]


def shared(degrees: dict[str, int], count: int) -> tuple[list[Tensor], list[int], int]:
    """(results, which pieces ran here, bytes sent)."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), CPU)
    ran: list[int] = []
    results = SharedWork(*(mesh[name] for name in SAMPLE_AXES))(pieces(count, ran))
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


def coded(degrees: dict[str, int], cfg: AutoencoderConfig, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, int, int]:
    """(latents, pixels, pieces in all, pieces computed here)."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), CPU)
    run_all, listed, ran = SharedWork(*(mesh[name] for name in SAMPLE_AXES)), [], []

    def run(work: Sequence[Work]) -> list[Tensor]:
        listed.extend(work)
        return run_all([Work(lambda piece=piece: (ran.append(1), piece.run())[1], piece.shape) for piece in work])  # type: ignore[misc]

    autoencoder = build_autoencoder(cfg, "cpu", torch.float32)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = autoencoder.encode(pixels, run)
    return latents, autoencoder.decode(latents, run), len(listed), len(ran)


@pytest.fixture(scope="module")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderKLHunyuanVideo

    torch.manual_seed(0)
    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    folder = tmp_path_factory.mktemp("hunyuan")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["dct", "hunyuan"])
def test_a_clip_is_coded_once_by_all(kind: str, world: int, hunyuan_folder: str) -> None:
    """Bit for bit what one process codes, by as many processes as there are."""
    cfg: Any = {"dct": DCTConfig(channels=16), "hunyuan": HunyuanConfig(path=hunyuan_folder)}[kind]
    size = (29, 16, 24)
    degrees = {"cfg": 2} if world == 2 else {"cfg": 2, "tensor": 2}
    ((latents, pixels, pieces, ran),) = run_distributed(coded, 1, {}, cfg, size)
    assert pieces == ran and pieces > 2 * world
    for found_latents, found_pixels, _, ran in run_distributed(coded, world, degrees, cfg, size):
        assert torch.equal(found_latents, latents) and torch.equal(found_pixels, pixels)
        assert ran <= -(-pieces // world) + 1  # encoding and decoding round up each


