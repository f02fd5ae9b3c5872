"""What a denoiser is told beside noise and time, and the tokens it works on: one form for every family.

A batch becomes ``Conditions`` once, where its texts are encoded; they are cut over processes field by field; and only
``Family.arguments`` turns them into the words of a model's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is known of B samples; None: nothing, or the family does not read it.

    Of a packed sequence B counts its samples in ``pooled``, ``label``, ``fps``, ``size``, ``num_frames`` and
    ``guidance``, while text and references are laid end to end in one row.
    """

    text: Tensor | None = None  # (B, L, D), a row per text token
    text_mask: Tensor | None = None  # (B, L) bool, True for real tokens; None: padding is attended
    pooled: Tensor | None = None  # (B, V), the prompt as one vector
    label: Tensor | None = None  # (B,) int64, a class in place of a prompt
    dropped: Tensor | None = None  # (B,) bool, samples without a text: the model puts its own null embedding there
    reference: Tensor | None = None  # clean latents where known, 0 elsewhere: (B, C, T', H', W'), or as tokens
    known: Tensor | None = None  # which latents are known: (B, T', H', W') bool, or as tokens, (B, N) or (B, T, S)
    image_tokens: Tensor | None = None  # (B, K, E), a picture as its encoder's tokens; whole on every process
    fps: Tensor | None = None  # (B,), frames per second; 0: not known, as of a still
    size: Tensor | None = None  # (B, 2), height and width in pixels
    num_frames: Tensor | None = None  # (B,), frames of the clip in pixels
    guidance: Tensor | None = None  # (B,), the scale that a distilled model reads
    context: Any = None  # for the attention slots: which process holds which tokens

    def map(self, *, image: Callable[[Tensor], Tensor], text: Callable[[Tensor], Tensor]) -> "Conditions":
        """``image`` of what has a row per image token, ``text`` of what has a row per text token."""
        changes = {"text": text, "text_mask": text, "reference": image, "known": image}
        return replace(self, **{name: f(x) for name, f in changes.items() if (x := getattr(self, name)) is not None})

    def without_text(self, null: "Conditions") -> "Conditions":
        """With the prompts of ``null`` in place of these, and all else as it is."""
        prompts = ("text", "text_mask", "pooled", "label", "dropped", "context")
        return replace(self, **{name: getattr(null, name) for name in prompts})

    def without_reference(self, *, keeps_known: bool = False) -> "Conditions":
        """As if no frame were known.

        Args:
            keeps_known: say which they would be all the same, and that they are zeros (Open-Sora 1.3).
        """
        if keeps_known and self.reference is not None:
            return replace(self, reference=torch.zeros_like(self.reference))
        return replace(self, reference=None, known=None)


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """This process's tokens of B samples, or of a packed sequence (B = 1).

    Joint models take them as one sequence, (B, N, C) with positions (B, N, 3); factored ones by frame and place,
    (B, T, S, C) with positions (B, T, S, 3). N is in (t, h, w) order, so the one is a view of the other.
    """

    x: Tensor
    positions: Tensor  # (t, h, w) of every token, in tokens; fp32
    grid: tuple[int, int, int] | None = None  # tokens along (t, h, w) of the whole clip; None: not known, or several
    sample_of: tuple[Tensor, Tensor] | None = None  # packed: the number of its sample for every text and image token
