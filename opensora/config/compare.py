"""What differs between two configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from opensora.config.schema import plain
from opensora.utils.sections import TABLE


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """``key=new (was old)`` for every leaf that differs between two plain trees."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *(name for name in before if name not in now)]
        path = f"{key}." if key else ""
        return [line for name in names for line in differences(before.get(name), now.get(name), f"{path}{name}")]
    return [] if before == now else [f"{key}={now} (was {before})"]


def with_defaults(cls: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """A plain tree in which keys that it does not have are there with their defaults: those of a version after it."""
    complete, hints = dict(tree), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value = complete.get(field.name)
        if field.name not in complete:
            if field.default is not dataclasses.MISSING:
                complete[field.name] = plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                complete[field.name] = plain(field.default_factory())
        elif isinstance(value, Mapping):
            section = field.metadata.get(TABLE, {}).get(value.get("kind"), hints[field.name])
            if dataclasses.is_dataclass(section) and isinstance(section, type):
                complete[field.name] = with_defaults(section, value)
    return complete
