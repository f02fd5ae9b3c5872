"""Keys that had other names: what was written with the old ones is read as if it had the new ones.

Configurations of people, of runs and of exports live longer than names do. A new name is one more line of the table.
"""

from collections.abc import Mapping
from typing import Any

from opensora.config.strict_yaml import COMMAND_LINE, Keys, Lines, dotted
from opensora.utils.errors import UserError

# A key, or a whole section, and what it is called now; one value may have become several.
RENAMED: dict[Keys, tuple[Keys, ...]] = {
    ("data", "empty_rows"): (("data", "unused_rows"),),
    ("data", "pack"): (("data", "balance_group"),),
    ("guard", "max_returns"): (("guard", "max_rollbacks"),),
    ("guard", "aside_s"): (("guard", "save_s"),),
    ("flow", "text_dropout"): (("conditioning", "dropout", "text"), ("conditioning", "dropout", "pooled")),
    ("flow",): (("objective",),),
}
AS_SECTIONS: tuple[Keys, ...] = (("flow",),)  # renamed where they are sections; a value of this name is another key


def new_names(keys: Keys, value: Any) -> tuple[Keys, ...]:
    """The paths of a key as it is called now that it has this value."""
    if keys in AS_SECTIONS and not isinstance(value, Mapping):
        return (keys,)
    for old in sorted(RENAMED, key=len, reverse=True):
        if keys[: len(old)] == old:
            return tuple((*new, *keys[len(old) :]) for new in RENAMED[old])
    return (keys,)


def as_now(keys: Keys, value: Any) -> list[tuple[Keys, Any]]:
    """An override by the names of now: one for every key that its own has become, and for every old key in its value.

    Raises:
        UserError: the value has a key under both names.
    """
    inside: list[tuple[Keys, Any]] = []
    for old, new in RENAMED.items():
        below = old[len(keys) :]
        if not below or old[: len(keys)] != keys or not _has(value, below):
            continue
        value, moved = _without(value, below)
        for name in new:
            if name[: len(keys)] == keys and _has(value, name[len(keys) :]):
                raise _given_twice(old, name, COMMAND_LINE)
        inside += [(name, moved) for name in new]
    rest = [] if inside and value == {} else [(name, value) for name in new_names(keys, value)]
    return rest + inside


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
        if not _has(renamed, old) or (old in AS_SECTIONS and not isinstance(_at(renamed, old), Mapping)):
            continue
        renamed, value = _without(renamed, old)
        if value == {} and any(_has(renamed, name) for name in new):
            continue  # what was in the section has moved elsewhere
        for name in new:
            if _has(renamed, name):
                raise _given_twice(old, name, (lines or {}).get(old))
        for name in new:
            renamed = _with(renamed, name, value)
        if lines is not None:
            _move_lines(lines, old, new)
    return renamed


def _given_twice(old: Keys, name: Keys, place: str | None) -> UserError:
    return UserError(
        f"{dotted(old)}: is called {dotted(name)} now, which is given as well; take the old one out"
        f"{f' ({place})' if place else ''}"
    )


def _has(tree: Any, keys: Keys) -> bool:
    """Whether there is a value at a path."""
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _without(tree: Mapping[Any, Any], keys: Keys) -> tuple[dict[Any, Any], Any]:
    """(the tree without the value at a path, that value)"""
    if len(keys) == 1:
        return {key: value for key, value in tree.items() if key != keys[0]}, tree[keys[0]]
    below, value = _without(tree[keys[0]], keys[1:])
    return {**tree, keys[0]: below}, value


def _with(tree: Any, keys: Keys, value: Any) -> Any:
    """The tree with a value at a path. What is no section on the way stays, and is refused where it is read."""
    if not keys:
        return value
    if not isinstance(tree, Mapping):
        return tree
    return {**tree, keys[0]: _with(tree.get(keys[0], {}), keys[1:], value)}


def _move_lines(lines: Lines, old: Keys, new: tuple[Keys, ...]) -> None:
    for keys in [keys for keys in lines if keys[: len(old)] == old]:
        place = f"{lines.pop(keys)}, as {dotted(keys)}"  # by which name it is found there
        for name in new:
            moved: Keys = (*name, *keys[len(old) :])
            lines[moved] = place
