"""A configuration of the Open-Sora family becomes one of ours: keys by the table, or together by models.py and jobs.py.

What has no meaning here is named once, with the reason. A key that neither the table nor the class of its section knows
is refused with a suggestion, as any key of ours is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opensora.config.family import keys as table
from opensora.config.schema import shown, suggestion, types_at
from opensora.config.strict_yaml import COMMAND_LINE, Keys, Lines
from opensora.models.families import MODEL_CONFIGS
from opensora.models.text import TEXT_ENCODER_CONFIGS
from opensora.models.vae import AUTOENCODER_CONFIGS
from opensora.schedulers import OBJECTIVE_CONFIGS
from opensora.utils.console import announce
from opensora.utils.errors import UserError

OWN_CLASSES: dict[str, Mapping[str, type]] = {
    "model": MODEL_CONFIGS,
    "vae": AUTOENCODER_CONFIGS,
    "text": TEXT_ENCODER_CONFIGS,
    "objective": OBJECTIVE_CONFIGS,
}
TRAINING = {
    "dataset",
    "bucket_config",
    "data_path",
    "lr",
    "optim",
    "epochs",
    "outputs",
    "grad_checkpoint",
    "mask_ratios",
}
SAMPLING = {"save_dir", "prompt", "prompt_path", "sampling_option", "cond_type", "image_size", "resolution"}
NO_MEANING = "has no meaning here: "
_said: set[str] = set()


def says_training(tree: Mapping[str, Any]) -> bool:
    """Whether a file of the family is of a training run; those for sampling may name a data set, too."""
    return len(TRAINING & tree.keys()) > len(SAMPLING & tree.keys())


class Translation:
    """One file, while its keys are read.

    Args:
        cls: RunConfig or SampleConfig.
        tree: what the file says.
        lines: where each key path was set.
        file: a whole file, whose other keys are as the family has them; None: some flags beside another file.
    """

    def __init__(self, cls: type, tree: Mapping[str, Any], lines: Lines, *, file: Path | None) -> None:
        self.cls, self.lines, self.is_file = cls, lines, file is not None
        self.nowhere = COMMAND_LINE if file is None else str(file)  # where a key is missing
        self.is_training = bool(types_at(cls, ("train",)))
        self.given = flattened(tree, lines)
        self.layer: dict[Any, Any] = {}
        self.places: Lines = {}
        self.notes: dict[str, str] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; None, as no key at all, means that the family's default holds."""
        value = self.given.get(key)
        return default if value is None else value

    def first(self, *keys: str) -> tuple[str, Any]:
        """(key, value) of the first that is given; the last key and None: none is."""
        return next(((key, self.given[key]) for key in keys if self.given.get(key) is not None), (keys[-1], None))

    def place(self, key: str) -> str:
        head, _, rest = key.partition(".")
        return self.lines.get((head, rest)) or self.lines.get((head,)) or self.nowhere

    def over(self, key: str, other: str) -> bool:
        """Whether ``key`` is given on the command line, and wins over ``other``, which the file has or nobody."""
        typed = [self.given.get(name) is not None and self.place(name) == COMMAND_LINE for name in (key, other)]
        return typed == [True, False]

    def fail(self, key: str, reason: str) -> UserError:
        """The error of a key: reason, and where it stands."""
        value = f"={shown(self.given[key])}" if self.given.get(key) is not None else ""
        return UserError(f"{key}{value}: {reason} ({self.place(key)})")

    def note(self, key: str, why: str) -> None:
        """What a user should know of a key: that it has no meaning here, or another one."""
        self.notes.setdefault(key, why)

    def put(self, target: str, value: Any, key: str) -> None:
        """Set a key of ours to what ``key`` of theirs says; what this version has not is noted.

        Raises:
            UserError: another key says otherwise.
        """
        path: Keys = tuple(target.split("."))
        if not self.has(path):
            self.note(key, NO_MEANING + "nothing does that")
            return
        below = self.layer
        for name in path[:-1]:
            below = below.setdefault(name, {})
        if path[-1] in below and below[path[-1]] != value:
            raise self.fail(key, f"{self.places[path]} says otherwise; keep one")
        below[path[-1]] = value
        self.places[path] = f"{self.place(key)}, as {key}"

    def default(self, target: str, value: Any, key: str) -> None:
        """Set a key of ours that the file does not set under the same name."""
        if self.given.get(target) is None:
            self.put(target, value, key)

    def has(self, path: Keys) -> bool:
        """Whether there is such a key of ours; of a section with kinds, in the kind that was chosen."""
        classes = OWN_CLASSES.get(str(path[0]))
        kind = self.layer.get(path[0], {}).get("kind") if classes is not None else None
        if classes is not None and kind is not None and len(path) == 2:
            cls = classes.get(kind)
            return cls is None or path[1] in ("kind", "size") or path[1] in own_names(cls)
        return bool(types_at(self.cls, path))

    def read(self, key: str, value: Any, rule: table.Key) -> None:
        """One key of the table that stands for one of ours."""
        target = rule.training if self.is_training else rule.sampling
        if rule.only is not None:
            if value != rule.only:
                raise self.fail(key, f"must be {shown(rule.only)}, which is the only one here")
        elif rule.why:
            self.note(key, NO_MEANING + rule.why)
        elif not target:
            self.note(key, f"is for {'sampling' if self.is_training else 'training'}")
        else:
            self.put(target, self.converted(key, value, rule.read), key)

    def converted(self, key: str, value: Any, read: table.Read | None) -> Any:
        try:
            return value if read is None else read(value)
        except ValueError as error:
            raise self.fail(key, str(error)) from error

    def rest(self) -> None:
        """Every key that is not put together from several; those of a kind's own class keep their names."""
        for key, value in self.given.items():
            section, _, name = key.rpartition(".")
            rule = table.KEYS.get(key)
            if rule is not None and rule.together:
                continue
            if rule is None:
                self.own_key(key, section, name, value)
            elif value is not None and not (value is False and rule.why):
                self.read(key, value, rule)

    def own_key(self, key: str, section: str, name: str, value: Any) -> None:
        """A key that the class of a kind has, which is not in the table."""
        ours = {"model": "model", "scheduler": "objective"}.get(section)
        classes = OWN_CLASSES.get(ours or "")
        kind = self.layer.get(ours, {}).get("kind")
        known = own_names(classes[kind]) if classes is not None and kind in classes else None
        if ours is None or (known is not None and name not in known):
            raise self.fail(key, f"unknown key; {suggestion(name, self.names_in(section, known))}")
        if value is not None:
            self.put(f"{ours}.{name}", value, key)

    def names_in(self, section: str, known: Mapping[str, Any] | None) -> list[str]:
        front = f"{section}." if section else ""
        names = [key.removeprefix(front).split(".")[0] for key in table.KEYS if key.startswith(front)]
        return list(dict.fromkeys([*names, *(known or {})]))

    def say(self) -> None:
        """Every note once in a process; keys of the same reason on one line."""
        for why in dict.fromkeys(self.notes.values()):
            names = [f"{key} ({self.place(key)})" for key, reason in self.notes.items() if reason == why]
            line = f"{', '.join(names)}: {why}"
            if line not in _said:
                _said.add(line)
                announce(line)


