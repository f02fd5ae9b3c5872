"""An autoencoder without weights: a causal, orthonormal block transform of colour, time and space.

A clip is cut into blocks of 4 frames x s x s pixels (the first frame on its own: 1 x s x s). Each block is written in
an orthonormal cosine basis over (colour, time, row, column), and the ``channels`` coefficients with the largest
expected energy are kept. Because the basis is orthonormal and the latents carry one global factor, Gaussian noise on
latents is Gaussian noise on (low-pass filtered) pixels, and the mean squared error of a decoded clip is the energy of
the dropped coefficients.

Colour axes are the three-point cosine basis on (R, G, B): (1, 1, 1)/sqrt 3 is luma, (1, 0, -1)/sqrt 2 and
(1, -2, 1)/sqrt 6 are chroma.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from opensora.models.base import AutoencoderShape
from opensora.utils.limits import SCALE, Limits
from opensora.utils.tasks import Task, TaskRunner, one_by_one

TEMPORAL = 4  # frames per block after the first frame
COLOURS = 3

# The expected energy of a coefficient is taken as cost^-2 with cost = COLOUR_COST[colour] * (1 + row^2 + column^2 +
# (TIME_COST k)^2). The constants serve the PSNR of 64 kept coefficients on natural clips and on rendered shapes.
COLOUR_COST = (1.0, 2.0, 2.0)
TIME_COST = 2.0

Frequency = tuple[int, int, int, int]  # (colour axis, k, row, column)


@dataclass(frozen=True, kw_only=True)
class DCTConfig:
    """The block transform. ``channels`` may be anything up to 12 * spatial^2 (then nothing is lost)."""

    kind: Literal["dct"] = "dct"
    spatial: Literal[4, 8] = 8  # pixels per block along height and width
    channels: int = 64  # coefficients kept per block
    scale: float | None = None  # latents = scale * coefficients; None: unit variance for pixels of std 0.5
    equalize: float = 0.0  # 0: one factor for all channels; 1: every channel is brought to about the same variance

    LIMITS: ClassVar[Limits] = {"scale": SCALE}

    def __post_init__(self) -> None:
        if self.spatial not in (4, 8):
            raise ValueError(f"spatial={self.spatial}: must be one of 4, 8")
        most = COLOURS * TEMPORAL * self.spatial**2
        if not 1 <= self.channels <= most:
            raise ValueError(f"channels={self.channels}: must be 1 to {most} with spatial={self.spatial}")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale={self.scale}: must be a number > 0, or null")
        if not 0 <= self.equalize <= 1:
            raise ValueError(f"equalize={self.equalize}: must be a number from 0 to 1")


def expected_cost(frequency: Frequency) -> float:
    """Grows as the expected energy of a coefficient falls; energy is about cost^-2."""
    colour, k, row, column = frequency
    return COLOUR_COST[colour] * (1 + row**2 + column**2 + (TIME_COST * k) ** 2)


def kept_frequencies(spatial: int, channels: int) -> list[Frequency]:
    """Channel index -> frequency in a block of 4 frames, most expected energy first, ties in tuple order."""
    every = [
        (colour, k, row, column)
        for colour in range(COLOURS)
        for k in range(TEMPORAL)
        for row in range(spatial)
        for column in range(spatial)
    ]
    return sorted(every, key=lambda frequency: (expected_cost(frequency), frequency))[:channels]


def first_frame_frequencies(spatial: int, channels: int) -> list[Frequency | None]:
    """Channel index -> frequency (k = 0) for the first frame.

    A channel that means a frequency with k = 0 in later blocks means the same here. The other channels take the
    next spatial frequencies in the same order (a still is therefore coded sharper than a group of 4 frames), and
    stay empty (None, always zero) when there are no more.
    """
    later = kept_frequencies(spatial, channels)
    shared = {frequency for frequency in later if frequency[1] == 0}
    whole = kept_frequencies(spatial, COLOURS * TEMPORAL * spatial**2)
    detail = iter([frequency for frequency in whole if frequency[1] == 0 and frequency not in shared])
    return [frequency if frequency[1] == 0 else next(detail, None) for frequency in later]


def cosine_basis(size: int) -> Tensor:
    """Orthonormal DCT-II, (frequency, position), fp64."""
    position = torch.arange(size, dtype=torch.float64)
    frequency = position[:, None]
    basis = torch.cos(torch.pi * (position + 0.5) * frequency / size) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def block_basis(frequencies: list[Frequency] | list[Frequency | None], frames: int, spatial: int) -> Tensor:
    """Rows of the basis over a flattened (colour, frame, row, column) block: (channels, 3*frames*s*s) fp64."""
    colours, times, space = cosine_basis(COLOURS), cosine_basis(frames), cosine_basis(spatial)
    rows = []
    for frequency in frequencies:
        if frequency is None:
            rows.append(torch.zeros(COLOURS * frames * spatial**2, dtype=torch.float64))
            continue
        colour, k, row, column = frequency
        rows.append(torch.einsum("c,t,h,w->cthw", colours[colour], times[k], space[row], space[column]).flatten())
    return torch.stack(rows)


class DCTAutoencoder:
    """Encode, decode and nothing to train. Computes in fp32 (fp64 for fp64 input) and returns that type.

    Every latent frame is a piece of work of its own.
    """

    causal = True
    is_costly = False  # one small matrix product per frame: to send it takes longer

    def __init__(self, cfg: DCTConfig, device: torch.device | str = "cpu") -> None:
        self.cfg = cfg
        self.channels = cfg.channels
        self.stride: tuple[int, int, int] = (TEMPORAL, cfg.spatial, cfg.spatial)
        later = kept_frequencies(cfg.spatial, cfg.channels)
        first = first_frame_frequencies(cfg.spatial, cfg.channels)
        self._later = block_basis(later, TEMPORAL, cfg.spatial).to(device)
        self._first = block_basis(first, 1, cfg.spatial).to(device)
        block = COLOURS * TEMPORAL * cfg.spatial**2
        scale = cfg.scale or (cfg.channels / (block * 0.25)) ** 0.5
        self._gain_later = scale * self._equalizer(later).to(device)
        self._gain_first = scale * self._equalizer(first).to(device)

    def _equalizer(self, frequencies: list[Frequency] | list[Frequency | None]) -> Tensor:
        """Per-channel factors cost^equalize, scaled so that the expected energy of all channels stays the same."""
        energy = torch.tensor([expected_cost(f) ** -2 if f else 0.0 for f in frequencies], dtype=torch.float64)
        factor = torch.where(energy > 0, energy.clamp_min(1e-12) ** (-self.cfg.equalize / 2), 1.0)
        return factor * (energy.sum() / (energy * factor**2).sum()).sqrt()

    @torch.no_grad()
    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1], T = 4k+1 -> (B, channels, k+1, H/s, W/s).

        Raises:
            ValueError: T, H or W that the blocks do not tile.
        """
        frames, height, width = pixels.shape[2:]
        s = self.cfg.spatial
        if frames % TEMPORAL != 1 or height % s or width % s:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} does not fit: use {TEMPORAL}k+1 frames, sizes in {s}s"
            )
        x = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        shape = (len(x), self.channels, 1, height // s, width // s)
        work = [Task(partial(self._to_latents, x[:, :, :1], 1, self._first, self._gain_first), shape)]
        for block in x[:, :, 1:].split(TEMPORAL, dim=2):
            if block.shape[2]:  # a still has nothing behind its first frame
                work.append(Task(partial(self._to_latents, block, TEMPORAL, self._later, self._gain_later), shape))
        return torch.cat(run(work), dim=2)

    @torch.no_grad()
    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, 4T'-3, s*H', s*W'), clamped to [-1, 1]."""
        z = latents.to(torch.promote_types(latents.dtype, torch.float32))
        side = (self.cfg.spatial * z.shape[3], self.cfg.spatial * z.shape[4])
        frames = z.split(1, dim=2)
        bases = [(1, self._first, self._gain_first)] + [(TEMPORAL, self._later, self._gain_later)] * (len(frames) - 1)
        work = [
            Task(partial(self._to_pixels, frame, count, basis, gain), (len(z), COLOURS, count, *side))
            for frame, (count, basis, gain) in zip(frames, bases, strict=True)
        ]
        return torch.cat(run(work), dim=2).clamp(-1, 1)

    def _to_latents(self, x: Tensor, frames: int, basis: Tensor, gain: Tensor) -> Tensor:
        s = self.cfg.spatial
        blocks = rearrange(x, "b c (t kt) (h kh) (w kw) -> b t h w (c kt kh kw)", kt=frames, kh=s, kw=s)
        analysis = (basis * gain[:, None]).to(x.dtype)
        return rearrange(blocks @ analysis.T, "b t h w c -> b c t h w")

    def _to_pixels(self, z: Tensor, frames: int, basis: Tensor, gain: Tensor) -> Tensor:
        s = self.cfg.spatial
        synthesis = (basis / gain[:, None]).to(z.dtype)
        blocks = rearrange(z, "b c t h w -> b t h w c") @ synthesis
        return rearrange(blocks, "b t h w (c kt kh kw) -> b c (t kt) (h kh) (w kw)", c=COLOURS, kt=frames, kh=s, kw=s)


def dct_shape(cfg: DCTConfig) -> AutoencoderShape:
    """As the configuration says."""
    return AutoencoderShape(cfg.channels, (TEMPORAL, cfg.spatial, cfg.spatial), DCTAutoencoder.causal)
