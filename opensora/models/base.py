"""What the rest of the project expects of a denoiser, an autoencoder and a text encoder.

Structural types: a class fits by having the members, nothing is inherited. ``acceleration`` reads ``block_lists``
and ``attention_cores`` the same way, so the model does not know that it is sharded.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from opensora.utils.tasks import TaskRunner, one_by_one


class AttentionCore(Protocol):
    """The slot every attention layer calls; sequence parallelism puts a wrapper of this signature in it."""

    def __call__(
        self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, key_mask: Tensor | None = None, context: Any = None
    ) -> Tensor:
        """Attention over the sequence dim: (B, L, H, Dh) each -> (B, L, H, Dh).

        ``key_mask`` (B, L) is True where a key may be attended. ``context`` is what the caller of the model's
        forward handed in for this micro-batch (who holds which tokens). The plain core reads ``context.segments``,
        if there are any: attention is then within each of them.
        """


class Attend(Protocol):
    """(B, L, H, Dh) queries over (B, S, H, Dh) keys and values that ``key_mask`` (B, S) shows -> (B, L, H, Dh)."""

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, key_mask: Tensor | None) -> Tensor: ...


class Segments(Protocol):
    """Which tokens of the sequences at hand are of one sample, where sequences hold several."""

    def apply(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """What ``attend`` gives for the tokens of each sample by themselves, each in its place."""


class Denoiser(Protocol):
    """Tokens with coordinates in, tokens out; patching, padding and sharding happen outside."""

    block_lists: tuple[str, ...]
    attention_cores: tuple[str, ...]
    takes_packs: bool  # forward takes ``rows``: sequences that hold several samples

    def __call__(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        txt_mask: Tensor | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
        context: Any = None,
    ) -> Tensor:
        """Velocity (B, N, patch^2 * channels) for img (B, N, ...) and txt (B, L, ...) at timesteps (B,).

        ``rows``: of timesteps and y_vec, for every text and image token, where sequences hold several samples.
        """

    def init_parameter_(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill ``tensor``, the full value of the parameter called ``name``, in place: the model's one init method."""


class Autoencoder(Protocol):
    """Pixels to latents and back. Weights are frozen; both directions run without gradient."""

    channels: int
    stride: tuple[int, int, int]  # pixels per latent along (frames, height, width)
    causal: bool  # True: the first frame is coded on its own, T' = (T-1)/stride_t + 1; False: T' = T/stride_t
    is_costly: bool  # True: to code a piece takes longer than to send it to another process

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, channels, T', H', W'), scaled to about unit variance.

        The pieces of work, which ``run`` carries out, depend on the shape alone and not on who runs them.
        """

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        """(B, channels, T', H', W') -> (B, 3, T, H, W), clamped to [-1, 1]; ``run`` as in encode."""


class AutoencoderShape(NamedTuple):
    """What planning needs to know of an autoencoder, without its weights; same names as on the autoencoder."""

    channels: int
    stride: tuple[int, int, int]
    causal: bool


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """What the denoiser reads of a prompt."""

    txt: Tensor  # (B, L, context_in_dim), one row per text token
    y_vec: Tensor  # (B, vec_in_dim), the pooled prompt
    mask: Tensor | None = None  # (B, L) bool, True for real tokens; None: padding is attended, as in Flux


class TextEncoder(Protocol):
    """Prompts to features. Weights are frozen."""

    context_dim: int
    vec_dim: int

    def encode(self, prompts: list[str]) -> TextFeatures:
        """One row per prompt; ``""`` is the unconditional prompt."""


def latent_grid(
    frames: int, height: int, width: int, autoencoder: Autoencoder | AutoencoderShape
) -> tuple[int, int, int]:
    """(T', H', W') of a clip of this size.

    Raises:
        ValueError: a size the autoencoder cannot code, with the nearest ones it can.
    """
    stride_t, stride_h, stride_w = autoencoder.stride
    lead = 1 if autoencoder.causal or frames == 1 else 0
    if (frames - lead) % stride_t:
        below = (frames - lead) // stride_t * stride_t + lead
        raise ValueError(
            f"{frames} frames do not fit the autoencoder: use {max(below, lead or stride_t)} or {below + stride_t}"
        )
    if height % stride_h or width % stride_w:
        raise ValueError(f"{height}x{width} pixels do not fit the autoencoder: use multiples of {stride_h}x{stride_w}")
    return (frames - lead) // stride_t + lead, height // stride_h, width // stride_w
