"""A configuration from files, overrides or Python, and back: layers of plain data, merged key by key."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from opensora.config.renamed_keys import as_now, with_new_names
from opensora.config.schema import build, is_table, plain, shown, types_at, wants_list, wants_text
from opensora.config.strict_yaml import (
    COMMAND_LINE,
    MAX_DEPTH,
    Keys,
    Lines,
    dotted,
    is_regular_file,
    parse_value,
    read_yaml,
    to_yaml_text,
)
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing, short
from opensora.utils.files.user_files import replacing

MAX_FILES = 100  # that a configuration may be put together from
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # a key of a free mapping, such as a number of frames
_FAMILY_TOO = "Files and flags of the Open-Sora family are taken, too: CONFIG.py [--num-frames N] (docs/training.md)\n"
T = TypeVar("T")


def load_config(cls: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """A configuration from a file and command-line overrides; reads files, writes nothing.

    The file is YAML, or Python of the Open-Sora family, which is read as data and becomes ours (family/).

    ``include: FILE`` or ``include: [FILE, ...]`` at the top of a file names files, relative to it, that it builds on.
    Later layers win key by key; a section that changes its ``kind``, and a free mapping such as the bucket table, is
    replaced as a whole.

    Args:
        source: the file; or what would be in it, as a dict or an OmegaConf configuration.
        overrides: ``section.key=value``, ``--section.key=value`` or ``--section.key value``, or flags of the family.

    Raises:
        UserError: one line with the key path or the file, what was found, and what is allowed.
    """
    flags: list[tuple[Keys, Any]] = []
    rest = list(overrides)
    if not isinstance(source, Mapping) and _is_family_file(Path(source)):
        if not _takes_family(cls):
            raise UserError(f"{source}: a file of the Open-Sora family, for training and sampling; give a .yaml")
        layer, lines, rest = _family().read_family(cls, Path(source), overrides)
    else:
        if _takes_family(cls):
            flags, rest = _family().flag_overrides(cls, overrides)
        if isinstance(source, Mapping):
            layer, lines = with_new_names(_from_python(source)), Lines()
        else:
            layer, lines = _read_with_includes(cls, Path(source), (), [])
    typed = [*flags, *_parse_overrides(cls, rest)]
    given = [(old, *now) for old, value in typed for now in as_now(old, value)]
    for old, keys, value in given:
        _check_way(layer, keys, lines)
        added: Any = value
        for key in reversed(keys):
            added = {key: added}
        layer = _merge(cls, layer, added, lines, addressed=keys)
        lines[keys] = COMMAND_LINE if keys == old else f"{COMMAND_LINE}, as {dotted(old)}"
    return build(cls, layer, lines)


def is_training(cls: type, path: str | Path) -> bool:
    """Whether a file, with all that it includes, is of a training run: it has a section that sampling has not.

    Args:
        cls: of training runs.

    Raises:
        UserError: a file that cannot be read, or that includes itself.
    """
    if _is_family_file(Path(path)):
        return bool(_family().trains(Path(path)))
    layer, _ = _read_with_includes(cls, Path(path), (), [])
    return not {"train", "data", "optim"}.isdisjoint(layer)


def config_from_argv(cls: type[T], argv: Sequence[str], description: str) -> T:
    """``CONFIG [overrides]`` as typed on a command line; ``--help`` explains it and exits."""
    if not argv or argv[0] == "-h" or "--help" in argv:
        print(
            f"{description}\n\nusage: CONFIG.yaml [section.key=value | --section.key value | --section.key=value] ...\n"
            f"{_FAMILY_TOO if _takes_family(cls) else ''}"
            "All keys with their defaults: docs/configuration.md"
        )
        raise SystemExit(0 if argv else 2)
    if argv[0].startswith("-") or ("=" in argv[0] and not is_regular_file(Path(argv[0]))):
        raise UserError(f"{argv[0]}: the configuration file comes first, overrides after it")
    return load_config(cls, argv[0], argv[1:])


def to_yaml(cfg: Any) -> str:
    """The resolved configuration; ``load_config`` reads it back to an equal one."""
    return to_yaml_text(plain(cfg))


def to_omegaconf(cfg: Any) -> DictConfig:
    """The resolved configuration, for scripts that work with OmegaConf; ``load_config`` reads it back."""
    return OmegaConf.create(plain(cfg))


def save(cfg: Any, path: str | Path) -> str:
    """Write ``to_yaml(cfg)``; the file is on the disk, complete, or as it was before. Returns its SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = to_yaml(cfg).encode()
    with replacing(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def config_hash(cfg: Any) -> str:
    """16 hex digits that change with any value of the configuration, the same on every machine."""
    text = json.dumps(plain(cfg), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _takes_family(cls: type) -> bool:
    """Whether a configuration is of training or sampling: others have no files and flags of the family."""
    return bool(types_at(cls, ("model",)))


def _is_family_file(path: Path) -> bool:
    """Whether a configuration file is one of the family's, by its name."""
    return path.suffix == ".py"


def _family() -> Any:
    """What knows the Open-Sora family's files and flags. It knows every model, and with them torch, which takes seconds
    that a command without models need not wait."""
    return import_module("opensora.config.family")


def _from_python(given: Mapping[str, Any]) -> dict[Any, Any]:
    """A layer that no file holds. Interpolations of OmegaConf are resolved.

    Raises:
        UserError: a value that is missing, or refers to what is not there.
    """
    if OmegaConf.is_config(given):
        with parsing(lambda reason: UserError(f"the configuration that was handed in: {reason}; mend it there")):
            return dict(OmegaConf.to_container(given, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    return deepcopy(dict(given))


def _read_with_includes(
    cls: type, path: Path, chain: tuple[Path, ...], read: list[Path]
) -> tuple[dict[Any, Any], Lines]:
    """The merged content of a file and what it includes, and where each key was set.

    Args:
        chain: the files that lead here, each including the next.
        read: all files that were read until now; this one is added.
    """
    data, lines = read_yaml(path)
    data = with_new_names(data, lines)
    here = path.resolve()
    if here in chain:
        loop = " -> ".join(step.name for step in (*chain, path))
        raise UserError(f"{path}: include goes round in a circle ({loop}); remove one of them")
    read.append(here)
    if len(read) > MAX_FILES:
        raise UserError(f"{path}: include adds up to more than {MAX_FILES} files; write them out in fewer")
    layer: dict[Any, Any] = {}
    merged_lines: Lines = {}
    for target in _includes(path, data.pop("include", None), lines.pop(("include",), str(path))):
        below, below_lines = _read_with_includes(cls, target, (*chain, here), read)
        layer = _merge(cls, layer, below, merged_lines)
        merged_lines.update(below_lines)
    layer = _merge(cls, layer, data, merged_lines)
    merged_lines.update(lines)
    return layer, merged_lines


def _includes(path: Path, included: Any, place: str) -> list[Path]:
    """The files that ``include`` names, relative to the file that it stands in."""
    names = [] if included is None else [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"include={included!r} ({place}): must be a path or a list of paths")
    for name in names:
        if not is_regular_file(path.parent / name):
            raise UserError(
                f"include={short(name)} ({place}): no such file; paths are relative to the file that includes"
            )
    return [path.parent / name for name in names]


def _merge(
    cls: type, base: dict[Any, Any], layer: dict[Any, Any], lines: Lines, addressed: Keys = ()
) -> dict[Any, Any]:
    """``layer`` over ``base``. ``lines`` of ``base`` forgets what the layer replaces as a whole.

    ``addressed``: the one key path the layer sets; a mapping on the way to it is entered, not replaced.
    """
    return _over(_without_replaced(cls, base, layer, (), lines, addressed), layer)


def _over(base: Mapping[Any, Any], layer: Mapping[Any, Any]) -> dict[Any, Any]:
    """Mappings key by key; of anything else the layer's value is taken."""
    merged = dict(base)
    for key, new in layer.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            new = _over(old, new)
        merged[key] = new
    return merged


def _check_way(layer: Mapping[Any, Any], keys: Keys, lines: Lines) -> None:
    """That an override enters sections only, as what it would replace unseen is a mistake in a file."""
    value: Any = layer
    for depth, key in enumerate(keys[:-1], start=1):
        value = value.get(key)
        if value is None:
            return
        if not isinstance(value, Mapping):
            name, place = dotted(keys[:depth]), lines.get(keys[:depth], COMMAND_LINE)
            kind = "a list" if isinstance(value, list) else "a single value"
            raise UserError(f"{name}={shown(value)} ({place}): is {kind}, in which no key can be set; write {name}=...")


def _without_replaced(
    cls: type, base: Mapping[Any, Any], layer: Mapping[Any, Any], keys: Keys, lines: Lines, addressed: Keys
) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, old in base.items():
        path = (*keys, key)
        new = layer.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes_kind = "kind" in old and new.get("kind", old["kind"]) != old["kind"]
            is_whole = len(addressed) <= len(path) and any(is_table(hint) for hint in types_at(cls, path))
            if changes_kind or is_whole:
                for known in [known for known in lines if known[: len(path)] == path]:
                    del lines[known]
                continue
            kept[key] = _without_replaced(cls, old, new, path, lines, addressed)
        else:
            kept[key] = old
    return kept


def _parse_overrides(cls: type, overrides: Sequence[str]) -> list[tuple[Keys, Any]]:
    parsed: list[tuple[Keys, Any]] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        dashed = word.startswith("--")
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not dashed:
                raise UserError(f"{word or repr('')}: not an override; write section.key=value or --section.key value")
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{word}: a value is missing; write {word} VALUE")
            text = rest.pop(0)
        keys = _keys(name.replace("-", "_") if dashed else name, word)
        parsed.append((keys, _override_value(cls, keys, text)))
    return parsed


def _keys(name: str, word: str) -> Keys:
    parts = name.split(".")
    if not all(parts):
        raise UserError(f"{word}: an empty key; write section.key=value")
    if len(parts) > MAX_DEPTH:
        raise UserError(
            f"{dotted(tuple(parts[:4]))}...: {len(parts)} levels ({COMMAND_LINE}); must be at most {MAX_DEPTH}"
        )
    return tuple(int(part) if _NUMBER.fullmatch(part) else part for part in parts)


def _override_value(cls: type, keys: Keys, text: str) -> Any:
    """Text as it stands where the key takes text, so that a prompt or a path needs no YAML quotes; else one YAML value,
    such as a list in brackets where the key takes that, too."""
    hints = types_at(cls, keys)
    if not any(wants_text(hint) for hint in hints) or (text.startswith("[") and any(map(wants_list, hints))):
        return parse_value(text, keys)
    if text == "null" and any(type(None) in getattr(hint, "__args__", ()) for hint in hints):
        return None
    return text
