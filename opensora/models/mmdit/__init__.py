"""The multimodal diffusion transformer of Flux and Open-Sora 2."""

from opensora.models.mmdit.model import SIZES, MMDiT, MMDiTConfig

__all__ = ["SIZES", "MMDiT", "MMDiTConfig"]