def own_names(cls: type) -> dict[str, Any]:
    """Field -> itself, of a section's class."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init and field.name != "kind"}


def flattened(tree: Mapping[str, Any], lines: Lines) -> dict[str, Any]:
    """Dotted key -> value; keys of the sections that the table goes into, and of no others, are taken one by one.

    Raises:
        UserError: a section that is none.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in table.SECTIONS:
            flat[name] = value
        elif value is None:  # as a section that is not there
            continue
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            place = lines.get((name,), COMMAND_LINE)
            raise UserError(f"{name}={shown(value)}: must be a mapping, as {name} = dict(...) ({place})")
    return flat


def translated(
    cls: type,
    tree: Mapping[str, Any],
    lines: Lines,
    parts: tuple[Callable[[Translation], None], ...],
    *,
    file: Path | None,
) -> tuple[dict[Any, Any], Lines]:
    """A layer of ours, and where each of its keys was set; what has no meaning is announced.

    Args:
        parts: what reads keys that belong together, in this order, before all others.
        file: the whole file that ``tree`` is; None: flags beside another one.

    Raises:
        UserError: an unknown key, or a value that cannot be here, with file and line.
    """
    found = Translation(cls, tree, lines, file=file)
    for part in parts:
        part(found)
    found.rest()
    found.say()
    return found.layer, found.places
