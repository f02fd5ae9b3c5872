"""The ``conditioning:`` section of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from opensora.conditioning.condition_dropout import DROPS
from opensora.conditioning.frames import MASKS
from opensora.conditioning.mask_types import MASK_TYPES
from opensora.conditioning.references import KINDS

MAX_WEIGHT = 1e6  # of a kind: beyond, the others would hardly ever be drawn


def _check_weights(key: str, weights: Mapping[str, float], kinds: tuple[str, ...]) -> None:
    if not isinstance(weights, Mapping):
        raise ValueError(f"{key}: must be a mapping of kinds to weights")
    for name, weight in weights.items():
        if name not in kinds:
            raise ValueError(f"{key}.{name}: no such kind; must be one of {', '.join(kinds)}")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        if not number or not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"{key}.{name}={weight}: must be a weight from 0 to {MAX_WEIGHT:g}")
    if weights and not sum(weights.values()):
        raise ValueError(f"{key}: every weight is 0; must have one above, or be {{}}")


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """How often a sample loses its prompt in training, which guidance needs: each part drawn on its own."""

    text: float = 0.31622777  # the tokens; both at once: the product of the two, 0.1
    pooled: float = 0.31622777  # the prompt as one vector
    conditions: dict[str, float] = field(default_factory=dict)
    # {kind: weight} of samples with reference frames beside the noise, in place of ``text`` (drop_condition of 1.3):
    # keep (all), cond (the references alone), text (the prompt alone), null (neither)

    def __post_init__(self) -> None:
        for name in ("text", "pooled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number from 0 to 1")
        _check_weights("conditions", self.conditions, tuple(DROPS))


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What training tells the model of a sample, and what it keeps from it."""

    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    masks: dict[str, float] = field(default_factory=dict)
    # {strategy: probability} of latent frames that are given clean, for models that take them in place of noisy ones;
    # what is left of the probability: none. Strategies: random, intepolate (every other frame), and quarter_ (up to a
    # quarter of the frames) or image_ (one) before random, head, tail, head_tail
    references: dict[str, float] = field(default_factory=dict)
    # {kind: weight} of reference frames beside the noise, for models that read them (model.cond_embed); one kind per
    # sample, among those that its clip has room for. Kinds: t2v (none), i2v_head, i2v_tail, i2v_loop (the first, last,
    # or both frames), v2v_head, v2v_tail (33 frames), v2v_head_easy, v2v_tail_easy (65); {}: t2v alone
    mask_types: dict[str, float] = field(default_factory=dict)
    # {type: weight} in place of references, as in Open-Sora 1.3: latent frames of the whole clip beside the noise, one
    # type per sample. Types: none, i2v_head, i2v_tail, i2v_loop (the first, last, or both latent frames), v2v_head,
    # v2v_tail (the first half, or the rest), other (some at one end), and each but none with _noisy behind it: coded
    # from pixels with 0.1 to 0.3 of noise. A sample that is given frames keeps its prompt, but for dropout.conditions
    known_in_loss: bool = True  # latent frames that references give are learned like all others; false: left out
    known_weight: float = 1.0  # of these frames in the loss, if they are; the others then weigh so much that the mean
    # of all is 1 (x_cond_weight of Open-Sora 1.3)

    def __post_init__(self) -> None:
        if not 0 <= self.known_weight <= MAX_WEIGHT:
            raise ValueError(f"known_weight={self.known_weight}: must be a number from 0 to {MAX_WEIGHT:g}")
        if self.known_weight != 1 and not self.known_in_loss:
            raise ValueError(f"known_weight={self.known_weight}: must be 1 with known_in_loss=false")
        self._check_masks()
        self._check_references()
        _check_weights("mask_types", self.mask_types, tuple(MASK_TYPES))
        if self.mask_types and self.references:
            raise ValueError("mask_types: must be {} with references; both say which frames stand beside the noise")
        if self.mask_types and not self.known_in_loss:
            raise ValueError("known_in_loss=false: must be true with mask_types; known_weight=0 leaves frames out")

    def _check_references(self) -> None:
        _check_weights("references", self.references, tuple(KINDS))

    def _check_masks(self) -> None:
        if not isinstance(self.masks, Mapping):
            raise ValueError("masks: must be a mapping of strategies to probabilities")
        for name, share in self.masks.items():
            if name not in MASKS:
                raise ValueError(f"masks.{name}: no such strategy; must be one of {', '.join(MASKS)}")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"masks.{name}={share}: must be a probability from 0 to 1")
        if sum(self.masks.values()) > 1 + 1e-9:
            raise ValueError(f"masks: probabilities add up to {sum(self.masks.values()):g}: must be at most 1")
