"""How long and how large latents are: clips of any length, coded whole or in pieces along time.

``latents`` is what the networks make. ``stated`` is what ``get_latent_size`` of the published classes says, which the
family's own samplers draw noise by: it differs from the former where a clip is no whole number of pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Size: TypeAlias = tuple[int, int, int]  # (frames, height, width)
Stated: TypeAlias = tuple[int | None, int | None, int | None]  # None: passed through

QUARTER = 4  # frames per latent frame of the autoencoders of clips
SPACE = 8  # pixels per latent
MOST_MADE = 64  # frames beyond those asked for; of a piece and of its statistics there are fewer


def quarter(frames: int) -> int:
    """A fourth, rounded up."""
    return -(-frames // QUARTER)


def eighth(pixels: int) -> int:
    """As three convolutions of stride 2 leave it that are padded behind alone."""
    return pixels // SPACE


@dataclass(frozen=True)
class FrameByFrame:
    """Every frame is an image."""

    stride: int = SPACE

    def latents(self, frames: int, height: int, width: int) -> Size:
        return frames, *_plane(height, width, self.stride, lambda size: size // self.stride)

    def frames(self, latent_frames: int) -> int:
        return latent_frames

    def made(self, frames: int) -> int:
        return frames

    def stated(self, frames: int | None, height: int | None, width: int | None, *, whole: bool = False) -> Stated:
        """As of Open-Sora 1.1 and later; ``whole``: as of 1.0, which takes no other sizes than multiples.

        Raises:
            ValueError: a size that is no multiple.
        """
        if whole and any(size is None or size % n for size, n in ((frames, 1), (height, SPACE), (width, SPACE))):
            raise ValueError(f"{height}x{width} pixels do not fit the autoencoder: use multiples of {SPACE}")
        return frames, _passed(height, eighth), _passed(width, eighth)


@dataclass(frozen=True)
class PaddedPieces:
    """Of Open-Sora 1.2: pieces of ``length`` frames, each with zero frames in front of it to be whole latents."""

    length: int | None = 17  # None: a clip is one piece

    @property
    def latent_length(self) -> int | None:
        """Latent frames of a whole piece."""
        return None if self.length is None else quarter(self.length)

    def latents(self, frames: int, height: int, width: int) -> Size:
        return self._count(frames), *_plane(height, width, SPACE, eighth)

    def frames(self, latent_frames: int) -> int:
        if self.length is None or self.latent_length is None:
            return QUARTER * latent_frames
        pieces, rest = divmod(latent_frames, self.latent_length)
        return pieces * self.length + QUARTER * rest

    def made(self, frames: int) -> int:
        return frames

    def stated(self, frames: int | None, height: int | None, width: int | None) -> Stated:
        return _passed(frames, self._count), _passed(height, eighth), _passed(width, eighth)

    def pieces(self, frames: int) -> list[slice]:
        """Frames of a clip that are coded together."""
        return _runs(frames, self.length, self.length)

    def latent_pieces(self, latent_frames: int) -> list[slice]:
        """Latent frames that are decoded together."""
        return _runs(latent_frames, self.latent_length, self.latent_length)

    def asked(self, frames: int, pieces: int) -> list[int]:
        """Of how many frames each of so many pieces is said to be, where they are ``frames`` together."""
        if self.length is None:
            return [frames] * pieces
        return [min(self.length, frames - piece * self.length) for piece in range(pieces)]

    def _count(self, frames: int) -> int:
        return sum(quarter(piece.stop - piece.start) for piece in self.pieces(frames))


@dataclass(frozen=True)
class CausalPieces:
    """Of Open-Sora 1.3: pieces of ``length`` frames, neighbours with a frame in common where they ``overlap``."""

    length: int | None = 17  # None: a clip is one piece
    overlap: bool = True
    multiple: int = 1  # of latent frames, but for one alone: statistics of so many places

    @property
    def latent_length(self) -> int | None:
        """Latent frames of a whole piece."""
        return None if self.length is None else quarter(self.length)

    def latents(self, frames: int, height: int, width: int) -> Size:
        count = sum(quarter(piece.stop - piece.start) for piece in self.pieces(frames))
        if count > 1 and count % self.multiple:
            raise ValueError(
                f"{frames} frames do not fit the autoencoder: they become {count} latent frames, "
                f"must become a multiple of {self.multiple} with normalization=video_5frames"
            )
        return count, *_plane(height, width, 2, _rounded_eighth)

    def frames(self, latent_frames: int) -> int:
        pieces = self.latent_pieces(latent_frames)
        whole = sum(QUARTER * (piece.stop - piece.start) - QUARTER + 1 for piece in pieces)
        return whole - (len(pieces) - 1 if self.overlap else 0)

    def made(self, frames: int) -> int:
        for made in range(frames, frames + MOST_MADE * self.multiple):
            count = sum(quarter(piece.stop - piece.start) for piece in self.pieces(made))
            if self.frames(count) >= frames and (count == 1 or count % self.multiple == 0):
                return made
        raise ValueError(f"{frames} frames do not fit the autoencoder")

    def stated(self, frames: int | None, height: int | None, width: int | None) -> Stated:
        rounded: Callable[[int], int] = lambda size: -(-size // SPACE)  # noqa: E731
        return _passed(frames, self._stated_frames), _passed(height, rounded), _passed(width, rounded)

    def pieces(self, frames: int) -> list[slice]:
        """Frames of a clip that are coded together; a still is never cut."""
        if self.length is None or frames == 1:
            return [slice(0, frames)]
        if not self.overlap:
            return _runs(frames, self.length, self.length)
        return _runs(frames, self.length, self.length - 1, stop=frames - 1)

    def latent_pieces(self, latent_frames: int) -> list[slice]:
        """Latent frames that are decoded together."""
        return _runs(latent_frames, self.latent_length, self.latent_length)

    def _stated_frames(self, frames: int) -> int:
        """Of whole pieces alone."""
        if frames == 1:
            return 1
        if self.length is None or self.latent_length is None:
            return (frames - 1) // QUARTER + 1
        pieces = (frames - 1) // (self.length - 1) if self.overlap else frames // self.length
        return pieces * self.latent_length


def _runs(count: int, length: int | None, step: int | None, stop: int | None = None) -> list[slice]:
    """Runs of ``length`` that begin every ``step`` before ``stop``; the last ones are as long as there is room."""
    if length is None or step is None:
        return [slice(0, count)]
    return [slice(i, min(i + length, count)) for i in range(0, count if stop is None else stop, step)]


def _rounded_eighth(pixels: int) -> int:
    """Half rounded down, then twice half rounded up."""
    half = pixels // 2
    quarter = (half + 1) // 2
    return (quarter + 1) // 2


def _plane(height: int, width: int, least: int, of: Callable[[int], int]) -> tuple[int, int]:
    found = of(height), of(width)
    if not all(found):
        raise ValueError(f"{height}x{width} pixels do not fit the autoencoder: use {least}x{least} or more")
    return found


def _passed(size: int | None, of: Callable[[int], int]) -> int | None:
    return None if size is None else of(size)
