"""The public names of sampling, under the name where people look for them; nothing of ours imports this.

They live in ``opensora.sampling`` (options, noise, guidance, denoisers), ``opensora.schedulers.timesteps`` and
``opensora.inference.pipeline``, whose names are looked up when they are asked for: they need ``acceleration`` too.
"""

from importlib import import_module
from typing import Any

from opensora.sampling.denoisers import DENOISERS, DistilledDenoiser, I2VDenoiser, TextInputs
from opensora.sampling.guidance import passes_per_step
from opensora.sampling.noise import get_noise
from opensora.sampling.options import SamplingOption, image_size, sanitize_sampling_option
from opensora.schedulers.timesteps import flow_shift, get_schedule, time_shift
from opensora.utils.tokens import pack, unpack

__all__ = [
    "SamplingOption",
    "sanitize_sampling_option",
    "image_size",
    "get_noise",
    "get_schedule",
    "time_shift",
    "flow_shift",
    "pack",
    "unpack",
    "TextInputs",
    "I2VDenoiser",
    "DistilledDenoiser",
    "DENOISERS",
    "passes_per_step",
]

_PIPELINE = "opensora.inference.pipeline"
_FROM_PIPELINE = ("prepare", "prepare_models", "prepare_api", "process_and_save")
__all__ += _FROM_PIPELINE


def __dir__() -> list[str]:
    return [*globals(), *_FROM_PIPELINE]


def __getattr__(name: str) -> Any:
    if name in _FROM_PIPELINE:
        return getattr(import_module(_PIPELINE), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
