"""Sampling with ``offload`` on the simulated device, and every byte that is on it."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from acceleration.blocks import block_streaming
from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.parallelize import parallelize
from acceleration.protocol import blocks
from acceleration.sequence import SequenceParallel
from opensora.assembly.components import Components
from opensora.assembly.token_layout import token_layout
from opensora.assembly.turns import AUTOENCODER, DENOISER, TEXT, Turns, for_sampling, streams_blocks
from opensora.inference.pipeline import build_api
from opensora.models.base import TextFeatures
from opensora.models.families import build_model
from opensora.models.mmdit import MMDiTConfig
from opensora.sampling.caches import CacheConfig, NoCache
from opensora.sampling.options import SamplingOption
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.tasks import TaskRunner, one_by_one
from tests.device.simulated import CUDA, DeviceTensor, simulated_cuda
from tests.dist.layouts import FP64
from tests.dist.parity import fill
from tests.dist.problem import FakeText, PassThrough

# Weights are most of what is there, as in the models that offload is for.
MODEL = MMDiTConfig(
    in_channels=8,
    patch_size=1,
    vec_in_dim=12,
    context_in_dim=12,
    hidden_size=96,
    num_heads=4,
    depth=3,
    depth_single_blocks=3,
    axes_dim=(8, 8, 8),
    cond_embed=False,
)
OPTION = SamplingOption(width=5, height=2, num_frames=3, num_steps=3, guidance=4.0)
WIDE = 512  # of the toys' layers


class DeviceBytes:
    """Bytes of all tensors on the simulated device: ``now``, and at most since ``reset``."""

    def __init__(self) -> None:
        self._alive: dict[int, Any] = {}
        self.most = 0

    def now(self) -> int:
        return sum(storage.nbytes() for ref in [*self._alive.values()] if (storage := ref()) is not None)

    def look(self) -> None:
        self.most = max(self.most, self.now())

    def reset(self, device: torch.device) -> None:
        self.most = self.now()

    def peak(self, device: torch.device) -> float:
        """In GiB, as ``Turns`` asks for it."""
        return self.most / 2**30

    @contextmanager
    def counting(self) -> Iterator[None]:
        created, resized = DeviceTensor.__init__, torch.UntypedStorage.resize_

        def create(tensor: DeviceTensor, held: Tensor) -> None:
            created(tensor, held)
            storage = held.untyped_storage()
            self._alive[id(storage)] = weakref.ref(storage)
            self.look()

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resized(storage, size)
            self.look()
            return result

        with (
            mock.patch.object(DeviceTensor, "__init__", create),
            mock.patch.object(torch.UntypedStorage, "resize_", resize),
        ):
            yield


class WideText(FakeText):
    """Features of the toy behind two layers that are the encoder's weight."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.layers = layers(12, "text").to(device)

    def encode(self, prompts: list[str]) -> TextFeatures:
        found = super().encode(prompts)
        return TextFeatures(txt=self.layers(found.txt.double()), y_vec=found.y_vec, mask=found.mask)


class WideCodec(PassThrough):
    """The same of an autoencoder."""

    def __init__(self, device: torch.device) -> None:
        self.layers = layers(8, "codec").to(device)

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return self.layers(latents.movedim(1, -1)).movedim(-1, 1)


def layers(width: int, name: str) -> nn.Module:
    made = nn.Sequential(nn.Linear(width, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, width)).double()
    for key, parameter in made.requires_grad_(False).named_parameters():
        fill(f"{name}.{key}", parameter.data)
    return made


def nbytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.parameters())


@dataclass(frozen=True)
class Sampled:
    """What one way of offloading made, and took."""

    clips: Tensor  # of two batches
    peaks: dict[str, int]  # most bytes on the device, by turn
    kept: dict[str, int]  # bytes of weights that the process keeps, by turn
    block: int  # of the largest block
    outside: int  # of the denoiser's weights outside of blocks
    lines: str  # for the log


def every_way(degrees: dict[str, int], cache: CacheConfig = NoCache()) -> dict[str, Sampled]:  # noqa: B008
    """In a process of a group: with every value of ``offload``."""
    return {offload: sampled(offload, degrees, cache) for offload in ("none", "models", "blocks")}


def sampled(offload: Any, degrees: dict[str, int], cache: CacheConfig) -> Sampled:
    counted = DeviceBytes()
    with simulated_cuda(), counted.counting():
        plain = ParallelConfig(zero=3, mesh=MeshConfig(**degrees), precision=FP64)
        parallel = ParallelConfig(**{**vars(plain), **for_sampling(plain, offload)})
        mesh = meshes.build(parallel.mesh, dist.get_world_size(), CUDA)
        turns = Turns(CUDA, counted.peak, counted.reset)
        text, codec = WideText(CUDA), WideCodec(CUDA)
        kept = {TEXT: nbytes(text.layers), AUTOENCODER: nbytes(codec.layers)}
        text_encoder, autoencoder = turns.of(TEXT, text, offload), turns.of(AUTOENCODER, codec, offload)
        with torch.device("meta"):
            model = build_model(MODEL)
        whole, sizes = 2 * nbytes(model), [2 * nbytes(block) for block in blocks(model)]  # fp32 there, fp64 here
        kept[DENOISER] = whole // dist.get_world_size()
        streams = offload == "blocks" and streams_blocks(mesh)
        model = parallelize(model, parallel, mesh, CUDA, fill, whole_on_host=streams).requires_grad_(False).eval()
        if streams:
            block_streaming.apply(model, CUDA)
        if offload == "models":
            turns.add(DENOISER, [model])
        turns.told_by(model)
        parts = Components(
            model=model,
            cfg=MODEL,
            autoencoder=autoencoder,
            text_encoder=text_encoder,
            objective=RectifiedFlowConfig(),
            layout=token_layout(MODEL, SequenceParallel(mesh)),
            mesh=mesh,
            device=CUDA,
            prompt_suffix=False,
            turns=turns,
        )
        api = build_api(parts)
        with torch.no_grad():
            option = replace(OPTION, cache=cache)
            clips = [api(option, seed=[3, 11], text=["a", text], neg=["", "dim"]).cpu() for text in ("b c", "d")]
        lines = turns.summary()
        peaks = {name: round(gib * 2**30) for name, gib in turns.peaks.items()}
    return Sampled(torch.cat(clips), peaks, kept, max(sizes), whole - sum(sizes), lines)
