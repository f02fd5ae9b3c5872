"""LoRA training with and without ``lora.offload=blocks`` on the simulated device, and every byte that is on it."""

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from acceleration import lora
from acceleration.accounting.rank_layout import MicroBatch
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig, RecomputeConfig
from acceleration.distributed import mesh as meshes
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.models.families import build_model
from opensora.models.mmdit import FAMILY
from opensora.planner.meta_model import denoiser_inputs
from tests.device.offload import MODEL, DeviceBytes
from tests.device.simulated import CUDA, simulated_cuda
from tests.dist.parity import fill

LORA = LoraConfig(rank=4, alpha=6.0, targets=FAMILY.lora_targets)
# Some blocks without any, the first and the last of all among them.
FEW = replace(LORA, targets=("double_blocks.1.*_attn.qkv", "double_blocks.1.*_attn.proj", "single_blocks.1.linear1"))
FP64 = PrecisionConfig(compute="fp64", reduce="fp64", master="fp64")
BF16 = PrecisionConfig()


@dataclass(frozen=True)
class Case:
    """A layout, and what is trained on it."""

    precision: PrecisionConfig = BF16
    optim: OptimConfig = OptimConfig(lr=1e-2, clip_norm=0.5, ema_decay=0.9)  # noqa: RUF009
    adapters: LoraConfig = LORA
    recompute: Any = "none"
    zero: Any = 3
    mesh: tuple[tuple[str, int], ...] = ()
    model: Any = MODEL
    txt: int = 4
    img: int = 12
    samples: int = 2
    batches: int = 2
    parallel_offload: Any = "none"
    packed: int = 0  # samples in a sequence, of which txt and img are all tokens
    picture: int = 0  # tokens of a picture

    def __str__(self) -> str:
        mesh = " ".join(f"{axis}{degree}" for axis, degree in self.mesh)
        kind = f"{self.model.kind} " * (self.model is not MODEL)
        which = kind + ("few" if self.adapters == FEW else "all" if self.adapters.rank else "whole")
        which += f" packed{self.packed}" * bool(self.packed)
        return f"{which} {self.precision.compute} {self.optim.kind} zero{self.zero} {self.recompute} {self.img} {mesh}"

    @property
    def batch(self) -> MicroBatch:
        more = {"packed": self.packed, "picture": self.picture}
        return MicroBatch(samples=self.samples, txt=self.txt, img=self.img, **more)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            zero=self.zero,
            mesh=MeshConfig(**dict(self.mesh)),
            recompute=RecomputeConfig(kind=self.recompute),
            precision=self.precision,
            offload=self.parallel_offload,
        )


@dataclass(frozen=True)
class Trained:
    """What a process saw of some steps."""

    losses: list[float]
    gradients: list[Tensor]
    adapters: dict[str, Tensor]
    peak: int  # bytes on the device in the last step
    between: int  # and after it


def both(case: Case, steps: int = 3) -> dict[str, Trained]:
    """In a process of a group: without offload and with it."""
    return {
        offload: trained(replace(case, adapters=replace(case.adapters, offload=offload)), steps)
        for offload in ("none", "blocks")
    }


def trained(case: Case, steps: int) -> Trained:
    counted, losses, gradients = DeviceBytes(), [], []
    with simulated_cuda(), counted.counting():
        mesh = meshes.build(case.parallel.mesh, dist.get_world_size(), CUDA)
        with torch.device("meta"):
            model = build_model(case.model)
        if case.adapters.rank:
            lora.apply(model, case.adapters)
        parallelize(model, case.parallel, mesh, CUDA, fill, streams_frozen=case.adapters.offload == "blocks")
        engine = build_engine(model, case.parallel, case.optim, mesh)
        for step in range(steps):
            gc.collect()
            counted.reset(CUDA)
            for index in range(case.batches):
                share = loss(engine.model, case, step + 10 * index, SequenceParallel(mesh))
                engine.backward(share, last_microbatch=index == case.batches - 1)
                losses.append(float(share.detach().cpu()))
                del share
            gradients += [
                (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).detach().cpu().clone()
                for p in model.parameters()
                if p.grad is not None
            ]
            engine.step(step)
        between = counted.now()
        adapters = {name: x.cpu().clone() for name, x in engine.full_weights()}
    return Trained(losses, gradients, adapters, counted.most, between)


def loss(model: Any, case: Case, seed: int, sequence: SequenceParallel) -> Tensor:
    """Of inputs that are drawn."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.copy_(torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.dtype))
        return x

    inputs = denoiser_inputs(case.model, case.batch, sequence, device=CUDA)
    out = model(**{name: drawn(inputs.pop(name)) for name in list(inputs)})
    return (out.float() if out.dtype == torch.bfloat16 else out).square().sum()
