"""The sampling core: options, start noise, schedule, and the loop from noise to latents.

Works on tokens that may be one process's share; what surrounds it (text encoding, references, distribution, decoding,
files) is in ``opensora.inference``. Its ``prepare``, ``prepare_models``, ``prepare_api`` and ``process_and_save`` can
be imported from here as well.
"""

from importlib import import_module
from typing import Any

from opensora.sampling.loop import TextInputs
from opensora.sampling.options import SamplingOption
from opensora.schedulers.timesteps import flow_shift
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


_INFERENCE = "opensora.inference.pipeline"
_FROM_INFERENCE = ("prepare", "prepare_models", "prepare_api", "process_and_save")


def __getattr__(name: str) -> Any:
    """The public names of inference, looked up by string when asked for: utils must not import upwards."""
    if name in _FROM_INFERENCE:
        return getattr(import_module(_INFERENCE), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
