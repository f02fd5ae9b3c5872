"""What differs between two configurations."""

from typing import Any


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """``key=new (was old)`` for every leaf that differs between two plain trees."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *(name for name in before if name not in now)]
        path = f"{key}." if key else ""
        return [line for name in names for line in differences(before.get(name), now.get(name), f"{path}{name}")]
    return [] if before == now else [f"{key}={now} (was {before})"]
