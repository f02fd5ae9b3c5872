"""The most that a number of the configuration may be, beside its owner: more than a person would set is a slip.

A dataclass carries ``LIMITS``: field -> (the most, why not more). What is least is checked by the class itself.
``opensora.config.schema`` holds every configuration to it, before the class is built.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

Limits: TypeAlias = Mapping[str, tuple[float, str]]

ONE_MONTH = 30 * 24 * 3600
STEPS = (10**9, "a step a second would take 30 years")
SECONDS = (ONE_MONTH, "30 days")
SCALE = (1e6, "products would overflow")


def beyond_limit(cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a value of a field; None: nothing that ``cls.LIMITS`` knows."""
    limits: Limits = getattr(cls, "LIMITS", {})
    if name not in limits or not isinstance(value, (int, float)):
        return None
    most, reason = limits[name]
    return None if value <= most else f"must be at most {most:{'g' if isinstance(most, float) else 'd'}}; {reason}"


def check_limits(owner: Any) -> None:
    """The same for an object that is built without a configuration.

    Raises:
        ValueError: ``field=value: what is allowed``.
    """
    for name in type(owner).LIMITS:
        problem = beyond_limit(type(owner), name, getattr(owner, name))
        if problem:
            raise ValueError(f"{name}={getattr(owner, name)}: {problem}")
