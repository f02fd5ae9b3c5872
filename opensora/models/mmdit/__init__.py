"""The multimodal diffusion transformer of Flux and Open-Sora 2."""

from opensora.models.mmdit.model import FAMILY, SIZES, MMDiTConfig, MMDiTModel

__all__ = ["FAMILY", "SIZES", "MMDiTConfig", "MMDiTModel"]
