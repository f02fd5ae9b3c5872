"""Spatial-temporal diffusion transformers of Open-Sora 1.0 to 1.3: attention within frames and along time."""

from opensora.models.stdit.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.stdit.stdit import FAMILY as STDIT
from opensora.models.stdit.stdit import STDiT
from opensora.models.stdit.stdit2 import FAMILY as STDIT2
from opensora.models.stdit.stdit2 import STDiT2
from opensora.models.stdit.stdit3 import FAMILY as STDIT3
from opensora.models.stdit.stdit3 import STDiT3

__all__ = [
    "STDIT",
    "STDIT2",
    "STDIT3",
    "STDiT",
    "STDiT2",
    "STDiT2Config",
    "STDiT3",
    "STDiT3Config",
    "STDiTConfig",
]
