"""Clip table -> global batch plan -> batches of uint8 pixels.

Only the configuration is re-exported: ``manifest``, ``aspect`` and ``decode`` are used by tools that do not load
torch, and importing a package must not load it for them.
"""

from opensora.datasets.config import DataConfig

__all__ = ["DataConfig"]
