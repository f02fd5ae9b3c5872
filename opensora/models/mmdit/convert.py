"""MMDiT weights in and out of files: Flux's, Open-Sora 2's, and ours.

Two things vary between files of the same model:

* projections are fused (Flux: ``qkv``, ``linear1``) or separate (Open-Sora 2: ``q_proj, k_proj, v_proj``, and
  ``q_proj, k_proj, v_mlp`` in single blocks);
* rotary channel pairs are interleaved (Flux) or half-split (Open-Sora 2). Between them the q and k channels of every
  head are permuted, in weight, bias and norm scale: interleaved channel 2d is half-split d, 2d+1 is Dh/2 + d.

Both change names and order only, never values, so every conversion can be undone exactly. Files we write name their
layout in the safetensors metadata; for files that do not, fused means interleaved and separate means half-split,
which is right for the two published ones.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opensora.models.layers.rope import RopeLayout
from opensora.utils.errors import UserError
from opensora.utils.weights import SHARD_BYTES, write_file, write_weights

StateDict = dict[str, Tensor]
_SHOWN = 4  # names in an error before "..."


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
            )
            if names
        ]
        return f"{self.source}: {self.loaded} tensors loaded" + "".join(f"; {part}" for part in parts)


def guess_layout(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> WeightLayout:
    """The layout that metadata states, else the published one with these names."""
    fused = any(".qkv." in name or ".linear1." in name for name in names)
    rope = (metadata or {}).get("rope_layout") or ("interleaved" if fused else "half")
    if rope not in ("interleaved", "half"):
        raise UserError(f"rope_layout={rope} in the file's metadata: allowed are interleaved, half")
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
    source = source or guess_layout(state)
    converted = _unfused(state)
    if source.rope_layout != to.rope_layout:
        order = _channel_order(_head_dim(state), to.rope_layout)
        converted = {name: _permuted(name, tensor, order) for name, tensor in converted.items()}
    return _fused(converted) if to.fused_qkv else converted


def read_state_dict(path: str | os.PathLike[str]) -> tuple[StateDict, WeightLayout]:
    """Tensors (on the CPU, mapped from the file) and layout of a safetensors file, an index json, or their folder."""
    state: StateDict = {}
    metadata: dict[str, str] = {}
    for file in _weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as opened:
                metadata.update(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name in state:
                        raise UserError(f"{file}: {name} is in two files of {path}: give one file, or an index json")
                    state[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: cannot be read as safetensors ({error}): fetch or export it again") from error
    return state, guess_layout(state, metadata)


def load_state_dict_for(
    model: nn.Module, path: str | os.PathLike[str], *, to: WeightLayout, allow_missing: Collection[str] = ()
) -> tuple[StateDict, LoadReport]:
    """Weights of ``path`` in the model's layout, checked name by name and shape by shape.

    Args:
        model: tells names and shapes; may be on the meta device.
        to: layout of the model.
        allow_missing: patterns of names the file may lack, as ``("cond_in.*",)`` when starting from Flux weights;
            they are not in the result.

    Raises:
        UserError: anything missing, unexpected or of another shape, all in one line.
    """
    state, source = read_state_dict(path)
    converted = convert_state_dict(state, to=to, source=source)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent = [name for name in wanted if name not in converted]
    allowed = [name for name in absent if any(fnmatchcase(name, pattern) for pattern in allow_missing)]
    report = LoadReport(
        source=str(path),
        layout=source,
        loaded=sum(name in wanted for name in converted),
        missing=tuple(name for name in absent if name not in allowed),
        left_at_init=tuple(allowed),
        unexpected=tuple(name for name in converted if name not in wanted),
        wrong_shape=tuple(
            f"{name} {tuple(converted[name].shape)}, {shape}"
            for name, shape in wanted.items()
            if name in converted and tuple(converted[name].shape) != shape
        ),
    )
    if not report.fits:
        raise UserError(f"{report}; choose the model size and embeds (cond_embed, guidance_embed) of this file")
    return converted, report


@torch.no_grad()
def load_into(
    model: nn.Module, path: str | os.PathLike[str], *, to: WeightLayout, allow_missing: Collection[str] = ()
) -> LoadReport:
    """Fill an unsharded model; parameters that may be missing keep their values. Errors as in load_state_dict_for."""
    state, report = load_state_dict_for(model, path, to=to, allow_missing=allow_missing)
    model.load_state_dict(state, strict=False)
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
    renamed = {}
    for name, tensor in convert_state_dict(state, to=WeightLayout(fused_qkv=False, rope_layout="interleaved")).items():
        if name.endswith("v_mlp.weight") or name.endswith("v_mlp.bias"):
            block, kind = name.split(".v_mlp.")
            hidden = state[f"{block}.linear2.weight"].shape[0]
            prefix = _diffusers_name(f"{block}.")
            renamed[f"{prefix}attn.to_v.{kind}"], renamed[f"{prefix}proj_mlp.{kind}"] = tensor[:hidden], tensor[hidden:]
        elif name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = tensor.chunk(2)  # diffusers has scale first
            renamed[_diffusers_name(name)] = torch.cat((scale, shift))
        else:
            renamed[_diffusers_name(name)] = tensor
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


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _head_dim(state: Mapping[str, Tensor]) -> int:
    for name, tensor in state.items():
        if name.endswith("norm.key_norm.scale"):
            return tensor.shape[0]
    raise UserError("these weights have no norm.key_norm.scale, so they are no MMDiT: give a Flux or Open-Sora 2 file")


def _unfused(state: Mapping[str, Tensor]) -> StateDict:
    separate: StateDict = {}
    for name, tensor in state.items():
        prefix, _, kind = name.rpartition(".")
        if prefix.endswith("_attn.qkv"):
            names = ("q_proj", "k_proj", "v_proj")
            pieces = tensor.chunk(3)
        elif prefix.startswith("single_blocks.") and prefix.endswith(".linear1"):
            hidden = state[f"{prefix}.weight"].shape[1]
            names = ("q_proj", "k_proj", "v_mlp")
            pieces = tensor.split((hidden, hidden, tensor.shape[0] - 2 * hidden))
        else:
            separate[name] = tensor
            continue
        owner = prefix.rpartition(".")[0]
        separate.update({f"{owner}.{part}.{kind}": piece for part, piece in zip(names, pieces, strict=True)})
    return separate


def _fused(state: Mapping[str, Tensor]) -> StateDict:
    """Join q, k, v where all three are there: text that is only read has no q, and stays separate."""
    joined: StateDict = {}
    for name, tensor in state.items():
        owner, _, part_kind = name.rpartition(".q_proj.")
        if owner:
            third, whole = ("v_mlp", "linear1") if owner.startswith("single_blocks.") else ("v_proj", "qkv")
            others = [state[f"{owner}.{part}.{part_kind}"] for part in ("k_proj", third)]
            joined[f"{owner}.{whole}.{part_kind}"] = torch.cat([tensor, *others])
        elif not _is_fused_away(name, state):
            joined[name] = tensor
    return joined


def _is_fused_away(name: str, state: Mapping[str, Tensor]) -> bool:
    layer, _, kind = name.rpartition(".")
    owner, _, part = layer.rpartition(".")
    return part in ("k_proj", "v_proj", "v_mlp") and f"{owner}.q_proj.{kind}" in state


def _channel_order(head_dim: int, to: RopeLayout) -> Tensor:
    """Source channel of every target channel of one head."""
    to_half = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    return to_half if to == "half" else to_half.argsort()


def _permuted(name: str, tensor: Tensor, order: Tensor) -> Tensor:
    is_qk = ".q_proj." in name or ".k_proj." in name or name.endswith(("query_norm.scale", "key_norm.scale"))
    if not is_qk:
        return tensor
    return tensor.unflatten(0, (-1, order.numel()))[:, order.to(tensor.device)].flatten(0, 1)


def _weight_files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: give a .safetensors file, an index .json, or their folder")
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    indices = [path] if path.suffix == ".json" else sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not files:
            raise UserError(f"{path}: holds no weights: give a .safetensors file, an index .json, or their folder")
        return files
    if len(indices) > 1:
        found = _some([index.name for index in indices])
        raise UserError(f"{path}: holds {len(indices)} index files ({found}): give one of them")
    return _indexed_files(indices[0])


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: is not a safetensors index ({error}): it needs a weight_map") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index}: names files that are not beside it ({_some(absent)}): fetch them too")
    return [index.parent / name for name in names]
