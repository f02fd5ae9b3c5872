"""The public names of inference, under the name where people look for them; nothing of ours imports this.

They live in ``opensora.inference.scripts.interface``, and are looked up when they are asked for.
"""

from importlib import import_module
from typing import Any

from opensora.utils.sampling import SamplingMethod, SamplingOption, sanitize_sampling_option

_INTERFACE = "opensora.inference.scripts.interface"
_NAMES = ("prepare_models", "prepare_api", "process_and_save")
__all__ = ["SamplingMethod", "SamplingOption", "sanitize_sampling_option"]
__all__ += _NAMES


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_INTERFACE), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
