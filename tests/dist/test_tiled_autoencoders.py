"""Tiles over processes: the bits of one process, for clips of any size that an autoencoder codes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import SAMPLE_AXES
from acceleration.distributed.tasks import DistributedRunner
from opensora.assembly.encoders import Encoders
from opensora.models.base import latent_grid
from opensora.models.vae import AUTOENCODER_CONFIGS, AutoencoderConfig, autoencoder_shape, build_autoencoder
from opensora.utils.tasks import Task, one_by_one
from tests.dist.harness import run_distributed
from tests.dist.problem import FakeText
from tests.published_autoencoders import write_small

CPU = torch.device("cpu")
KINDS = ("hunyuan", "flux2d", "dc_ae", "sd", "opensora_v1_2", "opensora_v1_3")
ANY_SIZE = KINDS[3:]  # clips of any length, in pieces, and frames of any size
CAUSAL = ("hunyuan", "opensora_v1_3")
MESHES = {1: {}, 2: {"ulysses": 2}, 4: {"ring": 2, "cfg": 2}}
Case = tuple[AutoencoderConfig, tuple[int, int, int, int]]  # how, and (clips, frames, height, width)
Coded = tuple[Tensor, Tensor, Tensor]  # latents, pixels, pieces of work (all, here) of both directions


def drawn_cases(kind: str, path: str, seed: int, count: int) -> list[Case]:
    """Options and sizes that the kind accepts, most of them of several tiles that do not divide the clip."""
    draw = np.random.default_rng(seed)
    if kind in ANY_SIZE:
        return [_of_any_size(kind, path, draw) for _ in range(count)]
    found: list[Case] = []
    while len(found) < count:
        options: dict[str, Any] = {"micro_batch": int(draw.integers(1, 4))}
        stride = {"hunyuan": (4, 8, 8), "flux2d": (1, 2, 2), "dc_ae": (4, 32, 32)}[kind]
        if kind != "flux2d":
            overlap = float(draw.choice([0.0, 0.25, 0.5]))
            multiple = {0.0: 1, 0.25: 4, 0.5: 2}[overlap]
            options |= {
                "tile_overlap": overlap,
                "tile_size": stride[1] * multiple * int(draw.integers(1, 3)),
                "tile_frames": 4 * multiple * int(draw.integers(1, 3)),
                "spatial_tiling": bool(draw.random() < 0.8),
                "temporal_tiling": bool(draw.random() < 0.7),
            }
        if kind != "dc_ae":
            options["sample"] = str(draw.choice(["mode", "posterior"]))
        cfg = AUTOENCODER_CONFIGS[kind](path=path, **options)
        latent_frames = int(draw.integers(1, 7))
        lead = 1 if kind == "hunyuan" or latent_frames == 1 else 0
        frames = (latent_frames - lead) * stride[0] + lead
        most = 5 if kind == "dc_ae" else 8
        height, width = (side * int(draw.integers(1, most)) for side in stride[1:])
        found.append((cfg, (int(draw.integers(1, 4)), frames, height, width)))
    return found


def _of_any_size(kind: str, path: str, draw: np.random.Generator) -> Case:
    options: dict[str, Any] = {
        "micro_batch": int(draw.integers(1, 4)),
        "sample": str(draw.choice(["mode", "posterior"])),
    }
    if kind != "sd":
        options["micro_frame_size"] = [None, 4, 5, 9][draw.integers(4)]
    if kind == "opensora_v1_3":
        options["temporal_overlap"] = bool(draw.random() < 0.5)
        options["normalization"] = str(draw.choice(["none", "video"]))
    size = int(draw.integers(1, 4)), int(draw.integers(1, 20)), *(int(side) for side in draw.integers(8, 40, 2))
    return AUTOENCODER_CONFIGS[kind](path=path, **options), size


def coded(cases: list[Case], degrees: dict[str, int]) -> list[Coded]:
    """Every case by all processes together."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), CPU) if degrees else meshes.view({})
    run_all = DistributedRunner(*(mesh[name] for name in SAMPLE_AXES)) if degrees else one_by_one
    return [_coded(cfg, size, run_all) for cfg, size in cases]


def _coded(cfg: AutoencoderConfig, size: tuple[int, int, int, int], run_all: Any) -> Coded:
    counts = [0, 0]

    def counted(piece: Task) -> Tensor:
        counts[1] += 1
        return piece.run()

    def run(work: Sequence[Task]) -> list[Tensor]:
        counts[0] += len(work)
        return run_all([Task(partial(counted, piece), piece.shape) for piece in work])

    autoencoder = build_autoencoder(cfg, CPU, torch.float32)
    encoders = Encoders(autoencoder=autoencoder, text_encoder=FakeText(), device=CPU, run_tiles=run, seed=5)
    pixels = torch.rand(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoders.latents(pixels, 3, tuple(range(size[0])))
    assert latents.shape[2:] == latent_grid(*size[1:], autoencoder)
    return latents, autoencoder.decode(latents, run), torch.tensor(counts)


def compare(kind: str, worlds: Sequence[int], count: int, seed: int, folder: Path) -> None:
    path = write_small(kind, folder / "small.safetensors")
    cases = drawn_cases(kind, str(path), seed, count)
    assert autoencoder_shape(cases[0][0]).causal == (kind in CAUSAL)
    alone = run_distributed(coded, 1, cases, {}, timeout=300)[0]
    assert sum(int(pieces[0]) for _, _, pieces in alone) > 4 * count
    for world in worlds:
        for rank in run_distributed(coded, world, cases, MESHES[world], timeout=300):
            for case, found, truth in zip(cases, rank, alone, strict=True):
                assert torch.equal(found[0], truth[0]), ("latents", world, case)
                assert torch.equal(found[1], truth[1]), ("pixels", world, case)
                lists = 4 if kind == "opensora_v1_2" else 2  # of pieces, each dealt out by itself
                assert found[2][0] == truth[2][0] and found[2][1] <= found[2][0] / world + lists, case


@pytest.mark.parametrize(
    ("kind", "world"), [("hunyuan", 2), ("flux2d", 2), ("dc_ae", 2), ("opensora_v1_2", 2), ("hunyuan", 4)]
)
def test_tiles_over_processes_are_those_of_one(kind: str, world: int, tmp_path: Path) -> None:
    compare(kind, (world,), 8 if kind == "flux2d" else 4, 11 * world, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_over_1_2_and_4_processes(kind: str, tmp_path: Path) -> None:
    compare(kind, (2, 4), 60, 5, tmp_path)


def test_draws_of_a_micro_batch_are_those_of_its_samples(tmp_path: Path) -> None:
    """However many samples a process codes at a time, and whoever codes the tiles: nothing else enters a draw."""
    path = str(write_small("hunyuan", tmp_path / "small.safetensors"))
    cfg: Any = AUTOENCODER_CONFIGS["hunyuan"](path=path, sample="posterior", tile_size=32)
    size = (3, 5, 40, 24)
    one, three = (run_distributed(coded, 1, [(replace(cfg, micro_batch=n), size)], {})[0][0] for n in (1, 3))
    assert torch.allclose(one[0], three[0], atol=1e-5)
