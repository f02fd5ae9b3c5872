"""References of training samples as latents: each coded by itself, now or ahead of training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.assembly.encoders import Encoders
from opensora.conditioning.references import Part, grey_behind
from opensora.datasets.loading.feature_store import StoredFeatures
from opensora.models.base import Denoising

if TYPE_CHECKING:
    from opensora.datasets.loading.reader import Batch


@torch.no_grad()
def code_part(encoders: Encoders, batch: "Batch", part: Part, samples: Sequence[int] | None = None) -> Tensor:
    """(S, C, part.latents, H', W') on the device of ``encoders``: what the autoencoder makes of these frames alone.

    Where it draws, the draw is of (seed, epoch, sample, name of the part), as in ``Encoders.latents``.

    Args:
        samples: numbers of the samples in the batch; None: all.
    """
    rows = list(range(len(batch.sample_ids))) if samples is None else list(samples)
    if encoders.stored:
        assert isinstance(batch.features, StoredFeatures)
        return batch.features.references[part.name][rows].to(encoders.device)
    pixels = _pixels(encoders, batch, part, rows)
    ids = tuple(batch.sample_ids[row] for row in rows)
    return encoders.latents(pixels, batch.epoch, ids, f"posterior {part.name}")


@torch.no_grad()
def code_clip(encoders: Encoders, batch: "Batch", part: Part, samples: Sequence[int] | None = None) -> Tensor:
    """(S, C, T', H', W'): what the autoencoder makes of clips whose first frames are those of ``part``, and the rest
    grey; the mode, where it draws latents.

    Args:
        samples: numbers of the samples in the batch; None: all.
    """
    rows = list(range(len(batch.sample_ids))) if samples is None else list(samples)
    if encoders.stored:
        assert isinstance(batch.features, StoredFeatures)
        return batch.features.references[stored_name(part, whole=True)][rows].to(encoders.device)
    assert encoders.autoencoder is not None
    clips = grey_behind(_pixels(encoders, batch, part, rows), batch.bucket.frames)
    return encoders.autoencoder.encode(clips, encoders.run_tiles)


def codes_whole(denoising: Denoising) -> bool:
    """Whether a model reads known frames as one clip with grey ones."""
    return denoising.references == "clip"


def stored_name(part: Part, *, whole: bool) -> str:
    """What the code of a part is called among stored features: ``head_1``, or ``clip_head_1`` with the grey rest."""
    return f"clip_{part.name}" if whole else part.name


def _pixels(encoders: Encoders, batch: "Batch", part: Part, rows: list[int]) -> Tensor:
    """(S, 3, part.frames, H, W) in [-1, 1]"""
    assert batch.pixels is not None
    return part.of(batch.pixels[rows], part.frames).to(encoders.device, non_blocking=True).float() / 127.5 - 1
