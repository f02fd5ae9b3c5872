"""PixArt, PixArt-MS and PixArt-Sigma: text by cross-attention."""

from opensora.models.pixart.config import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.models.pixart.model import FAMILY, MS_FAMILY, SIGMA_FAMILY, PixArt

__all__ = [
    "FAMILY",
    "MS_FAMILY",
    "SIGMA_FAMILY",
    "PixArt",
    "PixArtConfig",
    "PixArtMSConfig",
    "PixArtSigmaConfig",
]
