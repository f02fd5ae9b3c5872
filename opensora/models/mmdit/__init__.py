"""The multimodal diffusion transformer of Flux and Open-Sora 2."""

from opensora.models.mmdit.model import SIZES, MMDiTConfig, MMDiTModel

__all__ = ["SIZES", "MMDiTConfig", "MMDiTModel"]
