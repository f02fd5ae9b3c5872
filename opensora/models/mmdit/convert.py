"""MMDiT weights in and out of files: Flux's, Open-Sora 2's, and ours.

Two things vary between files of the same model:

* projections are fused (Flux: ``qkv``, ``linear1``) or separate (Open-Sora 2: ``q_proj, k_proj, v_proj``, and
  ``q_proj, k_proj, v_mlp`` in single blocks);
* rotary channel pairs are interleaved (Flux) or half-split (Open-Sora 2). Between them the q and k channels of every
  head are permuted, in weight, bias and norm scale: interleaved channel 2d is half-split d, 2d+1 is Dh/2 + d.

Both change names and order of rows only, never values, so every conversion can be undone exactly, and any part of a
converted tensor can be read without the rest: a conversion is a table that says which rows of which tensors a tensor
is made of. Files we write name their layout in the safetensors metadata; for files that do not, fused means
interleaved and separate means half-split, which is right for the two published ones.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from opensora.models.layers.rope import RopeLayout
from opensora.models.weights.adapters import AdapterRows
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import (
    SHARD_BYTES,
    check_regular,
    check_types,
    open_weights,
    write_file,
    write_weights,
)
from opensora.utils.files.untrusted import ANY, TEXT, Each, mismatch, parse_json, parsing, read_small, short_reason

StateDict = dict[str, Tensor]
Shape: TypeAlias = tuple[int, ...]
_SHOWN = 4  # names in an error before "..."
_WANTED = "give a .safetensors file, an index .json, or their folder"
# The parts of the model, by which its names are found behind any prefix.
_INPUTS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "cond_in")
_TOP_NAMES = (*_INPUTS, "double_blocks", "single_blocks", "final_layer")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, recomputation
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_OTHER_MODELS = ("vae", "first_stage_model", "cond_stage_model", "conditioner", "text_encoders", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """How a file writes the same model."""

    fused_qkv: bool
    rope_layout: RopeLayout

    def metadata(self) -> dict[str, str]:
        """What a file's safetensors metadata says of its layout."""
        return {"format": "pt", "fused_qkv": str(self.fused_qkv).lower(), "rope_layout": self.rope_layout}


FLUX = WeightLayout(fused_qkv=True, rope_layout="interleaved")
OPEN_SORA_2 = WeightLayout(fused_qkv=False, rope_layout="half")
LAYOUTS = {"flux": FLUX, "open-sora-2": OPEN_SORA_2}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a file's tensors compare with what a model wants."""

    source: str
    layout: WeightLayout
    prefix: str  # of all names in the file, without which they were compared
    left_out: tuple[str, ...]  # of an autoencoder or a text encoder in the same file
    loaded: int
    missing: tuple[str, ...]  # wanted, not in the file, and not allowed to be missing
    left_at_init: tuple[str, ...]  # wanted, not in the file, allowed to be missing
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]  # "name (shape in the file, shape wanted)"

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what}: {_some(names)}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape (file, model)", self.wrong_shape),
                ("left at their initial values", self.left_at_init),
                ("of other models left out", self.left_out),
            )
            if names
        ]
        if self.prefix:
            parts.append(f"names in the file begin with {self.prefix}")
        return f"{self.source}: {self.loaded} tensors loaded" + "".join(f"; {part}" for part in parts)


