"""One micro-batch: from pixels and prompts to this process's tokens, and from those to its share of the loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from acceleration.sequence import SequenceContext, SequenceParallel
from opensora.conditioning.frames import unconditioned
from opensora.datasets.loading.feature_store import Features
from opensora.datasets.loading.reader import PackedBatch
from opensora.models.base import Autoencoder, TextEncoder, TextFeatures
from opensora.schedulers import rectified_flow
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.train.packed_tokens import EncodedTokens, SampleOf, concat_packed
from opensora.utils.tasks import TaskRunner, one_by_one
from opensora.utils.tokens import image_ids, pack

if TYPE_CHECKING:
    from opensora.datasets.loading.reader import Batch


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """This process's part of a micro-batch."""

    inputs: dict[str, Any]  # arguments of the model's forward
    target: Tensor  # (B, N_local, C*p*p) velocity, fp32
    weight: float  # 0 for a micro-batch that only keeps a process in step with its peers


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Encodes, corrupts and cuts; draws depend on (seed, step, sample) alone, so all layouts agree.

    ``sequence`` and ``run_tiles`` belong to the processes that cut the same samples. Where fewer cut those of some
    micro-batches (``Batch.degree``), ``by_degree`` has the preparation of these.
    """

    autoencoder: Autoencoder | None  # None: not needed, as batches hold features
    text_encoder: TextEncoder
    flow: RectifiedFlowConfig
    patch: int
    cond_embed: bool  # the model takes a condition
    guidance_embed: bool  # the model takes a guidance scale
    sequence: SequenceParallel
    seed: int
    device: torch.device
    run_tiles: TaskRunner = one_by_one  # who codes the tiles of a clip
    stored: bool = False  # batches hold features in place of pixels
    by_degree: Mapping[int, "Preparation"] = field(default_factory=dict)  # by how many processes cut a sample

    @torch.no_grad()
    def __call__(self, batch: "Batch | PackedBatch", step: int) -> Tokens:
        """The tokens of ``batch`` as used by update ``step``; no gradient."""
        if isinstance(batch, PackedBatch):
            texts = self._texts(batch)
            parts = [self._encoded(part, step, text) for part, text in zip(batch.parts, texts, strict=True)]
            packed, sample_of = concat_packed(parts)
            packed_context = self.sequence.packed_context(*sample_of, self.device)
            return self._cut(packed, batch.weight, packed_context, sample_of)
        if batch.degree is not None and batch.degree in self.by_degree:
            return self.by_degree[batch.degree](batch, step)
        tokens = self._encoded(batch, step)
        context = self.sequence.context(tokens.txt.shape[1], tokens.img.shape[1])
        return self._cut(tokens, batch.weight, context)

    def _cut(
        self, tokens: EncodedTokens, weight: float, context: SequenceContext | None, sample_of: SampleOf | None = None
    ) -> Tokens:
        """This process's part; ``sample_of`` of a packed sequence, on the CPU."""
        image, text = self.sequence.shard, self._shard_text
        inputs: dict[str, Any] = {
            "img": image(tokens.img),
            "img_ids": image(tokens.img_ids),
            "txt": text(tokens.txt),
            "txt_ids": text(torch.zeros(*tokens.txt.shape[:2], 3, device=self.device)),
            "timesteps": tokens.timesteps,
            "y_vec": tokens.y_vec,
            "cond": None if tokens.cond is None else image(tokens.cond),
            "guidance": torch.ones_like(tokens.timesteps) if self.guidance_embed else None,
            "txt_mask": None if tokens.txt_mask is None else text(tokens.txt_mask),
            "context": context,
        }
        if sample_of is not None:
            inputs["rows"] = text(sample_of[0]).to(self.device), image(sample_of[1]).to(self.device)
        return Tokens(inputs=inputs, target=image(tokens.target), weight=weight)

    def _encoded(self, batch: "Batch", step: int, text: TextFeatures | None = None) -> EncodedTokens:
        """Samples of one shape, encoded and corrupted."""
        encoded = self.encode(batch, text)
        x0 = encoded.latents.float()  # (B, C, T', H', W')
        grid = (x0.shape[2], x0.shape[3], x0.shape[4])
        ids = batch.sample_ids
        noise = rectified_flow.sample_noise(self.seed, step, ids, tuple(x0.shape[1:])).to(self.device)
        t = rectified_flow.sample_timesteps(self.seed, step, ids, grid, self.patch, self.flow).to(self.device)
        prompts = self._text(encoded, ids, step)
        return EncodedTokens(
            img=pack(rectified_flow.corrupt(x0, noise, t, self.flow), self.patch),
            img_ids=image_ids(grid, self.patch, self.device).expand(len(ids), -1, -1),
            target=pack(rectified_flow.target(x0, noise, self.flow), self.patch),
            cond=unconditioned(x0, self.patch) if self.cond_embed else None,
            txt=prompts.txt,
            txt_mask=prompts.mask,
            timesteps=t,
            y_vec=prompts.y_vec,
        )

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
        return Features(
            latents=self.autoencoder.encode(pixels, self.run_tiles), txt=text.txt, y_vec=text.y_vec, mask=text.mask
        )

    def _texts(self, batch: PackedBatch) -> list[TextFeatures | None]:
        """Of the prompts of every part, all encoded at once; None where they are stored."""
        if self.stored:
            return [None] * len(batch.parts)
        counts = [len(part.prompts) for part in batch.parts]
        text = self.text_encoder.encode([prompt for part in batch.parts for prompt in part.prompts])
        masks = [None] * len(counts) if text.mask is None else text.mask.split(counts)
        columns = zip(text.txt.split(counts), text.y_vec.split(counts), masks, strict=True)
        return [TextFeatures(txt=txt, y_vec=y_vec, mask=mask) for txt, y_vec, mask in columns]

    def _shard_text(self, x: Tensor) -> Tensor:
        return self.sequence.shard(x, extra_to_last=True)

    def _text(self, text: Features, ids: tuple[int, ...], step: int) -> TextFeatures:
        """Features of the prompts; tokens and pooled vector of dropped samples, each on its own, are those of ""."""
        drop_txt, drop_vec = (
            drop.to(self.device) for drop in rectified_flow.drop_text(self.seed, step, ids, self.flow.text_dropout)
        )
        null, mask = self._null, text.mask
        if mask is not None:
            assert null.mask is not None
            mask = torch.where(drop_txt[:, None], null.mask, mask)
        return TextFeatures(
            txt=torch.where(drop_txt[:, None, None], null.txt, text.txt),
            y_vec=torch.where(drop_vec[:, None], null.y_vec, text.y_vec),
            mask=mask,
        )

    @cached_property
    def _null(self) -> TextFeatures:
        return self.text_encoder.encode([""])


def loss_share(model: nn.Module, tokens: Tokens, global_elements: int) -> Tensor:
    """This process's share of the global mean of |v - target|^2 over ``global_elements`` latent values, fp32.

    The sum over all processes and micro-batches of a step is the loss, and the sum of their gradients its gradient.
    """
    velocity = model(**tokens.inputs)
    return rectified_flow.squared_error(velocity, tokens.target) * (tokens.weight / global_elements)
