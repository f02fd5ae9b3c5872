"""Memory of encoding and decoding clips: found on the meta device, tile by tile, for any autoencoder and size.

Counted is what an allocator would be asked for: pixels, latents, tiles, and what the network makes of one tile. Not
counted are weights (``forecast.frozen_bytes``), and what a kernel needs inside, as the workspace of a convolution.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from acceleration.accounting.peak_memory import Footprint
from acceleration.accounting.rank_layout import RankLayout
from acceleration.diagnostics.memory_usage import Allocations
from opensora.assembly.reference_codes import codes_whole
from opensora.assembly.stored_features import encoder_dtype
from opensora.conditioning.references import Part, fits, parts_of
from opensora.config.run import RunConfig
from opensora.models.base import Autoencoder, latent_grid
from opensora.models.families import describe
from opensora.models.vae import AutoencoderConfig, autoencoder_shape, build_autoencoder
from opensora.planner.layout_forecast import Shape
from opensora.utils.tasks import Task

COLOURS = 3
LATENT_BYTES = 2 * 4  # of a latent value in fp32, and of its reference


@lru_cache(maxsize=8)
def _network(cfg: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    """Without memory; a published one takes a second to build."""
    return build_autoencoder(cfg, "meta", dtype)


@lru_cache
def encode_bytes(cfg: AutoencoderConfig, clips: int, frames: int, height: int, width: int, dtype: torch.dtype) -> int:
    """Most bytes at any moment while so many clips are encoded together, beside the weights of the autoencoder, with
    the pixels (fp32). Processes that share the tiles need no more each."""
    autoencoder = _network(cfg, dtype)
    with Allocations("meta") as seen, _FusedAttention():
        pixels = torch.empty(clips, COLOURS, frames, height, width, device="meta")
        autoencoder.encode(pixels, _LastOfEach(dtype))
    return seen.peak


@lru_cache
def decode_bytes(cfg: AutoencoderConfig, clips: int, frames: int, height: int, width: int, dtype: torch.dtype) -> int:
    """The same while they are decoded, with their latents (fp32). The size is that of the pixels."""
    autoencoder = _network(cfg, dtype)
    grid = latent_grid(frames, height, width, autoencoder)
    with Allocations("meta") as seen, _FusedAttention():
        latents = torch.empty(clips, autoencoder.channels, *grid, device="meta")
        autoencoder.decode(latents, _LastOfEach(dtype))
    return seen.peak


def encoding_bytes(cfg: RunConfig, state: Footprint, place: RankLayout, shape: Shape, batches: int) -> int:
    """What a process holds in training while a micro-batch is encoded; 0 where stored features are read.

    Args:
        state: what it keeps between steps, and its gradients.
        batches: micro-batches of a step: while later ones are encoded, gradients of those before are there, and for
            ZeRO 0 and 1 whole weights.
    """
    if cfg.data.features or shape.clips is None:
        return 0
    coding = _with_references(cfg, shape.clips, encoder_dtype(cfg))
    if batches == 1:
        return coding + state.state
    whole = state.weights * place.fsdp_degree if place.cfg.zero < 2 else 0
    return coding + state.total + whole * place.itemsize("compute") // place.itemsize("master")


def _with_references(cfg: RunConfig, clips: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """Clips, and then their references, each coded by itself beside the latents of the clips (fp32)."""
    samples, frames, height, width = clips
    found = [encode_bytes(cfg.vae, *clips, dtype)]
    shape = autoencoder_shape(cfg.vae)
    latents = samples * shape.channels * prod(latent_grid(frames, height, width, shape)) * LATENT_BYTES
    for part in reference_parts(cfg, frames):
        coded = coded_with(cfg, part, frames)
        found.append(encode_bytes(cfg.vae, samples, coded, height, width, dtype) + latents)
    return max(found)


def reference_parts(cfg: RunConfig, frames: int) -> list[Part]:
    """What training codes by itself of clips with so many frames, for the kinds of references that it draws from."""
    shape = autoencoder_shape(cfg.vae)
    latents = latent_grid(frames, shape.stride[1], shape.stride[2], shape)[0]
    kinds = [kind for kind, weight in cfg.conditioning.references.items() if weight > 0 and fits(kind, latents, shape)]
    return list(dict.fromkeys(part for kind in kinds for part in parts_of(kind, shape) if part.frames <= frames))


def coded_with(cfg: RunConfig, part: Part, frames: int) -> int:
    """Frames that are coded for a part of a clip of so many: of the part, or of a whole clip, grey behind it."""
    return frames if codes_whole(describe(cfg.model)) else part.frames


def encode_flops(cfg: RunConfig, clips: tuple[int, int, int, int]) -> float:
    """Of encoding a micro-batch: its clips, and of their references what the kinds draw in the mean."""
    samples, frames, height, width = clips
    total, shape = float(encode_flops_of(cfg.vae, *clips)), autoencoder_shape(cfg.vae)
    latents = latent_grid(frames, height, width, shape)[0]
    kinds = {kind: w for kind, w in cfg.conditioning.references.items() if w > 0 and fits(kind, latents, shape)}
    for kind, weight in kinds.items():
        parts = (part for part in parts_of(kind, shape) if part.frames <= frames)
        lengths = (coded_with(cfg, part, frames) for part in parts)
        coded = sum(encode_flops_of(cfg.vae, samples, length, height, width) for length in lengths)
        total += coded * weight / sum(kinds.values())
    return total


@lru_cache
def encode_flops_of(cfg: AutoencoderConfig, clips: int, frames: int, height: int, width: int) -> int:
    """Floating-point operations of encoding so many clips, piece by piece."""
    autoencoder, counted = _network(cfg, torch.bfloat16), _Operations(torch.bfloat16)
    with _FusedAttention():
        autoencoder.encode(torch.empty(clips, COLOURS, frames, height, width, device="meta"), counted)
    return counted.total


@lru_cache
def decode_flops(cfg: AutoencoderConfig, clips: int, frames: int, height: int, width: int) -> int:
    """The same of decoding; the size is that of the pixels."""
    autoencoder, counted = _network(cfg, torch.bfloat16), _Operations(torch.bfloat16)
    grid = latent_grid(frames, height, width, autoencoder)
    with _FusedAttention():
        autoencoder.decode(torch.empty(clips, autoencoder.channels, *grid, device="meta"), counted)
    return counted.total


def heaviest_to_encode(shapes: Iterable[Shape]) -> list[Shape]:
    """Of every size in pixels the longest clips, and those that are most pixels together: no others need more."""
    by_size: dict[tuple[int, int], list[tuple[int, int, Shape]]] = {}
    for shape in shapes:
        if shape.clips:
            samples, frames, *size = shape.clips
            by_size.setdefault((size[0], size[1]), []).append((frames, samples * frames, shape))
    longest = [max(found, key=lambda one: one[:2])[2] for found in by_size.values()]
    largest = [max(found, key=lambda one: one[1::-1])[2] for found in by_size.values()]
    return longest + [shape for shape in largest if shape not in longest]


class _FusedAttention(TorchFunctionMode):
    """No scores are held: on devices attention is a kernel that keeps them to itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return named["query"].new_empty(*named["query"].shape[:-1], named["value"].shape[-1])


class _Operations:
    """Counts the operations of one piece of each shape, as often as there are such pieces."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.total = dtype, 0

    def __call__(self, work: Sequence[Task]) -> list[Tensor]:
        pieces = {piece.shape: piece for piece in work}
        for shape, piece in pieces.items():
            with FlopCounterMode(display=False) as counter:
                piece.run()
            self.total += counter.get_total_flops() * sum(one.shape == shape for one in work)
        return [torch.empty(piece.shape, dtype=self.dtype, device="meta") for piece in work]


class _LastOfEach:
    """Runs one piece of each shape, the last, when the results of those before are there: there is none heavier."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, work: Sequence[Task]) -> list[Tensor]:
        last = {piece.shape: index for index, piece in enumerate(work)}
        return [
            piece.run() if last[piece.shape] == index else torch.empty(piece.shape, dtype=self.dtype, device="meta")
            for index, piece in enumerate(work)
        ]
