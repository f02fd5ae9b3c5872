"""A section of the configuration whose class depends on its ``kind``: how a dataclass says so, without reading any."""

import dataclasses
from collections.abc import Mapping
from typing import Any

TABLE = "table"  # metadata: {kind: dataclass}, the section's class is chosen by its key ``kind``
SIZES = "sizes"  # metadata: {kind: {size: instance}}, the key ``size`` names the instance to start from


def section(
    table: Mapping[str, type],
    *,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    optional: bool = False,
    default: type | None = None,
) -> Any:
    """A dataclass field whose class is looked up in ``table`` by the section's ``kind``.

    Args:
        sizes: named instances per kind; ``size: NAME`` in the section starts from one.
        optional: the section may be left out or null; it is then None.
        default: the class of a section that is left out, or that does not say its kind.
    """
    metadata = {TABLE: table, SIZES: sizes or {}}
    if default is not None:
        return dataclasses.field(default_factory=default, metadata=metadata)
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)
