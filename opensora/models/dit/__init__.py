"""Diffusion transformers of DiT's kind: all tokens attend to each other."""

from opensora.models.dit.config import SIZES, DiTConfig
from opensora.models.dit.model import FAMILY, DiT

__all__ = ["FAMILY", "SIZES", "DiT", "DiTConfig"]
