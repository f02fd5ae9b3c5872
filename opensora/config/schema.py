"""Plain data to dataclasses, by their type hints, with every mistake named by its key path.

The dataclasses know nothing of this module: they are frozen, carry hints and raise ``ValueError("field=value: ...")``
from ``__post_init__``. Nothing is converted but a whole number into a float and a list into a tuple.
"""

import dataclasses
import difflib
import math
import re
import types
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from opensora.config.strict_yaml import Keys, Lines, dotted
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.limits import beyond_limit
from opensora.utils.sections import SIZES, TABLE

MOST_WHOLE = 2**63  # what tensors, generators and files hold
LONGEST_NAME = 100  # characters that are compared with known names


def build(cls: type, data: Any, lines: Lines | None = None, keys: Keys = ()) -> Any:
    """An instance of the dataclass ``cls`` from nested dicts, lists and scalars.

    Args:
        lines: where each key path was set, for messages.
        keys: the path of ``data`` itself.

    Raises:
        UserError: an unknown, missing or mistyped key, or a value that the dataclass itself refuses.
    """
    return _Builder(lines or {}).instance(cls, data, keys, {})


def plain(value: Any) -> Any:
    """The reverse of ``build``: dicts, lists and scalars that state every field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def types_at(cls: type, keys: Iterable[str | int]) -> list[Any]:
    """The types that a key path may have; several where a section's class depends on its kind, none if unknown."""
    found: list[Any] = [cls]
    for key in keys:
        found = [hint for owner in found for hint in _types_below(owner, key)]
    return found


def wants_text(hint: Any) -> bool:
    """Whether any text is a value of this type, so that an override needs no quotes."""
    if get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in get_args(hint))
    if _is_union(hint):
        return any(wants_text(member) for member in get_args(hint) if member is not type(None))
    return hint is str or hint is Path


def wants_list(hint: Any) -> bool:
    """Whether some list is a value of this type."""
    if _is_union(hint):
        return any(wants_list(member) for member in get_args(hint))
    return get_origin(hint) in (tuple, list)


