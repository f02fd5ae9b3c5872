"""The family's ``mask_ratios`` and ``mask_types`` as ours."""

from collections.abc import Mapping
from typing import Any

NOTHING = ("identity", "no")  # what masks nothing, from 1.2 on and in 1.1
# Names of opensora/train/16x256x256-mask.py, which the family's own code refuses.
SHORT_MASKS = {"head": "quarter_head", "tail": "quarter_tail", "head_tail": "quarter_head_tail"}


def masks_of(value: Any) -> Any:
    """Strategies as they are called from 1.2 on; what is left of the probability masks nothing.

    Raises:
        ValueError: probabilities that do not add up to 1 in 1.1, or where what masks nothing has its own; a strategy
            by two names.
    """
    if not isinstance(value, Mapping):
        return value
    names = {str(name).removeprefix("mask_"): share for name, share in value.items()}
    given = {name: share for name, share in names.items() if name not in NOTHING}
    renamed = {SHORT_MASKS.get(name, name): share for name, share in given.items()}
    if len(renamed) < len(given) or len(names) < len(value):
        raise ValueError("names a strategy twice; keep one")
    shares = [share for share in value.values() if isinstance(share, (int, float))]
    complete = "identity" in value or any(str(name).startswith("mask_") for name in value)
    if complete and len(shares) == len(value) and abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"probabilities add up to {sum(shares):g}; must add up to 1, what masks nothing among them")
    return renamed


def types_of(value: Any) -> Any:
    """``mask_types`` of 1.3, which are called so here.

    Raises:
        ValueError: no kinds with weights.
    """
    if not isinstance(value, Mapping):
        raise ValueError("must be {kind: weight}")
    return {str(name): weight for name, weight in value.items()}