def guess_layout(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> WeightLayout:
    """The layout that metadata states, else the published one with these names."""
    fused = any(".qkv." in name or ".linear1." in name for name in names)
    rope = (metadata or {}).get("rope_layout") or ("interleaved" if fused else "half")
    if rope not in ("interleaved", "half"):
        raise UserError(f"rope_layout={rope} in the file's metadata: must be one of interleaved, half")
    return WeightLayout(fused_qkv=fused, rope_layout="half" if rope == "half" else "interleaved")


def convert_state_dict(
    state: Mapping[str, Tensor], *, to: WeightLayout, source: WeightLayout | None = None
) -> StateDict:
    """The same weights in layout ``to``; tensors that need no change are passed through, not copied.

    Args:
        state: full (unsharded) tensors by name.
        source: layout of ``state``; None: see ``guess_layout``. Only its rotary layout matters, fusion is in the names.

    Raises:
        UserError: ``state`` has no q/k norms, so it is not an MMDiT.
    """
    conversion = _conversion({name: tuple(tensor.shape) for name, tensor in state.items()}, source, to)
    converted = {}
    for name, target in conversion.targets.items():
        pieces = [
            state[rows.tensor] if rows.all_of(conversion.sources) else conversion.take(rows, state[rows.tensor])
            for rows in target.rows
        ]
        converted[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return converted


def convert_shapes(shapes: Mapping[str, Shape], *, source: WeightLayout, to: WeightLayout) -> dict[str, Shape]:
    """Names and shapes of the same weights in layout ``to``."""
    return {name: target.shape for name, target in _conversion(shapes, source, to).targets.items()}


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, an index json, or their folder, in a layout of choice; read when asked for.

    Only names and shapes are read at once. Tensors come on the CPU; those that need no conversion are mapped from the
    file, so that not even they take memory of their own.
    """

    def __init__(self, path: str | os.PathLike[str], to: WeightLayout | None = None) -> None:
        """``to``: the layout to give tensors in; None: as they are written.

        Raises:
            UserError: no such file, not safetensors, a tensor that is in two files, or no MMDiT where order changes.
        """
        self._files: dict[str, Any] = {}  # tensor -> open file
        self._stored: dict[str, str] = {}  # tensor -> name in its file
        metadata: dict[str, str] = {}
        files, index = _weight_files(Path(path))
        opened = [open_weights(file) for file in files]
        _check_index({one.path.name: one.shapes for one in opened}, index)
        self.prefix, names, self.left_out = _plain_names([name for one in opened for name in one.shapes], str(path))
        sources: dict[str, Shape] = {}
        for one in opened:
            metadata.update(one.metadata)
            own = {names[stored]: stored for stored in one.shapes if stored in names}
            for name in own:
                if name in sources:
                    raise UserError(f"{one.path}: {name} is in two files of {path}: give one file, or an index json")
            check_types(one, own.values())
            self._stored |= own
            self._files |= dict.fromkeys(own, one.file)
            sources |= {name: one.shapes[stored] for name, stored in own.items()}
        if foreign := _other_format(sources):
            raise UserError(f"{path}: {foreign}")
        self.layout = guess_layout(sources, metadata)
        self._conversion = _conversion(sources, self.layout, to or self.layout)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, in the layout of choice."""
        return {name: target.shape for name, target in self._conversion.targets.items()}

    def __getitem__(self, name: str) -> Tensor:
        target = self._conversion.targets[name]
        if len(target.rows) == 1 and target.rows[0].all_of(self._conversion.sources):
            whole = target.rows[0].tensor
            return self._files[whole].get_tensor(self._stored[whole])
        pieces = [self._read(rows, ()) for rows in target.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._conversion.targets)

    def __len__(self) -> int:
        return len(self._conversion.targets)

    def read_part(self, name: str, start: tuple[int, ...], part: Tensor) -> bool:
        """Write the values from index ``start`` on into ``part`` (any device and type), and read no others.

        Returns:
            False if there is no such tensor; ``part`` is then as it was.
        """
        target = self._conversion.targets.get(name)
        if target is None:
            return False
        columns = tuple(slice(s, s + size) for s, size in zip(start[1:], part.shape[1:], strict=True))
        first, last = start[0], start[0] + part.shape[0]
        position = 0
        for rows in target.rows:
            low, high = max(first, position), min(last, position + rows.count)
            if low < high:
                wanted = replace(rows, start=rows.start + low - position, stop=rows.start + high - position)
                part[low - first : high - first].copy_(self._read(wanted, columns))
            position += rows.count
        return True

    def _read(self, rows: "_Rows", columns: tuple[slice, ...]) -> Tensor:
        mapped = self._files[rows.tensor].get_slice(self._stored[rows.tensor])

        def get(start: int, stop: int) -> Tensor:
            index = (slice(start, stop), *columns)
            return mapped[index]

        return self._conversion.read(rows, get)


def read_state_dict(path: str | os.PathLike[str]) -> tuple[StateDict, WeightLayout]:
    """Tensors (on the CPU, mapped from the file) and layout of a safetensors file, an index json, or their folder."""
    file = WeightFile(path)
    return dict(file), file.layout


def load_state_dict_for(
    model: nn.Module, path: str | os.PathLike[str], *, to: WeightLayout, allow_missing: Collection[str] = ()
) -> tuple[WeightFile, LoadReport]:
    """Weights of ``path`` in the model's layout, checked name by name and shape by shape; nothing is read yet.

    Args:
        model: tells names and shapes; may be on the meta device.
        to: layout of the model.
        allow_missing: patterns of names the file may lack, as ``("cond_in.*",)`` when starting from Flux weights;
            they are not in the result.

    Raises:
        UserError: anything missing, unexpected or of another shape, all in one line.
    """
    file = WeightFile(path, to)
    shapes = file.shapes
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = [name for name in wanted if name not in shapes]
    allowed = [name for name in absent if any(fnmatchcase(name, pattern) for pattern in allow_missing)]
    report = LoadReport(
        source=str(path),
        layout=file.layout,
        prefix=file.prefix,
        left_out=file.left_out,
        loaded=sum(name in wanted for name in shapes),
        missing=tuple(name for name in absent if name not in allowed),
        left_at_init=tuple(allowed),
        unexpected=tuple(name for name in shapes if name not in wanted),
        wrong_shape=tuple(
            f"{name} {shapes[name]}, {shape}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ),
    )
    if not report.fits:
        raise UserError(f"{report}; choose the model size and embeds (cond_embed, guidance_embed) of this file")
    return file, report


@torch.no_grad()
def load_into(
    model: nn.Module, path: str | os.PathLike[str], *, to: WeightLayout, allow_missing: Collection[str] = ()
) -> LoadReport:
    """Fill an unsharded model; parameters that may be missing keep their values. Errors as in load_state_dict_for."""
    file, report = load_state_dict_for(model, path, to=to, allow_missing=allow_missing)
    for name, tensor in model.state_dict().items():
        if name in file:
            tensor.copy_(file[name])
    return report


def save_state_dict(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    source: WeightLayout,
    to: WeightLayout | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write full tensors as safetensors; the files written, each whole or absent.

    Args:
        path: a ``*.safetensors`` file, or a folder for shards of about ``shard_bytes`` and their index.
        source: layout of ``state``.
        to: layout to write; None: as it is.
    """
    to, target = to or source, Path(path)
    stated = {**(metadata or {}), **to.metadata()}
    tensors = convert_state_dict(state, to=to, source=source)
    if target.suffix == ".safetensors":
        return [write_file(target, tensors, stated)]
    return write_weights(target, tensors.items(), stated, shard_bytes=shard_bytes)


def flux_to_diffusers(state: Mapping[str, Tensor]) -> StateDict:
    """Weights of a Flux-shaped MMDiT under the names of diffusers' FluxTransformer2DModel.

    Any of our layouts is read as ``guess_layout`` says. ``cond_in`` has no place there and must not be in ``state``.
    """
    separate = convert_state_dict(state, to=WeightLayout(fused_qkv=False, rope_layout="interleaved"))
    shapes = {name: tuple(tensor.shape) for name, tensor in separate.items()}
    return {
        name: torch.cat([separate[rows.tensor][rows.start : rows.stop] for rows in target.rows])
        for name, target in _diffusers(_themselves(shapes)).items()
    }


def _themselves(shapes: Mapping[str, Shape]) -> dict[str, "_Target"]:
    return {name: _Target(shape, (_Rows(name, 0, _height(shape)),)) for name, shape in shapes.items()}


def _diffusers(separate: Mapping[str, "_Target"]) -> dict[str, "_Target"]:
    """What each of diffusers' tensors is made of; ``separate``: q, k, v and v_mlp each by itself."""
    renamed = {}
    for name, target in separate.items():
        block, v_mlp, kind = name.partition(".v_mlp.")
        (rows,), rest = target.rows, target.shape[1:]
        if v_mlp:
            hidden, prefix = _height(separate[f"{block}.linear2.weight"].shape), _diffusers_name(f"{block}.")
            v, mlp = replace(rows, stop=hidden), replace(rows, start=hidden)
            renamed[f"{prefix}attn.to_v.{kind}"] = _Target((v.count, *rest), (v,))
            renamed[f"{prefix}proj_mlp.{kind}"] = _Target((mlp.count, *rest), (mlp,))
        elif name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = replace(rows, stop=rows.count // 2), replace(rows, start=rows.count // 2)
            renamed[_diffusers_name(name)] = _Target(target.shape, (scale, shift))  # diffusers has scale first
        else:
            renamed[_diffusers_name(name)] = target
    return renamed


_DIFFUSERS_NAMES = (  # first match per row, all rows in order
    ("time_in.", "time_text_embed.timestep_embedder."),
    ("vector_in.", "time_text_embed.text_embedder."),
    ("guidance_in.", "time_text_embed.guidance_embedder."),
    ("in_layer.", "linear_1."),
    ("out_layer.", "linear_2."),
    ("txt_in.", "context_embedder."),
    ("img_in.", "x_embedder."),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.adaLN_modulation.1.", "norm_out.linear."),
    ("double_blocks.", "transformer_blocks."),
    ("single_blocks.", "single_transformer_blocks."),
    ("img_mod.lin.", "norm1.linear."),
    ("txt_mod.lin.", "norm1_context.linear."),
    ("modulation.lin.", "norm.linear."),
    ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    ("norm.query_norm.scale", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "attn.norm_k.weight"),
    ("img_attn.proj.", "attn.to_out.0."),
    ("txt_attn.proj.", "attn.to_add_out."),
    ("txt_attn.q_proj.", "attn.add_q_proj."),
    ("txt_attn.k_proj.", "attn.add_k_proj."),
    ("txt_attn.v_proj.", "attn.add_v_proj."),
    ("img_attn.", "attn."),
    ("attn.q_proj.", "attn.to_q."),
    ("attn.k_proj.", "attn.to_k."),
    ("attn.v_proj.", "attn.to_v."),
    (".q_proj.", ".attn.to_q."),
    (".k_proj.", ".attn.to_k."),
    ("img_mlp.0.", "ff.net.0.proj."),
    ("img_mlp.2.", "ff.net.2."),
    ("txt_mlp.0.", "ff_context.net.0.proj."),
    ("txt_mlp.2.", "ff_context.net.2."),
    ("linear2.", "proj_out."),
)


def _diffusers_name(name: str) -> str:
    for ours, theirs in _DIFFUSERS_NAMES:
        name = name.replace(ours, theirs, 1)
    return name


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """Which rows of which adapters of a file make up the adapters of a model's layers."""

    pieces: dict[str, tuple[AdapterRows, ...]]  # by layer of the model, in its order
    prefix: str  # of all layers in the file, without which they are the model's
    guessed: RopeLayout | None  # what the file does not say of itself, where rows change places by it


def plan_adapter(
    layers: Mapping[str, tuple[int, int]], shapes: Mapping[str, Shape], to: WeightLayout, metadata: Mapping[str, str]
) -> AdapterPlan:
    """How adapters of a file fit a model, whatever names and layout they were made for.

    Layers may go by our names, with q, k, v fused or separate, by diffusers' names, and by either with underscores for
    dots, as kohya's tools write them; behind any prefix that all of them share.

    Args:
        layers: name in the file -> (inputs, outputs).
        shapes: of all parameters of the model, by name, in layout ``to``.
        metadata: of the file; its ``rope_layout``, if it has one, is that of the layers.

    Raises:
        ValueError: a layer that the model does not have, or one of another size.
    """
    places = {name: target for name, target in _unfused(shapes).items() if _is_matrix(name, target.shape)}
    parts = _themselves({name: target.shape for name, target in places.items()})
    every = {**_diffusers(parts), **_fused(parts), **parts}
    known = {name.removesuffix(".weight"): target for name, target in every.items()}
    prefix, found = _known_layers(layers, known)
    _check_apart({layer: known[name].rows for layer, name in found.items()})
    rope, guessed = _adapter_rope(found.values(), metadata)
    order = None if rope == to.rope_layout else _channel_order(_head_dim(shapes), to.rope_layout)
    pieces: dict[str, list[AdapterRows]] = {name.removesuffix(".weight"): [] for name in shapes}
    reordered = False
    for layer, name in found.items():
        position, target = 0, known[name]
        if layers[layer] != (target.shape[1], target.shape[0]):
            sizes = " -> ".join(str(size) for size in layers[layer])
            raise ValueError(f"{layer} is {sizes}, and would be {target.shape[1]} -> {target.shape[0]} for this model")
        for rows in target.rows:
            (place,) = places[rows.tensor].rows
            taken = torch.arange(position, position + rows.count)
            if order is not None and _is_query_or_key(rows.tensor):
                taken, reordered = taken.unflatten(0, (-1, order.numel()))[:, order].flatten(), True
            owner = place.tensor.removesuffix(".weight")
            pieces[owner].append(AdapterRows(layer=layer, rows=taken, start=place.start + rows.start))
            position += rows.count
    kept = {layer: tuple(rows) for layer, rows in pieces.items() if rows}
    return AdapterPlan(pieces=kept, prefix=prefix, guessed=rope if guessed and reordered else None)


def _is_matrix(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _known_layers(layers: Collection[str], known: Collection[str]) -> tuple[str, dict[str, str]]:
    """(prefix that all layers have in the file, layer in the file -> its name in ``known``)."""
    flat = {name.replace(".", "_"): name for name in known}
    assert len(flat) == len(set(known)), "two layers have the same name with underscores for dots"
    tops = {name.partition(".")[0] for name in known}
    prefixes: dict[str, str] = {}
    found = {}
    for layer in layers:
        prefix, name = _split_prefix(layer, tops)
        if name not in known and name not in flat:
            raise ValueError(f"{layer}: the model has no such layer")
        found[layer] = name if name in known else flat[name]
        prefixes.setdefault(prefix, layer)
    if len(prefixes) > 1:
        raise ValueError(f"{' and '.join(list(prefixes.values())[:2])}: layers of two models in one file")
    return next(iter(prefixes), ""), found


def _split_prefix(layer: str, tops: Collection[str]) -> tuple[str, str]:
    """What comes before the first part of the model in a layer's name, with dots or with underscores, and the rest."""
    bare = ".".join(part for part in layer.split(".") if part not in _WRAPPERS)
    for mark in (".", "_"):
        for start in (0, *(i + 1 for i, character in enumerate(bare) if character == mark)):
            rest = bare[start:]
            if any(rest == top or rest.startswith(f"{top}{mark}") for top in tops):
                return bare[:start], rest
    return "", bare


def _check_apart(rows_of: Mapping[str, Sequence["_Rows"]]) -> None:
    """That no two adapters are for the same rows, as those of a fused layer and of its parts would be."""
    owners: dict[str, list[tuple[_Rows, str]]] = {}
    for layer, parts in rows_of.items():
        for rows in parts:
            for other, owner in owners.setdefault(rows.tensor, []):
                if rows.start < other.stop and other.start < rows.stop:
                    raise ValueError(f"{owner} and {layer}: two adapters for the same place")
            owners[rows.tensor].append((rows, layer))


def _adapter_rope(names: Iterable[str], metadata: Mapping[str, str]) -> tuple[RopeLayout, bool]:
    """The rotary layout of adapters, and whether it is guessed from the names of their layers, as for weights."""
    stated = "rope_layout" in metadata
    as_weights = [f"{name}.qkv." if "transformer_blocks" in name else f"{name}.weight" for name in names]
    return guess_layout(as_weights, metadata).rope_layout, not stated


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor; ``reordered``: the channels of every head, of which they are whole ones, change places."""

    tensor: str
    start: int
    stop: int
    reordered: bool = False

    @property
    def count(self) -> int:
        return self.stop - self.start

    def all_of(self, sources: Mapping[str, Shape]) -> bool:
        """Whether these are all rows of their tensor, as they are."""
        return not self.reordered and self.count == _height(sources[self.tensor])


@dataclass(frozen=True)
class _Target:
    """A converted tensor: rows of others, one after the other."""

    shape: Shape
    rows: tuple[_Rows, ...]


@dataclass(frozen=True)
class _Conversion:
    """What every tensor of a layout is made of."""

    sources: Mapping[str, Shape]
    targets: Mapping[str, _Target]
    order: Tensor | None  # source channel of every target channel of one head; None: none is reordered

    def take(self, rows: _Rows, tensor: Tensor) -> Tensor:
        """The rows from the whole tensor; a view if they keep their order."""
        return self.read(rows, lambda start, stop: tensor[start:stop])

    def read(self, rows: _Rows, get: Callable[[int, int], Tensor]) -> Tensor:
        """The rows from ``get(start, stop)``, which is asked for whole heads where channels change places."""
        if not rows.reordered:
            return get(rows.start, rows.stop)
        assert self.order is not None
        size = self.order.numel()
        first = rows.start // size * size
        heads = get(first, -(-rows.stop // size) * size).unflatten(0, (-1, size))
        wanted = torch.arange(rows.start - first, rows.stop - first)
        return heads[wanted // size, self.order[wanted % size]]


def _conversion(sources: Mapping[str, Shape], source: WeightLayout | None, to: WeightLayout) -> _Conversion:
    source = source or guess_layout(sources)
    targets, order = _unfused(sources), None
    if source.rope_layout != to.rope_layout:
        order = _channel_order(_head_dim(sources), to.rope_layout)
        targets = {name: _reordered(name, target) for name, target in targets.items()}
    return _Conversion(sources, _fused(targets) if to.fused_qkv else targets, order)


def _head_dim(shapes: Mapping[str, Shape]) -> int:
    for name, shape in shapes.items():
        if name.endswith("norm.key_norm.scale"):
            return shape[0]
    raise UserError("these weights have no norm.key_norm.scale, so they are no MMDiT: give a Flux or Open-Sora 2 file")


def _unfused(shapes: Mapping[str, Shape]) -> dict[str, _Target]:
    """Every tensor by itself; what is too odd to be cut in q, k, v stays whole, and fits no model."""
    separate: dict[str, _Target] = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        weight = shapes.get(f"{layer}.weight", ())
        hidden = weight[1] if len(weight) == 2 else 0
        parts: dict[str, int] = {}
        if hidden and layer.endswith("_attn.qkv") and _height(shape) % 3 == 0:
            parts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), _height(shape) // 3)
        elif hidden and fnmatchcase(layer, "single_blocks.*.linear1") and _height(shape) > 2 * hidden:
            parts = {"q_proj": hidden, "k_proj": hidden, "v_mlp": _height(shape) - 2 * hidden}
        owner, start = layer.rpartition(".")[0], 0
        for part, count in parts.items():
            rows = _Rows(name, start, start + count)
            separate[f"{owner}.{part}.{kind}"] = _Target((count, *shape[1:]), (rows,))
            start += count
        if not parts:
            separate[name] = _Target(shape, (_Rows(name, 0, _height(shape)),))
    return separate


def _fused(targets: Mapping[str, _Target]) -> dict[str, _Target]:
    """Join q, k, v where all three are there: text that is only read has no q, and stays separate."""
    joined: dict[str, _Target] = {}
    gone: set[str] = set()
    for name, target in targets.items():
        owner, _, kind = name.rpartition(".q_proj.")
        if owner:
            third, whole = ("v_mlp", "linear1") if owner.startswith("single_blocks.") else ("v_proj", "qkv")
            names = [name, f"{owner}.k_proj.{kind}", f"{owner}.{third}.{kind}"]
            if all(part in targets for part in names):
                parts = [targets[part] for part in names]
                shape = (sum(_height(part.shape) for part in parts), *target.shape[1:])
                joined[f"{owner}.{whole}.{kind}"] = _Target(shape, tuple(rows for part in parts for rows in part.rows))
                gone.update(names)
                continue
        joined[name] = target
    return {name: _merged(target) for name, target in joined.items() if name not in gone}


def _merged(target: _Target) -> _Target:
    """Neighbouring rows of the same tensor in one: what was cut and joined again is passed through."""
    rows: list[_Rows] = []
    for new in target.rows:
        old = rows[-1] if rows else None
        if old and (old.tensor, old.stop, old.reordered) == (new.tensor, new.start, new.reordered):
            rows[-1] = replace(old, stop=new.stop)
        else:
            rows.append(new)
    return _Target(target.shape, tuple(rows))


def _reordered(name: str, target: _Target) -> _Target:
    is_qk = _is_query_or_key(name) or name.endswith(("query_norm.scale", "key_norm.scale"))
    return _Target(target.shape, tuple(replace(rows, reordered=is_qk) for rows in target.rows))


def _is_query_or_key(name: str) -> bool:
    return ".q_proj." in name or ".k_proj." in name


def _channel_order(head_dim: int, to: RopeLayout) -> Tensor:
    """Source channel of every target channel of one head."""
    to_half = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    return to_half if to == "half" else to_half.argsort()


def _height(shape: Shape) -> int:
    return shape[0] if shape else 1


def _plain_names(stored: Sequence[str], path: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(prefix that all tensors of the model share, name in the file -> name in the model, names of other models).

    Tools put the model's own names behind the attributes that hold it: ``module.``, ``model.diffusion_model.``; and
    wrappers put theirs in between. Without any they are as in this package.

    Raises:
        UserError: the file holds several sets of weights.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in stored}
    prefixes: dict[str, str] = {}
    others = []
    for name, bare in plain.items():
        parts = bare.split(".")
        if parts[0] in _OTHER_MODELS:
            others.append(name)
            continue
        at = next((i for i, part in enumerate(parts) if part in _TOP_NAMES), None)
        if at is not None:
            prefixes.setdefault("".join(f"{part}." for part in parts[:at]), name)
    if len(prefixes) > 1:
        examples = " and ".join(list(prefixes.values())[:2])
        raise UserError(f"{path}: holds several sets of weights, as {examples}: give a file with one of them")
    prefix = next(iter(prefixes), "")
    for name in others:
        del plain[name]
    return prefix, {name: bare.removeprefix(prefix) for name, bare in plain.items()}, tuple(others)


def _other_format(names: Collection[str]) -> str | None:
    """What a file is that holds something else than an MMDiT's weights under its own names, and what to do."""
    if any("lora_" in name or name.endswith(".alpha") for name in names):
        return "these are adapters (LoRA), not weights: give them as lora=, and the weights that they belong to here"
    if any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names):
        return (
            "these are weights under diffusers' names; give the file with the original ones, as flux1-dev.safetensors"
        )
    return None


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """(files of the weights, tensor -> name of its file as an index says, empty without one)."""
    try:
        is_folder = path.is_dir()
        if not is_folder:
            check_regular(path)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        absent = isinstance(error, FileNotFoundError)
        raise UserError(f"{path}: {f'no such file or folder: {_WANTED}' if absent else short_reason(error)}") from error
    if not is_folder:
        return _indexed_files(path) if _begins_as_json(path) else (_whole([path]), {})
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")):
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = sorted(path.glob("*.safetensors"))
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if len(indices) > 1:
        found = _some([index.name for index in indices])
        raise UserError(f"{path}: holds {len(indices)} index files ({found}): give one of them")
    if not indices and not files:
        if pickled:
            raise UserError(
                f"{path}: holds no safetensors, and nothing is unpickled ({_some(pickled)}): save its tensors by "
                "safetensors.torch.save_file"
            )
        raise UserError(f"{path}: holds no weights: {_WANTED}")
    return _indexed_files(indices[0]) if indices else (_whole(files), {})


def _whole(files: list[Path]) -> list[Path]:
    """The files, if no shard of a set is missing, as far as their names tell.

    Raises:
        UserError: one is.
    """
    names = {file.name for file in files}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            start, count = match[1], int(match[2])
            others = (f"{start}-{number:05d}-of-{match[2]}.safetensors" for number in range(1, count + 1))
            absent = next((name for name in others if name not in names), None)
            if absent is not None:
                there = (file.parent / absent).is_file()
                remedy = "give their folder" if there else f"fetch {absent} too, and give their folder"
                raise UserError(f"{file}: is one of {count} files of the same weights: {remedy}")
    return files


def _begins_as_json(path: Path) -> bool:
    """Whether a file is JSON: in safetensors the first brace comes after 8 bytes of length."""
    with parsing(lambda reason: UserError(f"{path}: cannot be read ({reason})")), path.open("rb") as file:
        start = file.read(9)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and start[8:9] != b"{"


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    def refuse(why: str) -> UserError:
        return UserError(f"{index}: is not a safetensors index ({why}): it needs a weight_map; fetch it again")

    with parsing(refuse):
        content = read_small(index)
    found = parse_json(content, refuse)
    wrong = mismatch(found, {"weight_map": Each(TEXT), "...": ANY})
    if wrong:
        raise refuse(wrong)
    names = sorted(set(found["weight_map"].values()))
    elsewhere = [name for name in names if not name or os.path.basename(name) != name]
    absent = elsewhere or [name for name in names if not os.path.isfile(index.parent / name)]
    if absent or not names:
        shown = _some([name[:80] for name in absent]) if absent else "none"
        raise UserError(f"{index}: names files that are not beside it ({shown}): fetch them too")
    return [index.parent / name for name in names], dict(found["weight_map"])


def _check_index(shapes: Mapping[str, Collection[str]], index: Mapping[str, str]) -> None:
    """That every tensor is in the file where an index says that it is: files of two releases have the same names.

    Args:
        shapes: file name -> names of its tensors.

    Raises:
        UserError: one is not.
    """
    for tensor, name in index.items():
        if tensor not in shapes[name]:
            raise UserError(
                f"{name}: does not hold {tensor[:200]}, as its index says: fetch the index and its files again"
            )
