"""How the weights of each family are written in files."""

from typing import Any

from opensora.models.mmdit.convert import WEIGHTS as MMDIT_WEIGHTS
from opensora.models.weights.format import WeightFormat

FORMATS: dict[str, WeightFormat] = {"mmdit": MMDIT_WEIGHTS}


def weight_format(cfg: Any) -> WeightFormat:
    """The format of the family that a ``model:`` section names."""
    return FORMATS[cfg.kind]
