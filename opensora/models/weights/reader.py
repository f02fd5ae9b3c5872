"""Weights of any family out of files, in the layout of choice, strictly, and part by part.

Any process reads the rows that it needs and no others. What belongs to a family comes from its ``WeightFormat``.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.names import plain_names, some
from opensora.models.weights.rows import Rows, Shape, Target, build, read_rows
from opensora.models.weights.shards import check_index, weight_files
from opensora.models.weights.torch_files import is_torch_file, open_torch_file
from opensora.utils.errors import UserError
from opensora.utils.files import fp8
from opensora.utils.files.safetensors_files import FLOATS, OpenWeights, check_types, open_weights

StateDict: TypeAlias = dict[str, Tensor]
# (name, tensor of a file, shape that a model wants) -> the tensor in that shape; None: it cannot be
Refit: TypeAlias = Callable[[str, Tensor, Shape], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a file's tensors compare with what a model wants."""

    source: str
    layout: Layout
    prefix: str  # of all names in the file, without which they were compared
    left_out: tuple[str, ...]  # of an autoencoder or a text encoder in the same file
    loaded: int
    missing: tuple[str, ...]  # wanted, not in the file, and not allowed to be missing
    left_at_init: tuple[str, ...]  # wanted, not in the file, allowed to be missing
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]  # "name (shape in the file, shape wanted)"
    recomputed: tuple[str, ...] = ()  # in the file, and computed by the model
    resized: tuple[str, ...] = ()  # "name (shape in the file, shape made of it)": made to fit
    in_fp8: tuple[str, ...] = ()  # stored so
    scaled: int = 0  # how many of these have a scale
    activations: tuple[str, ...] = ()  # scales of what layers read, in the file and not read

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what}: {some(names)}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape (file, model)", self.wrong_shape),
                ("left at their initial values", self.left_at_init),
                ("of other models left out", self.left_out),
                ("computed by the model and not read", self.recomputed),
                ("made to fit (file, model)", self.resized),
                (f"stored in fp8, {self.scaled} of them with a scale", self.in_fp8),
                ("scales of activations not read", self.activations),
            )
            if names
        ]
        if self.prefix:
            parts.append(f"names in the file begin with {self.prefix}")
        return f"{self.source}: {self.loaded} tensors loaded" + "".join(f"; {part}" for part in parts)


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a file, an index json, or their folder, in a layout of choice; read when asked for.

    Only names and shapes are read at once, and scales of what is in fp8, which becomes fp32. Tensors come on the CPU;
    others that need no conversion are mapped from the file, so that not even they take memory of their own.
    """

    def __init__(self, path: str | os.PathLike[str], format: WeightFormat, to: Layout | None = None) -> None:
        """``to``: the layout to give tensors in; None: as they are written.

        Raises:
            UserError: no such file, not safetensors, a tensor that is in two files, or another family's where order
                changes.
        """
        self._path = path
        self._places: dict[str, fp8.Place] = {}  # tensor -> its file, and its name there
        self._sources: dict[str, Shape] = {}  # of the tensors, under the model's names
        self._metadata: dict[str, str] = {}
        self._made: StateDict = {}  # in place of what the file gives
        self._open(Path(path), format)
        if foreign := _adapters(self._sources) or format.other_format(self._sources):
            raise UserError(f"{path}: {foreign}")
        self.layout = format.detect_layout(self._sources, self._metadata)
        self.recomputed = _matching(self._sources, format.recomputed)
        kept = {name: shape for name, shape in self._sources.items() if name not in self.recomputed}
        self._targets = format.targets(kept, self.layout, self.layout if to is None else to)
        wrong = {name: target for name, target in self._targets.items() if not target.fits(kept)}
        self.mismatched = {name: _described(target, kept) for name, target in wrong.items()}
        used = {rows.tensor for target in self._targets.values() for rows in target.rows}
        self.unused = tuple(name for name in kept if name not in used)

    def _open(self, path: Path, format: WeightFormat) -> None:
        """Open the files and learn names, shapes and metadata."""
        keys = format.torch_keys
        files, index = weight_files(path, torch_files=keys is not None)
        opened = [open_weights(f) if keys is None or not is_torch_file(f) else open_torch_file(f, keys) for f in files]
        check_index({one.path.name: one.shapes for one in opened}, index)
        names = self._names_to_read(opened, format, path)
        marks: dict[str, fp8.Place] = {}
        for one in opened:
            self._metadata.update(one.metadata)
            own = {names[stored]: stored for stored in one.shapes if stored in names}
            for name in own:
                if name in self._places or (name in marks and fp8.weight_of(name)):
                    raise UserError(f"{one.path}: {name} is in two files of {path}: give one file, or an index json")
            marks |= {name: (one, stored) for name, stored in own.items() if fp8.is_mark(name)}
            own = {name: stored for name, stored in own.items() if name not in marks}
            read = (stored for name, stored in own.items() if not _matching([name], format.recomputed))
            check_types(one, read, (*FLOATS, *fp8.TYPES))
            self._places |= {name: (one, stored) for name, stored in own.items()}
            self._sources |= {name: one.shapes[stored] for name, stored in own.items()}
        self.scales = fp8.read_scales(self._places, marks)
        self.activations = fp8.of_activations(marks)

    def _names_to_read(self, opened: Collection[OpenWeights], format: WeightFormat, path: Path) -> dict[str, str]:
        """Name in a file -> name in the model, of all but other models' tensors."""
        stored = [name for one in opened for name in one.shapes]
        self.prefix, names, self.left_out = plain_names(stored, format.top_level, str(path))
        # Of formats whose files may hold the other half of a model too, as a decoder beside its encoder.
        not_read: Callable[[Collection[str]], Collection[str]] | None = getattr(format, "not_read", None)
        skipped = set() if not_read is None else set(not_read(names.values()))
        skipped |= {name for name in names.values() if fp8.weight_of(name) in skipped}
        self.left_out += tuple(stored for stored, name in names.items() if name in skipped)
        return {stored: name for stored, name in names.items() if name not in skipped}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, in the layout of choice."""
        made = {name: tuple(tensor.shape) for name, tensor in self._made.items()}
        return {name: target.shape for name, target in self._targets.items()} | made

    @property
    def resized(self) -> tuple[str, ...]:
        """ "name (shape in the file, shape made of it)" of what has fewer or more values than the file has of it."""
        used: Counter[str] = Counter()
        for target in self._targets.values():
            for rows in target.rows:
                used[rows.tensor] += rows.count * prod(target.shape[1:])
        found = {
            name: self._sources[target.rows[0].tensor]
            for name, target in self._targets.items()
            if name in self._made or any(used[r.tensor] != prod(self._sources[r.tensor]) for r in target.rows)
        }
        return tuple(f"{name} {stored}, {self.shapes[name]}" for name, stored in found.items())

    def refit(self, refit: Refit, wanted: Mapping[str, Shape]) -> None:
        """Make what has another shape than is wanted fit, as far as ``refit`` can."""
        for name, shape in self.shapes.items():
            if wanted.get(name, shape) != shape and name not in self.mismatched:
                made = refit(name, self[name], wanted[name])
                if made is not None:
                    self._made[name] = made

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]
        target = self._targets[name]
        if name in self.mismatched:
            raise UserError(f"{self._path}: {name} cannot be {self.mismatched[name]}: fetch or export the file again")
        if unchanged := target.unchanged(self._sources):
            return self._get(unchanged, ())
        return build(target, self._sources, self._get)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """Write the values from index ``start`` on into ``part`` (any device and type), and read no others.

        Returns:
            False if there is no such tensor; ``part`` is then as it was.
        """
        target = self._targets.get(name)
        if target is None:
            return False
        if name in self._made:
            part.copy_(self._made[name][tuple(slice(s, s + n) for s, n in zip(start, part.shape, strict=True))])
            return True
        if not start:  # a single number
            part.copy_(self[name])
            return True
        columns = tuple(slice(s, s + size) for s, size in zip(start[1:], part.shape[1:], strict=True))
        first, last = start[0], start[0] + part.shape[0]
        position = 0
        for rows in target.rows:
            low, high = max(first, position), min(last, position + rows.count)
            if low < high:
                wanted = rows.part(low - position, high - position)
                part[low - first : high - first].copy_(self._read(wanted, target, columns))
            position += rows.count
        return True

    def _read(self, rows: Rows, target: Target, columns: tuple[slice, ...]) -> Tensor:
        return read_rows(rows, target.shape[1:], self._sources, self._get, columns)

    def _get(self, name: str, index: tuple[slice, ...]) -> Tensor:
        file, stored = self._places[name]
        found: Tensor = file.file.get_slice(stored)[index] if index else file.file.get_tensor(stored)
        if not self._is_fp8(name):
            return found
        return fp8.decode(found, self.scales.get(name), index[0].start if index else 0)

    def _is_fp8(self, name: str) -> bool:
        file, stored = self._places[name]
        return file.types[stored] in fp8.TYPES

    @property
    def in_fp8(self) -> tuple[str, ...]:
        """Tensors of the file, by the model's names, that are stored so."""
        return tuple(filter(self._is_fp8, self._sources))

    @property
    def from_fp8(self) -> set[str]:
        """Tensors of the layout of choice that are made of such, whole or in part."""
        return {
            name for name, target in self._targets.items() if any(self._is_fp8(rows.tensor) for rows in target.rows)
        }


