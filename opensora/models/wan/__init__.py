"""Wan 2.1 and 2.2: text to video, image to video, and both in one."""

from opensora.models.wan.config import SIZES, WanConfig
from opensora.models.wan.model import FAMILY, WanModel

__all__ = ["FAMILY", "SIZES", "WanConfig", "WanModel"]
