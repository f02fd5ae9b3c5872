"""Which parameters are trained: the options of the Open-Sora 1.x configurations that freeze others."""

from collections.abc import Callable
from typing import Any

from torch import nn

from opensora.models.stdit.config import Freeze


def train_only(model: nn.Module, is_trained: Callable[[str], bool]) -> None:
    """Freeze every parameter that ``is_trained`` does not name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and is_trained(name))


def freeze(model: nn.Module, kind: Freeze | None) -> None:
    """The family's option ``freeze``."""
    rules: dict[Any, Callable[[str], bool]] = {
        None: lambda name: True,
        "not_temporal": lambda name: "attn_temp" in name,
        "text": lambda name: "cross_attn" not in name,
    }
    train_only(model, rules[kind])
