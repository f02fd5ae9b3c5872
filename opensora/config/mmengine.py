"""Configuration files as MMEngine and the Open-Sora family write them: Python that is read as data (python_values.py).

``_base_`` names files that a file builds on, relative to it. They lie below the nearest folder called configs, or below
that of the file itself.
"""

from pathlib import Path
from typing import Any

from opensora.config.python_values import forget, read_assignments, size_of
from opensora.config.strict_yaml import MAX_VALUES, Keys, Lines, dotted, is_regular_file
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing, short

BASE, DELETE = "_base_", "_delete_"
MAX_BASES = 100  # files that a configuration may be put together from
TREE = "configs"  # the folder of all configurations


def read_python(path: Path) -> tuple[dict[str, Any], Lines]:
    """What a file and all that its ``_base_`` names assign, and for every key path the ``file:line`` that set it.

    A mapping is merged into the one that a base has under its key, unless it says ``_delete_=True``; any other value
    takes the place of the base's. Bases of one file may not share a key. Tuples become lists.

    Raises:
        UserError: no such file, not UTF-8, not Python, or something that is not data.
    """
    here = _resolved(path, f"{short(path)}: cannot be read")
    tree = next((folder for folder in here.parents if folder.name == TREE), here.parent)
    data, lines = _with_bases(path, tree, (), [], "")
    return _plain(data, (), lines), lines


def _resolved(path: Path, problem: str) -> Path:
    """Where a path leads.

    Raises:
        UserError: ``problem``, as it holds a NUL, is no text of files, is too long, or its links go round in a circle.
    """
    with parsing(lambda reason: UserError(f"{problem} ({reason}); give the path of a configuration file")):
        return path.resolve()


def _with_bases(
    path: Path, tree: Path, chain: tuple[Path, ...], read: list[Path], source: str
) -> tuple[dict[str, Any], Lines]:
    """The merged content of a file and its bases.

    Args:
        tree: the folder that all of them lie in.
        chain: the files that lead here, each building on the next.
        read: all files that were read until now; this one is added.
        source: the ``file:line`` that names this one; empty for the first.
    """
    here = path.resolve()
    if here in chain:
        loop = " -> ".join(step.name for step in (*chain, here))
        raise UserError(f"{source}: {BASE} goes round in a circle ({loop}); remove one of them")
    read.append(here)
    if len(read) > MAX_BASES:
        raise UserError(f"{source}: {BASE} adds up to more than {MAX_BASES} files; write them out in fewer")
    own, lines = read_assignments(path)
    merged: dict[str, Any] = {}
    merged_lines: Lines = {}
    if DELETE in own:
        raise UserError(
            f"{DELETE}={short(repr(own[DELETE]))} ({lines.get((DELETE,))}): stands in a mapping, beside the keys that "
            f"replace the base's; to replace a whole file leave out {BASE}"
        )
    place = lines.pop((BASE,), str(path))
    for base in _bases(path, tree, own.pop(BASE, None), place):
        below, below_lines = _with_bases(base, tree, (*chain, here), read, place)
        if twice := next((key for key in below if key in merged), None):
            raise UserError(
                f"{twice}: two files of {BASE} ({place}) set it, {merged_lines[(twice,)]} and {below_lines[(twice,)]}; "
                "leave it to one, or let one build on the other"
            )
        merged |= below
        merged_lines |= below_lines
    merged = _over(merged, own, (), merged_lines, lines)
    if size_of(merged) > MAX_VALUES:
        raise UserError(f"{path}: with its {BASE} more than {MAX_VALUES} keys and values; give long lists as files")
    return merged, merged_lines | lines


def _bases(path: Path, tree: Path, named: Any, place: str) -> list[Path]:
    """The files that ``_base_`` names, relative to the file that it stands in."""
    names = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{BASE}={short(repr(named))} ({place}): must be the path of a .py file, or a list of them")
    found = []
    for name in names:
        target = path.parent / name
        said = f"{BASE}={short(name if name.isprintable() else repr(name))} ({place})"
        if Path(name).is_absolute() or not _resolved(target, f"{said}: cannot be read").is_relative_to(tree):
            raise UserError(f"{said}: must be a relative path to a file in {tree}")
        if target.suffix != ".py" or not is_regular_file(target):
            raise UserError(f"{said}: no such .py file; paths are relative to the file itself")
        found.append(target)
    return found


def _over(base: dict[Any, Any], own: dict[Any, Any], keys: Keys, base_lines: Lines, lines: Lines) -> dict[Any, Any]:
    """``own`` over ``base``; ``base_lines`` forgets what is replaced as a whole, ``lines`` every ``_delete_``."""
    merged = dict(base)
    for key, new in own.items():
        path = (*keys, key)
        old = merged.get(key, {})
        if not isinstance(new, dict):
            forget(base_lines, path, old)
            merged[key] = new
            continue
        anew = _delete_of(new, path, lines)
        if anew or not isinstance(old, dict):
            if not anew:
                kind = "null" if old is None else "a list" if isinstance(old, (list, tuple)) else "a single value"
                raise UserError(
                    f"{dotted(path)} ({lines.get(path)}): its base has {kind} here ({base_lines.get(path)}), which "
                    f"takes no keys; write {DELETE}=True beside them to replace it"
                )
            forget(base_lines, path, old)
            old = {}
        merged[key] = _over(old, {k: v for k, v in new.items() if k != DELETE}, path, base_lines, lines)
    return merged


def _delete_of(mapping: dict[Any, Any], keys: Keys, lines: Lines) -> bool:
    """Whether a mapping replaces its base's as a whole."""
    value, place = mapping.get(DELETE, False), lines.pop((*keys, DELETE), None)
    if not isinstance(value, bool):
        raise UserError(f"{dotted((*keys, DELETE))}={short(repr(value))} ({place}): must be True or False")
    return value


def _plain(value: Any, keys: Keys, lines: Lines) -> Any:
    """The same without tuples, and without what only says how to merge, which changes nothing inside a list."""
    if isinstance(value, dict):
        _delete_of(value, keys, lines)
        return {key: _plain(item, (*keys, key), lines) for key, item in value.items() if key != DELETE}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*keys, index), lines) for index, item in enumerate(value)]
    return value
