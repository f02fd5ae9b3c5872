"""The multimodal diffusion transformer of Flux and Open-Sora 2."""

from opensora.models.mmdit.config import SIZES, MMDiTConfig
from opensora.models.mmdit.model import FAMILY, MMDiTModel

__all__ = ["FAMILY", "SIZES", "MMDiTConfig", "MMDiTModel"]
