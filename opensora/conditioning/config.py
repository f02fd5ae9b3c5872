"""The ``conditioning:`` section of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from opensora.conditioning.frames import MASKS


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
    # the rest of the probability: none. Strategies: random, intepolate (every other frame), and quarter_ (up to a quarter
    # of the frames) or image_ (one) before random, head, tail, head_tail

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Mapping):
            raise ValueError("masks: must be a mapping of strategies to probabilities")
        for name, share in self.masks.items():
            if name not in MASKS:
                raise ValueError(f"masks.{name}: no such strategy; must be one of {', '.join(MASKS)}")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"masks.{name}={share}: must be a probability from 0 to 1")
        if sum(self.masks.values()) > 1 + 1e-9:
            raise ValueError(f"masks: probabilities add up to {sum(self.masks.values()):g}: must be at most 1")
