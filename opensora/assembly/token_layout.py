"""Latents and conditions as the tokens of a model, and this process's share of them: for training and for sampling.

What a family says of its tokens (``Denoising``) meets who holds which of them (``SequenceParallel``) here and nowhere
else. Joint models cut their one sequence of image tokens, factored ones the places of a frame; text in the sequence is
cut as well, unless the model cuts it itself; text that is read by cross-attention is whole on every process.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acceleration.sequence import SequenceContext, SequenceParallel
from opensora.models.base import Denoising, ModelConfig
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import describe, family_of
from opensora.utils.tokens import Grid, image_ids, pack, unpack


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one kind of model on one process of those that share samples."""

    denoising: Denoising
    sequence: SequenceParallel

    @property
    def token_dim(self) -> int:
        """The dim of tokens (B, N, C) or (B, T, S, C) that is cut over processes."""
        return 1 if self.denoising.token_axes == "joint" else 2

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, T', H', W') -> (B, N, C pt ph pw), or (B, T, S, C pt ph pw); whole."""
        grid = self._grid(latents)
        if self.denoising.pads:
            latents = _filled_up(latents, grid)
        return self._by_axes(pack(latents, self.denoising.patch), grid.frames)

    def inside(self, grid: Grid, device: torch.device | str) -> Tensor | None:
        """(1, N, C pt ph pw) or (1, T, S, ...) bool: which values of the whole tokens are latents and no padding; None:
        all of them."""
        if grid.padded == grid.latents:
            return None
        ones = torch.ones(1, self.denoising.latent_channels, *grid.latents, dtype=torch.bool, device=device)
        return self.patchify(ones)

    def unpatchify(self, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of ``patchify``."""
        latents = unpack(tokens if tokens.ndim == 3 else tokens.flatten(1, 2), grid.padded, grid.patch)
        frames, height, width = grid.latents
        return latents[:, :, :frames, :height, :width]

    def positions(self, grid: Grid, samples: int, device: torch.device | str) -> Tensor:
        """(B, N, 3) or (B, T, S, 3) fp32: where every token of a clip is; whole."""
        ids = image_ids(grid.padded, grid.patch, device).expand(samples, -1, -1)
        return self._by_axes(ids, grid.frames)

    def shard(self, tokens: Tensor) -> Tensor:
        """This process's part of image tokens."""
        return self.sequence.shard(tokens, self.token_dim)

    def gather(self, tokens: Tensor, grid: Grid) -> Tensor:
        """All tokens, on every process."""
        return self.sequence.gather(tokens, grid.tokens if self.token_dim == 1 else grid.places, self.token_dim)

    def shard_text(self, text: Tensor) -> Tensor:
        """This process's part of what has a row per text token."""
        if self.denoising.text != "joint" or self.denoising.cuts_text:
            return text
        return self.sequence.shard(text, extra_to_last=True)

    def patchify_conditions(self, conditions: Conditions) -> Conditions:
        """With references as tokens; a token is known where the first latent of its patch is."""
        reference, known = conditions.reference, conditions.known
        return replace(
            conditions,
            reference=None if reference is None else self.patchify(reference),
            known=None if known is None else self.patchify(known[:, None])[..., 0],
        )

    def shard_conditions(self, conditions: Conditions, x: Tensor) -> Conditions:
        """This process's part of what is known of the whole tokens ``x``, references as tokens."""
        cut = conditions.map(image=self.shard, text=self.shard_text)
        return replace(cut, context=self.context(conditions, x))

    def context(self, conditions: Conditions, x: Tensor) -> SequenceContext | None:
        """Which process holds which of the whole tokens ``x``; None where nothing is ever cut."""
        if self.denoising.token_axes == "factored":
            return self.sequence.factored_context(x.shape[1], x.shape[2], self.denoising.heads)
        text = conditions.text if self.denoising.text == "joint" else None
        return self.sequence.context(0 if text is None else text.shape[1], x.shape[1])

    def _grid(self, latents: Tensor) -> Grid:
        return self.denoising.grid((latents.shape[2], latents.shape[3], latents.shape[4]))

    def _by_axes(self, tokens: Tensor, frames: int) -> Tensor:
        return tokens if self.denoising.token_axes == "joint" else tokens.unflatten(1, (frames, -1))


def _filled_up(latents: Tensor, grid: Grid) -> Tensor:
    """(B, C, T', H', W') with zeros at the end of every axis that is no whole patches."""
    missing = [whole - held for held, whole in zip(grid.latents, grid.padded, strict=True)]
    return F.pad(latents, (0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else latents


def token_layout(cfg: ModelConfig, sequence: SequenceParallel) -> TokenLayout:
    """Of the model of this configuration."""
    return TokenLayout(describe(cfg), sequence)


def forward_arguments(cfg: ModelConfig, tokens: TokenBatch, t: Tensor, conditions: Conditions) -> dict[str, Any]:
    """What the model's forward is called with, in its own names."""
    return family_of(cfg).arguments(cfg, tokens, t, conditions) | {"context": conditions.context}
