"""From a file to frames, in a process of its own that may die of it.

``read_frames`` and ``probe`` of api.py can be imported from here; they are looked up when they are asked for, so that
who wants another module of this package does not load the decoders.
"""

from importlib import import_module
from typing import Any

_FROM_API = ("probe", "read_frames")


def __getattr__(name: str) -> Any:
    if name in _FROM_API:
        return getattr(import_module("opensora.datasets.decode.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