def read_state_dict(path: str | os.PathLike[str], format: WeightFormat) -> tuple[StateDict, Layout]:
    """Tensors (on the CPU, mapped from the file) and layout of a safetensors file, an index json, or their folder."""
    file = WeightFile(path, format)
    return dict(file), file.layout


def load_state_dict_for(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: WeightFormat,
    *,
    to: Layout,
    allow_missing: Collection[str] = (),
    refit: Refit | None = None,
) -> tuple[WeightFile, LoadReport]:
    """Weights of ``path`` in the model's layout, checked name by name and shape by shape; nothing is read yet.

    Args:
        model: tells names and shapes; may be on the meta device.
        to: layout of the model.
        allow_missing: patterns of names the file may lack, as ``format.may_lack`` where training starts from it; they
            are not in the result.
        refit: makes tensors of another shape fit.

    Raises:
        UserError: anything missing, unexpected or of another shape, all in one line.
    """
    file = WeightFile(path, format, to)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if refit is not None:
        file.refit(refit, wanted)
    shapes = file.shapes
    absent = [name for name in wanted if name not in shapes]
    allowed = _matching(absent, allow_missing)
    report = LoadReport(
        source=str(path),
        layout=file.layout,
        prefix=file.prefix,
        left_out=file.left_out,
        loaded=sum(name in wanted for name in shapes),
        missing=tuple(name for name in absent if name not in allowed),
        left_at_init=allowed,
        unexpected=(*(name for name in shapes if name not in wanted), *file.unused),
        wrong_shape=tuple(
            f"{name} {file.mismatched[name] if shapes[name] == shape else shapes[name]}, {shape}"
            for name, shape in wanted.items()
            if name in shapes and (shapes[name] != shape or name in file.mismatched)
        ),
        recomputed=file.recomputed,
        resized=file.resized,
        in_fp8=file.in_fp8,
        scaled=len(file.scales),
        activations=file.activations,
    )
    if not report.fits:
        raise UserError(f"{report}; {format.advice}")
    return file, report


@torch.no_grad()
def load_into(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: WeightFormat,
    *,
    to: Layout,
    allow_missing: Collection[str] = (),
) -> LoadReport:
    """Fill an unsharded model; parameters that may be missing keep their values. Errors as in load_state_dict_for."""
    file, report = load_state_dict_for(model, path, format, to=to, allow_missing=allow_missing)
    for name, tensor in model.state_dict().items():
        if name in file:
            tensor.copy_(file[name])
    return report


def _described(target: Target, stored: Mapping[str, Shape]) -> str:
    """What a tensor is made of, where that cannot be."""
    parts = {rows.tensor: stored[rows.tensor] for rows in target.rows}
    return "made of " + " and ".join(f"{name} {shape}" for name, shape in parts.items())


def _adapters(names: Collection[str]) -> str | None:
    """What a file is that holds adapters, and what to do; None: it is none."""
    if any("lora_" in name or name.endswith(".alpha") for name in names):
        return "these are adapters (LoRA), not weights: give them as lora=, and the weights that they belong to here"
    return None


def _matching(names: Collection[str], patterns: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
