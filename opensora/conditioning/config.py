"""The ``conditioning:`` section of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from opensora.conditioning.frames import MASKS
from opensora.conditioning.references import KINDS

MAX_WEIGHT = 1e6  # of a kind of reference: beyond, the others would hardly ever be drawn


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """How often a sample loses its prompt in training, which guidance needs: each part drawn on its own."""

    text: float = 0.31622777  # the tokens; both at once: the product of the two, 0.1
    pooled: float = 0.31622777  # the prompt as one vector

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be a number from 0 to 1")


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
    known_in_loss: bool = True  # latent frames that references give are learned like all others; false: left out

    def __post_init__(self) -> None:
        self._check_masks()
        self._check_references()

    def _check_references(self) -> None:
        if not isinstance(self.references, Mapping):
            raise ValueError("references: must be a mapping of kinds to weights")
        for name, weight in self.references.items():
            if name not in KINDS:
                raise ValueError(f"references.{name}: no such kind; must be one of {', '.join(KINDS)}")
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
            if not number or not 0 <= weight <= MAX_WEIGHT:
                raise ValueError(f"references.{name}={weight}: must be a weight from 0 to {MAX_WEIGHT:g}")
        if self.references and not sum(self.references.values()):
            raise ValueError("references: every weight is 0; must have one above, or be {}")

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