def wanted(hint: Any) -> str:
    """What a type accepts, in words."""
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Path: "a path",
        type(None): "null",
        Any: "any value",
    }
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(shown(choice) for choice in arguments)
    if _is_union(hint):
        return " or ".join(wanted(member) for member in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: " + ", ".join(wanted(member) for member in arguments)
    if origin in (tuple, list):
        return f"a list, each {wanted(arguments[0])}"
    if _is_mapping(hint):
        return f"a mapping from {wanted(arguments[0])} to {wanted(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return str(hint)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """``did you mean x?`` where a choice is close or begins so, else all of them."""
    known, name = list(choices), name[:LONGEST_NAME]
    if begun := [choice for choice in known if choice.startswith(name) and len(name) > 1]:
        return f"did you mean {' or '.join(begun)}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "must be one of " + ", ".join(known)


class _Builder:
    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def fail(self, keys: Keys, text: str, about: Keys = ()) -> UserError:
        """The error for a key path, with the place that set it, or a key in it, or the nearest section that has one.

        Args:
            about: what ``text`` is of, below ``keys``: its place is said where it is known.
        """
        exact = (*keys, *about)
        inside = [place for known, place in self.lines.items() if about and known[: len(exact)] == exact]
        set_by = (self.lines[exact[:n]] for n in range(len(exact), len(keys), -1) if exact[:n] in self.lines)
        below = (place for known, place in self.lines.items() if known[: len(keys)] == keys)
        above = (self.lines[keys[:n]] for n in range(len(keys) - 1, 0, -1) if keys[:n] in self.lines)
        fallback = self.lines.get(keys) or next(below, "") or next(above, "") if keys else ""
        place = self.lines.get(exact, "") or next(iter(inside), "") or next(set_by, "") or fallback
        name = dotted(keys) or ("''" if keys else "")
        return UserError(f"{name}{text}{f' ({place})' if place else ''}")

    def instance(self, cls: type, data: Any, keys: Keys, base: Mapping[str, Any]) -> Any:
        if not isinstance(data, dict):
            raise self.fail(keys, f"={shown(data)}: must be {wanted(cls)}")
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in data:
            if key not in fields:
                raise self.fail((*keys, key), f": unknown key; {suggestion(str(key), fields)}")
        hints = get_type_hints(cls)
        values = dict(base)
        for name, field in fields.items():
            path = (*keys, name)
            if name in data:
                values[name] = self.field(field, hints[name], data[name], path)
            elif name not in values and TABLE not in field.metadata and _has_no_default(field):
                if not dataclasses.is_dataclass(hints[name]):
                    raise self.fail(path, f": missing; must be {wanted(hints[name])}")
                values[name] = self.instance(hints[name], {}, path, {})  # a section of defaults, or what it lacks
            elif name not in values and _has_no_default(field):
                choices = ", ".join(field.metadata[TABLE])
                raise self.fail(path, f": missing; must be a section with kind, one of {choices}")
        for name, value in values.items():
            if problem := beyond_limit(cls, name, value):
                raise self.fail((*keys, name), f"={shown(value)}: {problem}")
        try:
            return cls(**values)
        except UserError as error:
            raise self.fail(keys, f": {error}" if keys else str(error)) from error
        except ValueError as error:
            raise self.fail(keys, _joined(str(error), fields, bool(keys)), _field_of(str(error), fields)) from error

    def field(self, field: "dataclasses.Field[Any]", hint: Any, value: Any, keys: Keys) -> Any:
        if TABLE not in field.metadata:
            return self.value(hint, value, keys)
        if value is None and field.default is None:
            return None
        default = field.default_factory
        if isinstance(value, dict) and value.get("kind") is None and default is not dataclasses.MISSING:
            return self.instance(default, {k: v for k, v in value.items() if k != "kind"}, keys, {})  # type: ignore
        return self.chosen(field.metadata[TABLE], field.metadata[SIZES], value, keys)

    def chosen(self, table: Mapping[str, type], sizes: Mapping[str, Mapping[str, Any]], value: Any, keys: Keys) -> Any:
        """A section whose class depends on its ``kind``, on top of the named size if it has one."""
        if not isinstance(value, dict):
            raise self.fail(keys, f"={shown(value)}: must be a section with kind, one of {', '.join(table)}")
        if value.get("kind") is None:
            raise self.fail((*keys, "kind"), f": missing; must be one of {', '.join(table)}")
        kind = value["kind"]
        if not isinstance(kind, str) or kind not in table:
            raise self.fail((*keys, "kind"), f"={shown(kind)}: {suggestion(str(kind), table)}")
        given = dict(value)
        base: dict[str, Any] = {}
        if kind in sizes and "size" in given:
            size = given.pop("size")
            if not isinstance(size, str) or size not in sizes[kind]:
                raise self.fail((*keys, "size"), f"={shown(size)}: {suggestion(str(size), sizes[kind])}")
            start = sizes[kind][size]
            base = {field.name: getattr(start, field.name) for field in dataclasses.fields(start) if field.init}
        return self.instance(table[kind], given, keys, base)

    def value(self, hint: Any, value: Any, keys: Keys) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return self.anything(value, keys)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            return self.instance(hint, value, keys, {})
        if _is_union(hint):
            return self.union(hint, value, keys)
        if origin is Literal:
            return self.literal(arguments, value, keys)
        if origin in (tuple, list) or hint in (tuple, list):
            return self.sequence(hint, value, keys)
        if _is_mapping(hint):
            return self.mapping(hint, value, keys)
        return self.scalar(hint, value, keys)

    def anything(self, value: Any, keys: Keys) -> Any:
        """A value that its owner checks; only NaN and infinity, which compare oddly, and text that no file can hold
        are refused here."""
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self.anything(item, (*keys, key))
        if isinstance(value, (int, float, str)):
            return self.scalar(type(value), value, keys)
        return value

    def union(self, hint: Any, value: Any, keys: Keys) -> Any:
        members = get_args(hint)
        if value is None and type(None) in members:
            return None
        rest = [member for member in members if member is not type(None)]
        if len(rest) == 1:
            return self.value(rest[0], value, keys)
        if isinstance(value, str):
            self.scalar(str, value, keys)
        if wants_text(hint) and type(value) in (list, int, float):  # the error of the one that is meant
            meant = [member for member in rest if (wants_list(member) if type(value) is list else member is str)]
            if len(meant) == 1 and not {int, float, bool} & set(rest):
                return self.value(meant[0], value, keys)
        for member in rest:
            try:
                return self.value(member, value, keys)
            except UserError:
                continue
        raise self.fail(keys, f"={shown(value)}: must be {wanted(hint)}")

    def literal(self, choices: tuple[Any, ...], value: Any, keys: Keys) -> Any:
        for choice in choices:
            if type(choice) is type(value) and choice == value:  # True is not 1 here
                return choice
        if str(value) in choices:  # a number where it is a name
            raise self.fail(keys, f'={shown(value)}: must be text; write "{value}" in quotes')
        raise self.fail(keys, f"={shown(value)}: {suggestion(str(value), [str(choice) for choice in choices])}")

    def sequence(self, hint: Any, value: Any, keys: Keys) -> Any:
        arguments = get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise self.fail(keys, f"={shown(value)}: must be {wanted(hint)}")
        if get_origin(hint) is tuple and Ellipsis not in arguments:
            if len(value) != len(arguments):
                raise self.fail(keys, f"={shown(value)}: must be {wanted(hint)}")
            return tuple(
                self.value(member, item, (*keys, i))
                for i, (member, item) in enumerate(zip(arguments, value, strict=True))
            )
        items = [self.value(arguments[0] if arguments else Any, item, (*keys, i)) for i, item in enumerate(value)]
        return tuple(items) if get_origin(hint) is tuple or hint is tuple else items

    def mapping(self, hint: Any, value: Any, keys: Keys) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise self.fail(keys, f"={shown(value)}: must be {wanted(hint)}")
        key_hint, value_hint = get_args(hint) or (Any, Any)
        return {
            self.value(key_hint, key, (*keys, key)): self.value(value_hint, item, (*keys, key))
            for key, item in value.items()
        }

    def scalar(self, hint: Any, value: Any, keys: Keys) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and isinstance(value, int) and abs(value) >= MOST_WHOLE:  # from Python; YAML refuses it earlier
            raise self.fail(keys, ": a whole number beyond 64 bits")
        if hint is float and is_number:
            if not math.isfinite(value):
                raise self.fail(keys, f"={value}: must be a finite number")
            return float(value)
        if hint is int and isinstance(value, float) and value.is_integer():
            written = f"; write {int(value)}" if abs(value) < 2**63 else " of at most 64 bits"
            raise self.fail(keys, f"={value}: must be a whole number{written}")
        if hint is str and is_number:
            raise self.fail(keys, f'={value}: must be text; write "{value}" in quotes')
        if hint is bool and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
            raise self.fail(keys, f"={value}: must be true or false; only these two words are")
        if hint is Path and isinstance(value, str):
            return Path(self.scalar(str, value, keys))
        fits = type(value) is hint if hint in (int, bool, str) else isinstance(hint, type) and isinstance(value, hint)
        if not fits or isinstance(value, float):
            raise self.fail(keys, f"={shown(value)}: must be {wanted(hint)}")
        if isinstance(value, str) and (problem := _unprintable(value)):
            raise self.fail(keys, f"={shown(value)}: {problem}")
        return value


def _unprintable(text: str) -> str | None:
    """Why a text can be no file name, prompt or saved value; None: it can."""
    for char in text:
        if "\udc80" <= char <= "\udcff":  # how Python holds an undecodable byte of the command line
            return f"byte 0x{ord(char) - 0xDC00:02x} is not UTF-8; write UTF-8, or rename the file"
        kind = unicodedata.category(char)
        if kind == "Cs" or (kind == "Cc" and char not in "\t\n\r"):
            return f"holds the {'surrogate' if kind == 'Cs' else 'control character'} U+{ord(char):04X}; take it out"
    return None


def _types_below(owner: Any, key: str | int) -> list[Any]:
    """The types of ``key`` inside a value of type ``owner``."""
    if isinstance(owner, _Table):
        return [hint for cls in owner.classes for hint in _types_below(cls, key)]
    if _is_union(owner):
        return [hint for member in get_args(owner) for hint in _types_below(member, key)]
    if _is_mapping(owner):
        return list(get_args(owner)[1:])
    if not dataclasses.is_dataclass(owner):
        return []
    assert isinstance(owner, type)
    for field in dataclasses.fields(owner):
        if field.name == key:
            table = field.metadata.get(TABLE)
            return [_Table(tuple(table.values()))] if table else [get_type_hints(owner)[field.name]]
    return []


@dataclasses.dataclass(frozen=True)
class _Table:
    """Stands for a section's type while a key path is followed."""

    classes: tuple[type, ...]


def is_table(hint: Any) -> bool:
    """Whether a type is a mapping the user fills freely: such a value is replaced as a whole, not merged."""
    if _is_union(hint):
        return any(is_table(member) for member in get_args(hint))
    return _is_mapping(hint)


def _field_of(message: str, fields: Iterable[str]) -> Keys:
    """The key path at the head of a dataclass's own message, as far as it is in a configuration; ``()``: none."""
    head = re.match(r"[A-Za-z_][\w.:]*", message)
    path = head[0].rstrip(".:").split(".") if head else []
    if not path or path[0] not in fields:
        return ()
    return tuple(int(part) if part.isascii() and part.isdigit() and len(part) < 19 else part for part in path)


def _joined(message: str, fields: Iterable[str], nested: bool) -> str:
    """A dataclass's own message behind its section's path: ``field=value`` becomes ``section.field=value``."""
    if not nested:
        return message
    names_field = any(message.startswith((f"{name}=", f"{name}:", f"{name}.", f"{name}[")) for name in fields)
    return f".{message}" if names_field else f": {message}"


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_union(hint: Any) -> bool:
    return get_origin(hint) is Union or isinstance(hint, types.UnionType)


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return hint is dict or (isinstance(origin, type) and issubclass(origin, Mapping))


def shown(value: Any) -> str:
    """A value as it is written in a configuration, shortened."""
    text = repr(plain(value)) if not isinstance(value, str) else repr(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text) or short(text)
