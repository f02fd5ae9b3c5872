"""References of training samples as latents: each coded by itself, now or ahead of training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.assembly.encoders import Encoders
from opensora.conditioning.references import Part
from opensora.datasets.loading.feature_store import StoredFeatures

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
    assert batch.pixels is not None
    pixels = part.of(batch.pixels[rows], part.frames).to(encoders.device, non_blocking=True).float() / 127.5 - 1
    ids = tuple(batch.sample_ids[row] for row in rows)
    return encoders.latents(pixels, batch.epoch, ids, f"posterior {part.name}")
