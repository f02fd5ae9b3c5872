"""Weights in fp8, as people exchange them: what of a file's tensors are scales, and which values weights have.

A weight is its fp8 value times its scale, computed in fp32. A scale is one number for a tensor, or one for each of its
output channels (rows), under one of these names beside ``X.weight``:

* ``X.scale_weight``: ComfyUI, which marks such files by a tensor ``scaled_fp8`` that has no values to use;
* ``X.weight_scale``: llm-compressor, diffusers, and ComfyUI since it states the form of a layer in ``X.comfy_quant``;
* ``X.weight_scale_inv``: DeepSeek's name for what values are multiplied with: the inverse of what made them.

Scales of activations (``X.scale_input``, ``X.input_scale``) are no weights. Files in fp8 without any scale are plain:
values count as they stand. Beside scaled tensors those of one dim, which no tool scales, are plain too. A matrix
without a scale there is refused: ComfyUI would take 1, but a scale that was lost looks the same, and is about 0.001.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import FLOATS, OpenWeights
from opensora.utils.files.untrusted import parse_json, parsing, short

TYPES = ("F8_E4M3", "F8_E5M2")  # as safetensors calls them
Place: TypeAlias = tuple[OpenWeights, str]  # a file, and what it calls a tensor
_OF_WEIGHTS = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_FORM, _FORMS = ".comfy_quant", "_quantization_metadata"  # of a layer, in a tensor; of all, in the file's metadata
_MARKER = "scaled_fp8"
_READ = ("float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e5m2")
_OF_COMPUTATION = ("format", "full_precision_matrix_mult")  # what a form says beside what its values are
_MOST_BYTES = 4096  # of the form of a layer, which has about 30
_GIVE = "give the bf16 or fp16 weights"


def is_mark(name: str) -> bool:
    """Whether a tensor says how to read weights in fp8, instead of being one."""
    return weight_of(name) is not None or name.rpartition(".")[2] == _MARKER


def weight_of(name: str) -> str | None:
    """The weight whose layer a scale, or a form, is of; None: it is neither."""
    ends = (*_OF_WEIGHTS, *_OF_ACTIVATIONS, _FORM)
    return next((f"{name.removesuffix(end)}.weight" for end in ends if name.endswith(end)), None)


def of_activations(names: Iterable[str]) -> tuple[str, ...]:
    """The scales of what layers read, which weights do without."""
    return tuple(name for name in names if name.endswith(_OF_ACTIVATIONS))


def decode(values: Tensor, scale: Tensor | None, first: int = 0) -> Tensor:
    """The weights, in fp32.

    Args:
        values: rows of a tensor in fp8, whole ones or some of their columns.
        scale: fp32, () or (all rows of the tensor,); None: 1.
        first: which row of the tensor the first of these is.
    """
    found = values.to(torch.float32)
    if scale is None:
        return found
    if scale.dim():
        scale = scale[first : first + len(values)].view(-1, *[1] * (values.dim() - 1))
    return found.mul_(scale)


def read_scales(weights: Mapping[str, Place], marks: Mapping[str, Place]) -> dict[str, Tensor]:
    """Weight -> its scale in fp32, () or (rows,); only those that have one. Reads scales and forms, no weights.

    Args:
        weights: all that are to be read, by the model's names.
        marks: what ``is_mark`` tells, likewise.

    Raises:
        UserError: a scale without its weight in fp8, of another shape, or that is no finite number above 0; a weight
            with two, or none beside scaled ones; a form that is not read.
    """
    found: dict[str, Tensor] = {}
    for name, place in marks.items():
        if name.endswith(_FORM):
            _check_form(place)
        elif name.endswith(_OF_WEIGHTS):
            weight = str(weight_of(name))
            if weight in found:
                raise _refused(place, f"is a second scale of {weight}; {_GIVE}")
            found[weight] = _read_scale(place, weight, weights.get(weight))
    _check_forms(weights.values())
    if used := [stored for name, (_, stored) in marks.items() if not name.endswith(_OF_ACTIVATIONS)]:
        _check_all_scaled(weights, found, used[0])
    return found


def _read_scale(place: Place, weight: str, of: Place | None) -> Tensor:
    """One scale: () or (rows,)."""
    file, stored = place
    if of is None:
        raise _refused(place, f"is the scale of {weight}, which is not there: fetch the file again, or {_GIVE}")
    if of[0].types[of[1]] not in TYPES:
        raise _refused(place, f"is the scale of {of[1]}, which is {of[0].types[of[1]]}, not fp8: {_GIVE}")
    if file.types[stored] not in FLOATS:
        raise _refused(place, f"is {file.types[stored]}: scales are {' or '.join(FLOATS)}, not of blocks; {_GIVE}")
    shape, rows = file.shapes[stored], of[0].shapes[of[1]][:1]
    per_row = bool(rows) and shape[:1] == rows and math.prod(shape) == rows[0]
    if math.prod(shape) != 1 and not per_row:
        rule = f"must be one number, or one for each of the {rows[0] if rows else 1} rows of {of[1]}"
        raise _refused(place, f"has shape {shape}: {rule}; scales of blocks are not read, {_GIVE}")
    with parsing(lambda reason: _refused(place, f"cannot be read ({reason}): fetch the file again")):
        values: Tensor = file.file.get_tensor(stored).to(torch.float32).flatten()
    wrong = values[~(torch.isfinite(values) & (values > 0))]
    if len(wrong):
        raise _refused(place, f"holds {float(wrong[0]):g}: must be finite and above 0 in fp32; fetch the file again")
    return values if len(values) > 1 else values[0]


def _check_all_scaled(weights: Mapping[str, Place], scales: Collection[str], mark: str) -> None:
    for name, (file, stored) in weights.items():
        if file.types[stored] in TYPES and name not in scales and len(file.shapes[stored]) > 1:
            told = f"is {file.types[stored]} without a scale, where {mark} tells of scaled fp8"
            raise _refused((file, stored), f"{told}: fetch the file again, or {_GIVE}")


def _check_form(place: Place) -> None:
    """What ComfyUI states of a layer: JSON in bytes."""
    file, stored = place

    def refuse(reason: str) -> UserError:
        return _refused(place, f"states no form of fp8 ({reason}): {_GIVE}")

    if file.types[stored] != "U8" or math.prod(file.shapes[stored]) > _MOST_BYTES:
        raise refuse(f"{file.types[stored]} of shape {file.shapes[stored]}")
    with parsing(refuse):
        content = bytes(file.file.get_tensor(stored).flatten().tolist())
    _check_stated(parse_json(content, refuse), refuse)


def _check_forms(weights: Iterable[Place]) -> None:
    """The same of all layers of these weights, as metadata of their files states it."""
    stored = list(weights)
    for file in {id(file): file for file, _ in stored}.values():

        def refuse(reason: str, file: OpenWeights = file) -> UserError:
            return UserError(f"{file.path}: {_FORMS} in its metadata states no form of fp8 ({reason}): {_GIVE}")

        own = {name for one, name in stored if one is file}
        for layer, form in _stated_forms(file, refuse):
            if f"{layer}.weight" in own:
                _check_stated(form, refuse)


def _stated_forms(file: OpenWeights, refuse: Any) -> Iterator[tuple[str, Any]]:
    if _FORMS in file.metadata:
        found = parse_json(file.metadata[_FORMS].encode(), refuse)
        layers = found.get("layers") if isinstance(found, dict) else None
        if not isinstance(layers, dict):
            raise refuse("no layers")
        yield from layers.items()


def _check_stated(form: Any, refuse: Any) -> None:
    """That values are fp8 times a scale, and nothing else was done to them, as rotating them."""
    if not isinstance(form, dict) or form.get("format") not in _READ:
        raise refuse(f"{short(str(form))}; read are {', '.join(_READ)}")
    if more := [key for key, value in form.items() if value and key not in _OF_COMPUTATION]:
        raise refuse(f"{short(str(more[0]))} is not known")


def _refused(place: Place, why: str) -> UserError:
    return UserError(f"{place[0].path}: {place[1]} {why}")
