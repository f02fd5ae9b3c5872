"""The configuration of a run or of a sampling job: what it may say, how it is read and written.

The names that scripts and notebooks need are here; ours come from where they live. They are looked up when they are
asked for, so that who wants another module of this package does not load the models.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    **dict.fromkeys(("load_config", "save", "to_omegaconf", "to_yaml"), "opensora.config.load"),
    **dict.fromkeys(("RunConfig", "SampleConfig"), "opensora.config.run"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
