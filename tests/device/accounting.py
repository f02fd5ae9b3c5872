"""What a process has on the simulated device in its steps, byte by byte, for forecasts to be held against."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from acceleration.accounting.rank_layout import MicroBatch
from acceleration.config import MeshConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from acceleration.sharding import fsdp
from opensora.assembly.turns import DENOISER
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.planner.meta_model import denoiser_inputs
from opensora.sampling.caches import CacheConfig
from opensora.train.held_out import HeldOutLoss, Totals, in_bins
from tests.device import lora, offload, problem
from tests.device.offload import MODEL, DeviceBytes
from tests.device.simulated import CUDA, simulated_cuda
from tests.dist.parity import fill

BF16_WEIGHTS = PrecisionConfig(compute="bf16", reduce="fp32", master="bf16")  # as in sampling
CLIP = {
    "width": 8,
    "height": 5,
    "num_frames": 3,
    "num_steps": 3,
}  # for step caches: what they keep is much of what is there


@dataclass(frozen=True)
class Forward:
    """A forward without gradients in a layout."""

    zero: Any = 3
    mesh: tuple[tuple[str, int], ...] = ()
    model: MMDiTConfig = MODEL
    batch: MicroBatch = MicroBatch(samples=1, txt=4, img=12)  # noqa: RUF009

    def __str__(self) -> str:
        mesh = " ".join(f"{axis}{degree}" for axis, degree in self.mesh)
        return f"zero{self.zero} {self.batch.img} {mesh}".strip()

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(zero=self.zero, mesh=MeshConfig(**dict(self.mesh)), precision=BF16_WEIGHTS)


def forwards(case: Forward, count: int = 2) -> tuple[int, int]:
    """(most bytes in some forwards, bytes behind them that were not there before)."""
    counted = DeviceBytes()
    with simulated_cuda(), counted.counting(), torch.no_grad():
        mesh = meshes.build(case.parallel.mesh, dist.get_world_size(), CUDA)
        with torch.device("meta"):
            model = build_model(case.model)
        model = parallelize(model, case.parallel, mesh, CUDA, fill).requires_grad_(False).eval()
        fsdp.release(model)
        gc.collect()
        before = counted.now()
        counted.reset(CUDA)
        for _ in range(count):
            out = model(**denoiser_inputs(case.model, case.batch, SequenceParallel(mesh), device=CUDA))
            del out
        gc.collect()
        return counted.most, counted.now() - before


def trained(case: lora.Case) -> int:
    """Most bytes in the third of three steps."""
    return lora.trained(case, 3).peak


def with_caches(caches: Sequence[CacheConfig]) -> list[int]:
    """Most bytes while clips are denoised, with each."""
    with mock.patch.object(offload, "OPTION", replace(offload.OPTION, **CLIP)):
        return [offload.sampled("none", {}, cache).peaks[DENOISER] for cache in caches]


@contextmanager
def runs(changes: dict[str, Any], shapes: Sequence[Sequence[int]]) -> Iterator[tuple[problem.Trainer, DeviceBytes]]:
    """A run with its encoders, behind its second step, as the training loop has it.

    Args:
        shapes: (samples, frames, height, width) of every micro-batch, or of the parts of a pack.
    """
    counted = DeviceBytes()
    with simulated_cuda(), counted.counting(), mock.patch.object(problem, "SHAPES", tuple(shapes)):
        trainer = problem.build(problem.config(changes), CUDA)
        for step in range(2):
            problem.one_step(trainer, step)
        gc.collect()
        counted.reset(CUDA)
        yield trainer, counted


def a_step(changes: dict[str, Any], shapes: Sequence[Sequence[int]]) -> int:
    """Most bytes in a step, encoders included."""
    with runs(changes, shapes) as (trainer, counted):
        problem.one_step(trainer, 2)
    return counted.most


def a_round(changes: dict[str, Any], shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Most bytes (for the held-out loss of the first micro-batch, for clips of two prompts)."""
    with runs(changes, shapes) as (trainer, counted), torch.no_grad(), trainer.engine.averaged():
        encoders, prepared = in_bins(trainer.prepare, 2, 0)
        loss = HeldOutLoss(
            held=None,  # type: ignore[arg-type]
            encoders=encoders,
            prepared=prepared,
            mesh=trainer.mesh,
            device=CUDA,
            seed=0,
        )
        (batch, *_) = problem.batches(trainer.cfg, 0)
        loss._add(Totals((str(batch.bucket),), 2), trainer.engine.model, batch)  # type: ignore[union-attr, arg-type]
        held_out = counted.most
        gc.collect()
        counted.reset(CUDA)
        problem.sample(trainer)
    return held_out, counted.most
