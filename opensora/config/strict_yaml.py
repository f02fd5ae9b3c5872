"""YAML without its surprises: scalars as in YAML 1.2, nothing given twice, nothing hidden, every value with its line.

PyYAML reads ``1e-4`` as text, ``no`` as False, ``16:9`` as 969 and ``012`` as 10, keeps the last of two equal keys,
and lets nine lines of aliases fill the memory. Here: numbers are numbers, only true and false are booleans, and
duplicate keys, aliases, anchors and tags are refused.
"""

import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing, short

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000  # keys and values of a file; the reader takes seconds for so many
COMMAND_LINE = "command line"  # the source of a value that no file holds

Keys = tuple[str | int, ...]
Lines = dict[Keys, str]

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_BASED_INT = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")


def dotted(keys: Keys) -> str:
    """How a key path is written in messages and overrides."""
    return ".".join(short(key) for key in keys)


def is_regular_file(path: Path) -> bool:
    """Whether there is a file at ``path`` that reading comes to the end of: no folder, pipe or device."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def read_yaml(path: Path) -> tuple[dict[str | int, Any], Lines]:
    """The mapping in a YAML file, and for every key path the ``file:line`` that set it.

    Raises:
        UserError: no such file, not UTF-8, not YAML, not a mapping, or something this reader refuses.
    """
    lines: Lines = {}
    value = _parse(read_text(path), str(path), lines)
    if value is None:
        return {}, lines
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {_kind_of(value)}; must be a mapping of keys to values")
    return value, lines


def read_text(path: Path) -> str:
    """The text of a configuration file of at most ``MAX_BYTES``, without a byte order mark.

    Raises:
        UserError: no such file, too large, or not UTF-8.
    """
    raw = _read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from error


def _read_bytes(path: Path) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise UserError(f"{path}: cannot be read (it is {kind}); give the path of a configuration file")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{path}: {status.st_size} bytes; a configuration has at most {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path; UserError is one too
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a configuration file") from error


def parse_value(text: str, keys: Keys) -> Any:
    """One value from the command line, as on the right of ``key:`` in a file; ``keys`` names it in errors."""
    return _parse(text, COMMAND_LINE, {}, keys)


def to_yaml_text(value: Any) -> str:
    """Plain data as YAML that ``read_yaml`` reads back unchanged."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10**9, indent=2
    )


def _parse(text: str, source: str, lines: Lines, keys: Keys = ()) -> Any:
    named = f"{dotted(keys)} ({source})" if keys else source
    with parsing(lambda reason: UserError(f"{named}: not valid YAML: {reason}")):
        try:
            node = _StrictComposer(text, named).get_single_node()
        except yaml.YAMLError as error:
            raise UserError(_yaml_message(error, named)) from error
    return None if node is None else _plain(node, keys, source, lines)


def _place(source: str, mark: Any) -> str:
    """``file:line``; a value from the command line has no lines."""
    return source if COMMAND_LINE in source else f"{source}:{mark.line + 1}"


def _yaml_message(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = _place(source, mark) if mark is not None else source
    problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    if "'\\t'" in problem:
        return f"{place}: a tab where YAML wants spaces; indent with spaces"
    if "while scanning an alias" in str(getattr(error, "context", "")):
        return f"{place}: * begins an alias, which is not allowed; put text that begins with * in quotes"
    if "but found another document" in problem:
        return f"{place}: a second document begins; a configuration is one document"
    if COMMAND_LINE in source and "<stream end>" in problem:  # a shell has cut it at a space
        return f"{place}: not valid YAML: a bracket or quote is not closed; put the whole override in quotes"
    return f"{place}: not valid YAML: {problem}"


class _StrictComposer(yaml.SafeLoader):
    """Text to nodes, refusing aliases, anchors, tags and deep nesting before anything is built."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source = source
        self.depth = self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        place = _place(self.source, event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UserError(f"{place}: aliases and anchors (*{event.anchor}) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise UserError(f"{place}: the tag {event.tag} is not allowed; values are plain data, text goes in quotes")
        self.values += 1
        if self.values > MAX_VALUES:
            raise UserError(f"{place}: more than {MAX_VALUES} keys and values; give long lists as files (prompt_csv)")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UserError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _plain(node: yaml.Node, keys: Keys, source: str, lines: Lines) -> Any:
    lines[keys] = _place(source, node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, keys, source, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*keys, index), source, lines) for index, item in enumerate(node.value)]
    text = str(node.value)
    if isinstance(node, yaml.ScalarNode) and node.style is not None:
        return text
    return _scalar(text, keys, lines[keys])


def _mapping(node: yaml.MappingNode, keys: Keys, source: str, lines: Lines) -> dict[str | int, Any]:
    result: dict[str | int, Any] = {}
    for key_node, value_node in node.value:
        place = _place(source, key_node.start_mark)
        key = _plain(key_node, (), source, {}) if isinstance(key_node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            where = f"{place}: a key under {dotted(keys) or 'the top level'} is neither text nor whole number"
            quoted = isinstance(key_node, yaml.ScalarNode) and bool(key_node.value)
            raise UserError(f'{where}; write "{short(key_node.value, 40)}" in quotes' if quoted else where)
        path = (*keys, key)
        if key in result:
            raise UserError(f"{dotted(path)}: given twice ({lines[path]} and {place}); keep one")
        result[key] = _plain(value_node, path, source, lines)
        lines[path] = place
    return result


def _scalar(text: str, keys: Keys, place: str) -> Any:
    name = dotted(keys) or "a key"
    if "${" in text:
        raise UserError(f"{name}={text} ({place}): ${{...}} is not replaced here; write the value")
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0":
            number = digits.lstrip("0") or "0"
            raise UserError(
                f'{name}={text} ({place}): readers disagree on leading zeros; write {number}, or "{text}" for text'
            )
        return _bounded(text, 10, name, place)
    if _BASED_INT.match(text):
        return _bounded(text, 0, name, place)
    if _FLOAT.match(text):
        value = float(text)
        if value == 0 and re.search(r"[1-9]", re.split("[eE]", text)[0]):
            raise UserError(f"{name}={text} ({place}): is closer to 0 than numbers can be; write 0 if that is meant")
        return value
    if _INFINITE.match(text):
        return math.nan if text[1] in "nN" else math.copysign(math.inf, -1 if text[0] == "-" else 1)
    return text


def _bounded(text: str, base: int, name: str, place: str) -> int:
    if len(text) <= 24:
        value = int(text, base)
        if abs(value) < 2**63:
            return value
    raise UserError(f"{name} ({place}): a whole number beyond 64 bits")


def _kind_of(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes every text that this module's reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    patterns = (_NULL, _BOOL, _INT, _BASED_INT, _FLOAT, _INFINITE)
    style = '"' if "${" in text or any(pattern.match(text) for pattern in patterns) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
