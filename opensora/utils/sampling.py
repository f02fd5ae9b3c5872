"""The public names of sampling, under the name where people look for them; nothing of ours imports this.

They live in ``opensora.sampling`` (options, noise, guidance, denoisers), ``opensora.schedulers.timesteps`` and
``opensora.inference.scripts.interface``, whose names are looked up when they are asked for, as they need
``acceleration`` too.
"""

from importlib import import_module
from typing import Any

from opensora.sampling.denoisers import DENOISERS, DistilledDenoiser, I2VDenoiser, SamplingMethodDict
from opensora.sampling.guidance import oscillate as get_oscillation_gs
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingMethod, SamplingOption, image_size, sanitize_sampling_option
from opensora.schedulers.timesteps import flow_shift, get_schedule, time_shift
from opensora.utils.tokens import pack, unpack

__all__ = [
    "SamplingOption",
    "SamplingMethod",
    "SamplingMethodDict",
    "get_oscillation_gs",
    "sanitize_sampling_option",
    "image_size",
    "get_noise",
    "get_schedule",
    "time_shift",
    "flow_shift",
    "pack",
    "unpack",
    "I2VDenoiser",
    "DistilledDenoiser",
    "DENOISERS",
    "passes_per_step",
]

_INTERFACE = "opensora.inference.scripts.interface"
_NAMES = ("prepare", "prepare_ids", "prepare_models", "prepare_api", "process_and_save")
__all__ += _NAMES


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_INTERFACE), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
