"""Latte: attention in space and in time by turns."""

from opensora.models.latte.config import SIZES, LatteConfig
from opensora.models.latte.model import FAMILY, Latte

__all__ = ["FAMILY", "SIZES", "Latte", "LatteConfig"]
