"""Files of the family, and the family's flags: on top of its own files, and beside a YAML file of ours.

Flags are written with hyphens or underscores. On a file of the family they set a key of it before it becomes ours, as
in the family's own scripts; beside a file of ours they become the key that they stand for.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opensora.config.family import keys as table
from opensora.config.family.booleans import NONE, WORDS, booleans, is_boolean, read_word
from opensora.config.family.data import data, dataset
from opensora.config.family.jobs import layout, optimizer, run, sampled
from opensora.config.family.models import models, stills
from opensora.config.family.translation import says_training, translated
from opensora.config.mmengine import read_python
from opensora.config.schema import types_at, wants_text
from opensora.config.strict_yaml import COMMAND_LINE, Keys, Lines, parse_value
from opensora.utils.errors import UserError

PARTS = (booleans, dataset, models, stills, sampled, data, layout, optimizer, run)
ALIASES = ("resolution", "aspect_ratio", "num_frames", "num_steps", "guidance", "guidance_img")  # of sampling_option
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_WRITTEN = {None: "null", True: "true", False: "false"}
_WORDS = {"none": None, "null": None, "true": True, "false": False}


class _Word(NamedTuple):
    """A flag or override of the command line, with what belongs to it."""

    name: str  # dotted, with underscores
    values: tuple[str, ...]
    words: tuple[str, ...]  # as they were given
    dashed: bool


def trains(path: Path) -> bool:
    """Whether a file of the family is of a training run.

    Raises:
        UserError: it cannot be read, or is no data.
    """
    return says_training(read_python(path)[0])


def read_family(cls: type, path: Path, words: Sequence[str]) -> tuple[dict[Any, Any], Lines, list[str]]:
    """(layer of ours, where its keys were set, words that are overrides of ours) of a file and a command line.

    Args:
        cls: RunConfig or SampleConfig.

    Raises:
        UserError: a file that is no data or of the other kind, an unknown key, or a value that cannot be here.
    """
    tree, lines = read_python(path)
    is_training = bool(types_at(cls, ("train",)))
    if tree.get("model") is None:
        raise UserError(f"{path}: names no model; a configuration of the family has model = dict(type=...)")
    if says_training(tree) != is_training:
        kind, script = ("sampling", "inference") if is_training else ("training", "train")
        raise UserError(f"{path}: is a configuration for {kind}; give it to scripts/diffusion/{script}.py")
    rest: list[str] = []
    for word in _words(words):
        keys = _place_in(tree, word.name) if word.values or word.dashed else None
        if keys is None or not (is_known(word.name) or not types_at(cls, keys[:1])):
            rest += word.words
            continue
        _set(tree, keys, _value(cls, word, ".".join(map(str, keys))))
        lines[keys] = COMMAND_LINE
    _move_aliases(tree, lines)
    layer, places = translated(cls, tree, lines, PARTS, file=path)
    if is_training:
        layer.setdefault("name", run_name(path))
    return layer, places, rest


def flag_overrides(cls: type, words: Sequence[str]) -> tuple[list[tuple[Keys, Any]], list[str]]:
    """The family's flags beside a file of ours: (our keys and values, all other words).

    Raises:
        UserError: a flag that stands for nothing there, or its value is missing.
    """
    rest: list[str] = []
    tree: dict[str, Any] = {}
    lines: Lines = {}
    for word in _words(words):
        is_ours = bool(types_at(cls, word.name.split("."))) and (
            len(word.values) == 1 or (not word.values and word.name not in table.SWITCHES)
        )
        if word.name in table.LISTS and not any(value.startswith("[") for value in word.values):
            is_ours = False
        if is_ours and word.name in table.SCORES and word.values[0].lower() == "none":
            rest.append(f"{word.name}=null")
            continue
        if is_ours and word.dashed and word.values and is_boolean(cls, word.name):
            rest.append(f"{word.name}={_WRITTEN[read_word(word.name, word.values[0])]}")
            continue
        if is_ours or not word.dashed or not is_known(word.name):
            rest += word.words
            continue
        keys = tuple(table.FLAGS.get(word.name, word.name).split("."))
        _set(tree, keys, _value(cls, word, ".".join(map(str, keys))))
        lines[keys] = COMMAND_LINE
    if not tree:
        return [], rest
    layer, _ = translated(cls, tree, lines, PARTS, file=None)
    return list(_leaves(layer, ())), rest


def is_known(name: str) -> bool:
    """Whether the family has a key or flag of this name."""
    return name in table.FLAGS or name in table.KEYS


def run_name(path: Path) -> str:
    """What a run is called that has no other name: as its file, behind the folder of its model."""
    folder = path.resolve().parent
    return f"{folder.parent.name}-{path.stem}" if folder.name in ("train", "inference", "misc") else path.stem


def _words(words: Sequence[str]) -> list[_Word]:
    """The command line, in which prompts stand themselves or by their file.

    Raises:
        UserError: they do both.
    """
    found = list(_split(words))
    if {"prompt", "prompt_path"} <= {word.name for word in found}:
        raise UserError("--prompt and --prompt-path: both say what is sampled; give one of them")
    return found


def _split(words: Sequence[str]) -> Iterable[_Word]:
    """Flags with their values; a flag without one has none here, which is for its owner to judge."""
    left = list(words)
    while left:
        first = left.pop(0)
        dashed = first.startswith("--")
        name, equals, value = first.removeprefix("--").partition("=")
        name = name.replace("-", "_") if dashed else name
        taken = [first]
        values = [value] if equals else []
        most = len(left) if name in table.MANY else 2 if name in table.PAIRS else 1
        switch = name in table.SWITCHES
        while dashed and not equals and left and len(values) < most and not left[0].startswith("--"):
            if values and _OVERRIDE.match(left[0]) and name in table.MANY:
                break
            if switch and left[0].lower() not in (*WORDS, *NONE):
                break
            values.append(left.pop(0))
            taken.append(values[-1])
        yield _Word(name, tuple(values), tuple(taken), dashed)


def _place_in(tree: Mapping[str, Any], name: str) -> Keys | None:
    """Where a flag is set in a file of the family; None: nowhere."""
    section = tree.get("dataset")
    if isinstance(section, Mapping) and (name == "data_path" or name in section):
        return ("dataset", name)
    if name == "lr" and isinstance(tree.get("optim"), Mapping):
        return ("optim", "lr")
    keys: Keys = tuple(table.FLAGS.get(name, name).split("."))
    return keys if is_known(name) or keys[0] in tree else None


def _value(cls: type, word: _Word, key: str) -> Any:
    """What the values of a flag are, as the family's scripts read them; ``key``: what it sets, dotted."""
    if not word.values:
        if word.name in table.SWITCHES:
            return True
        raise UserError(f"{word.words[0]}: a value is missing; write {word.words[0]} VALUE")
    if word.name in table.MANY:
        return list(word.values)
    if word.name in table.PAIRS and len(word.values) == 2:
        return [_plain_value(value, word.name) for value in word.values]
    if is_boolean(cls, key):
        return read_word(word.name, word.values[0])
    key = table.FLAGS.get(word.name, word.name)
    rule = table.KEYS.get(key, table.TOGETHER)
    targets = [target for target in (rule.sampling, rule.training) if target]
    hints = [hint for target in targets for hint in types_at(cls, target.split("."))]
    if word.values[0].lower() != "none" and (key in table.TEXTS or any(wants_text(hint) for hint in hints)):
        return word.values[0]
    return _plain_value(word.values[0], word.name)


def _plain_value(text: str, name: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text[:1] == "(" and text[-1:] == ")":
        text = f"[{text[1:-1]}]"
    return parse_value(text, (name,))


def _set(tree: dict[Any, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _move_aliases(tree: dict[str, Any], lines: Lines) -> None:
    """Names outside a section that win over the same names in it, in files of Open-Sora 2; ckpt_path in all."""
    if isinstance(tree.get("sampling_option"), dict):
        for name in ALIASES:
            if tree.get(name) is not None:
                tree["sampling_option"][name] = tree.pop(name)
                lines[("sampling_option", name)] = lines.pop((name,), COMMAND_LINE)
    if (path := tree.pop("ckpt_path", None)) is not None:
        _set(tree, ("model", "from_pretrained"), path)
        lines[("model", "from_pretrained")] = lines.pop(("ckpt_path",), COMMAND_LINE)


def _leaves(layer: Mapping[Any, Any], keys: Keys) -> Iterable[tuple[Keys, Any]]:
    for key, value in layer.items():
        if isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value):
            yield from _leaves(value, (*keys, key))
        else:
            yield (*keys, key), value
