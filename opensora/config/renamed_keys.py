"""Keys that had other names: what was written with the old ones is read as if it had the new ones.

Configurations of people, of runs and of exports live longer than names do. A new name is one more line of the table.
"""

from collections.abc import Mapping
from typing import Any

from opensora.config.strict_yaml import Keys, Lines, dotted
from opensora.utils.errors import UserError

RENAMED: dict[Keys, Keys] = {
    ("data", "empty_rows"): ("data", "unused_rows"),
    ("data", "pack"): ("data", "balance_group"),
    ("guard", "max_returns"): ("guard", "max_rollbacks"),
    ("guard", "aside_s"): ("guard", "save_s"),
}


def new_name(keys: Keys) -> Keys:
    """The path of a key as it is called now."""
    return RENAMED.get(keys, keys)


def with_new_names(tree: Mapping[Any, Any], lines: Lines | None = None) -> dict[Any, Any]:
    """A configuration, or a layer of one, in which every key is called as it is now.

    Args:
        tree: plain data; it stays as it is.
        lines: where each key was set, which is kept up to date.

    Raises:
        UserError: a key is there under both names.
    """
    renamed = dict(tree)
    for old, new in RENAMED.items():
        section = renamed.get(old[0])
        if not isinstance(section, Mapping) or old[1] not in section:
            continue
        if new[1] in section:
            raise UserError(f"{dotted(old)}: is called {dotted(new)} now, which is given as well; take the old one out")
        renamed[old[0]] = {new[1] if key == old[1] else key: value for key, value in section.items()}
        if lines is not None and old in lines:
            lines[new] = lines.pop(old)
    return renamed
