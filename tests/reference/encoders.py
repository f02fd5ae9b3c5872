"""The encoders that need no download: pixels to latents and back in fp32 or fp64, prompts to features in fp64.

The project encodes text by a library, in fp32. Its rounding depends on the library's version, so a run is compared
with features of the project that were compared with these before: ``test_training.py`` does both.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.reference import draws

COLOUR_COST, TIME_COST = (1.0, 2.0, 2.0), 2.0
GROUP = 4  # frames of a block, after the first frame


@dataclass(frozen=True)
class BlockTransform:
    """Blocks of 4 frames (the first: 1) x s x s pixels x 3 colours in an orthonormal cosine basis, of which the
    ``channels`` frequencies of least cost = colour * (1 + row^2 + column^2 + (2 time)^2) are kept.
    """

    spatial: int
    channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(3, T, H, W) in [-1, 1] -> (channels, T', H', W')."""
        first = self._analyse(pixels[:, :1], *self._matrix(1))
        groups = [pixels[:, i : i + GROUP] for i in range(1, pixels.shape[1], GROUP)]
        return torch.cat([first, *(self._analyse(group, *self._matrix(GROUP)) for group in groups)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(channels, T', H', W') -> (3, T, H, W), clamped to [-1, 1]; in the type of the latents."""
        parts = [self._build(latents[:, i], *self._matrix(GROUP if i else 1)) for i in range(latents.shape[1])]
        return torch.cat(parts, dim=1).clamp(-1, 1)

    def _analyse(self, block: Tensor, basis: Tensor, gain: float) -> Tensor:
        frames, height, width, s = block.shape[1], block.shape[2], block.shape[3], self.spatial
        cut = block.reshape(3, frames, height // s, s, width // s, s).permute(2, 4, 0, 1, 3, 5)  # (h, w, c, t, s, s)
        found = cut.flatten(2) @ (basis * gain).to(block.dtype).T  # (h, w, channels)
        return found.permute(2, 0, 1)[:, None]

    def _build(self, latent: Tensor, basis: Tensor, gain: float) -> Tensor:
        frames, s = basis.shape[1] // (3 * self.spatial**2), self.spatial
        height, width = latent.shape[1:]
        blocks = latent.permute(1, 2, 0) @ (basis / gain).to(latent.dtype)
        blocks = blocks.reshape(height, width, 3, frames, s, s).permute(2, 3, 0, 4, 1, 5)
        return blocks.reshape(3, frames, height * s, width * s)

    def _matrix(self, frames: int) -> tuple[Tensor, float]:
        """((channels, 3 * frames * s * s) fp64, the factor that gives latents unit variance for pixels of std 0.5)."""
        chosen = self._frequencies() if frames == GROUP else self._still_frequencies()
        rows = [torch.zeros(3, frames, self.spatial, self.spatial, dtype=torch.float64) for _ in chosen]
        for row, frequency in zip(rows, chosen, strict=True):
            if frequency is not None:
                waves = [_wave(n, f) for n, f in zip((3, frames, self.spatial, self.spatial), frequency, strict=True)]
                row += waves[0][:, None, None, None] * waves[1][:, None, None] * waves[2][:, None] * waves[3]
        factor = math.sqrt(self.channels / (3 * GROUP * self.spatial**2 * 0.25))
        return torch.stack(rows).flatten(1), factor

    def _frequencies(self, count: int | None = None) -> list[tuple[int, int, int, int]]:
        """(colour, time, row, column) of a block of 4 frames, least cost first, ties in tuple order."""
        s = range(self.spatial)
        every = [(colour, k, row, column) for colour in range(3) for k in range(GROUP) for row in s for column in s]
        every.sort(key=_cost)  # stable: ties keep tuple order
        return every[: self.channels if count is None else count]

    def _still_frequencies(self) -> list[tuple[int, int, int, int] | None]:
        """Of a first frame: channels of moving frequencies hold the next still ones, as long as there are any."""
        kept = self._frequencies()
        still = [f for f in self._frequencies(3 * GROUP * self.spatial**2) if f[1] == 0 and f not in kept]
        return [f if f[1] == 0 else still.pop(0) if still else None for f in kept]


def _cost(frequency: tuple[int, int, int, int]) -> float:
    colour, k, row, column = frequency
    return COLOUR_COST[colour] * (1 + row**2 + column**2 + (TIME_COST * k) ** 2)


def _wave(size: int, frequency: int) -> Tensor:
    """Orthonormal DCT-II."""
    scale = math.sqrt((1 if frequency == 0 else 2) / size)
    return scale * torch.cos(torch.pi * (torch.arange(size, dtype=torch.float64) + 0.5) * frequency / size)


@dataclass(frozen=True)
class Text:
    """A prompt's rows, without padding, and its pooled vector."""

    rows: Tensor  # (words + 1 at most, dim), or with zeros behind
    vec: Tensor  # (dim,)


class TextEncoder(Protocol):
    """Prompts to features."""

    def encode(self, prompt: str) -> Text: ...


HEAD = 32  # dims of a head
COMMON = (
    "a person walks along the street in the rain",
    "two small dogs play on a beach at sunset",
    "the camera slowly turns around an old wooden house",
    "a close view of hands that cut fresh vegetables",
    "large waves break against dark rocks below the cliff",
    "a yellow car drives past tall buildings at night",
    "clouds move quickly over green hills and a lake",
    "an empty white room with one round window",
)


@dataclass(frozen=True)
class ByteText:
    """A T5 encoder on bytes with drawn weights; a head attends to one offset: 0, -1, +1, -2, ... of its number.

    Features are means over the bytes of a word, less what common texts have in common, normalised.
    """

    dim: int
    depth: int
    max_words: int
    seed: int
    mask: bool = True  # False: zeros behind the words are read as well

    def encode(self, prompt: str) -> Text:
        words = self._words(prompt)
        common = self._common()
        rows = layer_norm(words[: self.max_words] - common, (self.dim,))
        if not self.mask:
            rows = torch.cat([rows, rows.new_zeros(self.max_words - len(rows), self.dim)])
        return Text(rows, layer_norm(words.mean(dim=0) - common, (self.dim,)))

    @cache  # noqa: B019  (one encoder in all)
    def _common(self) -> Tensor:
        return torch.stack([self._words(text).mean(dim=0) for text in COMMON]).mean(dim=0)

    def _words(self, prompt: str) -> Tensor:
        """(words + 1, dim): the mean over each word's bytes, and the end token."""
        words = [word.encode() for word in prompt.split()]
        hidden = self._hidden(b" ".join(words))
        found, at = [], 0
        for word in words:
            found.append(hidden[at : at + len(word)].sum(dim=0) / len(word))
            at += len(word) + 1
        return torch.stack([*found, hidden[-1]])

    def _hidden(self, text: bytes) -> Tensor:
        """(bytes + 1, dim): T5's last hidden state; a byte is token 3 + byte, the end token 1."""
        x = self._drawn("shared.weight", 384, self.dim, fan_in=1)[[*(3 + byte for byte in text), 1]]
        for block in range(self.depth):
            prefix = f"encoder.block.{block}.layer"
            x = x + self._attention(_rms(x), f"{prefix}.0.SelfAttention")
            inner = _rms(x) @ self._drawn(f"{prefix}.1.DenseReluDense.wi.weight", 4 * self.dim, self.dim).T
            x = x + inner.relu() @ self._drawn(f"{prefix}.1.DenseReluDense.wo.weight", self.dim, 4 * self.dim).T
        return _rms(x)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        q, k, v = (
            (x @ self._drawn(f"{name}.{part}.weight", self.dim, self.dim, gain=0.1 if part == "q" else 1.0).T)
            .unflatten(-1, (-1, HEAD))
            .transpose(0, 1)
            for part in "qkv"
        )  # (heads, bytes, 32) each; logits are not divided by anything
        offsets = torch.tensor([-(head + 1) // 2 if head % 2 else head // 2 for head in range(len(q))])
        at = torch.arange(x.shape[0])
        near = (at[None, :] - at[:, None])[None] == offsets[:, None, None]
        weights = (q @ k.transpose(1, 2) + 12.0 * near).softmax(dim=-1)
        joined = (weights @ v).transpose(0, 1).flatten(1)
        return joined @ self._drawn(f"{name}.o.weight", self.dim, self.dim).T

    def _drawn(self, name: str, rows: int, columns: int, *, fan_in: int = 0, gain: float = 1.0) -> Tensor:
        drawn = draws.normal((rows, columns), "byte text encoder", self.seed, name)
        return (drawn * gain / (fan_in or columns) ** 0.5).double()


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
