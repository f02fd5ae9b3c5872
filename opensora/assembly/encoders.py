"""The frozen models of a run at work: from the pixels and prompts of a batch to latents and text features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensora.datasets.loading.feature_store import Features
from opensora.models.base import Autoencoder, TextEncoder, TextFeatures, Variational
from opensora.models.image import ImageEncoder
from opensora.schedulers.timesteps import draw_per_sample
from opensora.utils.files.upload import upload
from opensora.utils.tasks import TaskRunner, one_by_one

if TYPE_CHECKING:
    from opensora.datasets.loading.reader import Batch


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Autoencoder and encoders on this process's device, for training and for encoding ahead of it."""

    autoencoder: Autoencoder | None  # None: not needed, as batches hold features
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None = None  # of first frames; None: the model reads none, or batches hold features
    device: torch.device
    run_tiles: TaskRunner = one_by_one  # who codes the tiles of a clip
    stored: bool = False  # batches hold features in place of pixels
    seed: int = 0  # of what an autoencoder draws

    @torch.no_grad()
    def encode(self, batch: "Batch", text: TextFeatures | None = None) -> Features:
        """What the autoencoder and the text encoder make of a batch, or made of it before, on this device.

        ``text``: of its prompts, where they are encoded already.
        """
        if self.stored:
            assert batch.features is not None
            return Features(**{name: x.to(self.device) for name, x in batch.features.tensors().items()})
        assert batch.pixels is not None and self.autoencoder is not None
        pixels = batch.pixels.to(self.device, non_blocking=True).float() / 127.5 - 1  # (B, 3, T, H, W)
        text = text or self.text_encoder.encode(batch.prompts)
        latents = self.latents(pixels, batch.epoch, batch.sample_ids)
        picture = None if self.image_encoder is None else self.image_encoder.encode(pixels[:, :, 0])
        told = {"txt": text.txt, "y_vec": text.y_vec, "mask": text.mask, "label": text.label}
        return Features(latents=latents, **told, image_tokens=picture)  # type: ignore[arg-type]

    def latents(self, pixels: Tensor, epoch: int, sample_ids: tuple[int, ...], purpose: str = "posterior") -> Tensor:
        """What the autoencoder makes of (B, 3, T, H, W) in [-1, 1].

        Where it draws (``vae.sample=posterior``), the draw of a sample is one of (seed, epoch, sample id, purpose), as
        its crop is: the same in whatever micro-batch and layout, after a resume, and in features made ahead of it.
        """
        assert self.autoencoder is not None
        if not (isinstance(self.autoencoder, Variational) and self.autoencoder.samples):
            return self.autoencoder.encode(pixels, self.run_tiles)

        def draw(shape: tuple[int, ...], stage: str = "") -> Tensor:
            drawn_for = f"{purpose} {stage}" if stage else purpose
            return upload(draw_per_sample(self.seed, epoch, sample_ids, drawn_for, shape), self.device)

        return self.autoencoder.encode(pixels, self.run_tiles, draw)

    def encode_prompts(self, batches: "Sequence[Batch]") -> list[TextFeatures | None]:
        """Of the prompts of every batch, all encoded at once; None where they are stored."""
        if self.stored:
            return [None] * len(batches)
        counts = [len(batch.prompts) for batch in batches]
        text = self.text_encoder.encode([prompt for batch in batches for prompt in batch.prompts])
        masks, labels = ([None] * len(counts) if x is None else x.split(counts) for x in (text.mask, text.label))
        columns = zip(text.txt.split(counts), text.y_vec.split(counts), masks, labels, strict=True)
        return [TextFeatures(txt=txt, y_vec=vec, mask=mask, label=label) for txt, vec, mask, label in columns]

    @cached_property
    def null(self) -> TextFeatures:
        """Of the empty prompt."""
        return self.text_encoder.encode([""])
