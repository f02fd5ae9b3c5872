"""MMDiT weights in files: Flux's, Open-Sora 2's, and ours; what ``opensora/models/weights`` asks of this family.

Two things vary between files of the same model:

* projections are fused (Flux: ``qkv``, ``linear1``) or separate (Open-Sora 2: ``q_proj, k_proj, v_proj``, and
  ``q_proj, k_proj, v_mlp`` in single blocks);
* rotary channel pairs are interleaved (Flux) or half-split (Open-Sora 2). Between them the q and k channels of every
  head are permuted, in weight, bias and norm scale: interleaved channel 2d is half-split d, 2d+1 is Dh/2 + d.

Files we write name their layout in the safetensors metadata; for files that do not, fused means interleaved and
separate means half-split, which is right for the two published ones.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from opensora.models.layers.rope import RopeLayout
from opensora.models.weights.format import WeightFormat
from opensora.models.weights.rows import Rows, Shape, Target, height, joined, whole
from opensora.models.weights.writer import assemble, shapes_of
from opensora.utils.errors import UserError

_INPUTS = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "cond_in")


@dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """How a file writes the same model."""

    fused_qkv: bool
    rope_layout: RopeLayout
    diffusers: bool = False  # under the names of diffusers' FluxTransformer2DModel; written, of weights not read

    def metadata(self) -> dict[str, str]:
        """What a file's safetensors metadata says of its layout."""
        return {"format": "pt", "fused_qkv": str(self.fused_qkv).lower(), "rope_layout": self.rope_layout}


FLUX = WeightLayout(fused_qkv=True, rope_layout="interleaved")
OPEN_SORA_2 = WeightLayout(fused_qkv=False, rope_layout="half")
DIFFUSERS = WeightLayout(fused_qkv=False, rope_layout="interleaved", diffusers=True)
LAYOUTS = {"flux": FLUX, "open-sora-2": OPEN_SORA_2}


class _Config(Protocol):
    """What an ``MMDiTConfig`` says of its weights."""

    @property
    def fused_qkv(self) -> bool: ...

    @property
    def rope_layout(self) -> RopeLayout: ...


class MMDiTWeights:
    """The family's ``WeightFormat``."""

    top_level: tuple[str, ...] = (*_INPUTS, "double_blocks", "single_blocks", "final_layer")
    original = FLUX
    diffusers = DIFFUSERS
    layouts: Mapping[str, WeightLayout] = LAYOUTS
    # A file without cond_in (Flux) starts as if nothing were conditioned: cond_in is drawn, which is zero.
    may_lack: tuple[str, ...] = ("cond_in.*",)
    recomputed: tuple[str, ...] = ()
    torch_keys: tuple[str, ...] | None = None
    advice = "choose the model size and embeds (cond_embed, guidance_embed) of this file"
    example_layer = "single_blocks.0.linear1"

    def layout(self, cfg: _Config) -> WeightLayout:
        return WeightLayout(fused_qkv=cfg.fused_qkv, rope_layout=cfg.rope_layout)

    def detect_layout(self, names: Collection[str], metadata: Mapping[str, str]) -> WeightLayout:
        """The rotary layout that metadata states, else that of the published one with these names."""
        fused = any(".qkv." in name or ".linear1." in name for name in names)
        rope = metadata.get("rope_layout") or ("interleaved" if fused else "half")
        if rope not in ("interleaved", "half"):
            raise UserError(f"rope_layout={rope} in the file's metadata: must be one of interleaved, half")
        return WeightLayout(fused_qkv=fused, rope_layout="half" if rope == "half" else "interleaved")

    def targets(self, shapes: Mapping[str, Shape], source: WeightLayout, to: WeightLayout) -> dict[str, Target]:
        """Only the rotary layout of ``source`` matters, fusion is in the names."""
        separate = _unfused(shapes)
        if source.rope_layout != to.rope_layout:
            separate = _reordered(separate, _head_dim(shapes), to.rope_layout)
        if to.diffusers:
            return _diffusers(separate)
        return _fused(separate) if to.fused_qkv else separate

    def other_format(self, names: Collection[str]) -> str | None:
        if any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names):
            return (
                "these are weights under diffusers' names; give the file with the original ones, as "
                "flux1-dev.safetensors"
            )
        return None

    def adapter_layout(self, layers: Collection[str], metadata: Mapping[str, str]) -> tuple[WeightLayout, bool]:
        """As for weights; diffusers' names come with interleaved pairs."""
        as_weights = [f"{name}.qkv." if "transformer_blocks" in name else f"{name}.weight" for name in layers]
        return self.detect_layout(as_weights, metadata), "rope_layout" not in metadata

    def adapter_targets(
        self, shapes: Mapping[str, Shape], layout: WeightLayout, source: WeightLayout
    ) -> dict[str, Target]:
        """Layers may go by our names, with q, k, v fused or separate, and by diffusers'."""
        separate = {name: target for name, target in _unfused(shapes).items() if _is_matrix(name, target.shape)}
        if source.rope_layout != layout.rope_layout:
            separate = _reordered(separate, _head_dim(shapes), source.rope_layout)
        return {**_diffusers(separate), **_fused(separate), **separate}

    def describe_guess(self, source: WeightLayout, to: WeightLayout) -> str:
        return (
            f"does not say its rope_layout; taken for {source.rope_layout} by the names of its layers, and put into "
            f"the order of model.rope_layout={to.rope_layout}"
        )


WEIGHTS: WeightFormat = MMDiTWeights()


def flux_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Flux-shaped MMDiT under the names of diffusers' FluxTransformer2DModel.

    Any of our layouts is read, as its names tell. ``cond_in`` has no place there and must not be in ``state``.
    """
    shapes = shapes_of(state)
    return assemble(state, WEIGHTS.targets(shapes, WEIGHTS.detect_layout(shapes, {}), DIFFUSERS))


def _is_matrix(name: str, shape: Shape) -> bool:
    return name.endswith(".weight") and len(shape) == 2


def _head_dim(shapes: Mapping[str, Shape]) -> int:
    for name, shape in shapes.items():
        if name.endswith("norm.key_norm.scale"):
            return max(height(shape), 1)
    raise UserError("these weights have no norm.key_norm.scale, so they are no MMDiT: give a Flux or Open-Sora 2 file")


def _unfused(shapes: Mapping[str, Shape]) -> dict[str, Target]:
    """Every tensor by itself; what is too odd to be cut in q, k, v stays whole, and fits no model."""
    separate: dict[str, Target] = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        weight = shapes.get(f"{layer}.weight", ())
        hidden = weight[1] if len(weight) == 2 else 0
        parts: dict[str, int] = {}
        if hidden and layer.endswith("_attn.qkv") and height(shape) % 3 == 0:
            parts = dict.fromkeys(("q_proj", "k_proj", "v_proj"), height(shape) // 3)
        elif hidden and fnmatchcase(layer, "single_blocks.*.linear1") and height(shape) > 2 * hidden:
            parts = {"q_proj": hidden, "k_proj": hidden, "v_mlp": height(shape) - 2 * hidden}
        owner, start = layer.rpartition(".")[0], 0
        for part, count in parts.items():
            rows = Rows(name, start, start + count)
            separate[f"{owner}.{part}.{kind}"] = Target((count, *shape[1:]), (rows,))
            start += count
        if not parts:
            separate[name] = whole(name, shape)
    return separate


def _fused(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Join q, k, v where all three are there: text that is only read has no q, and stays separate."""
    fused: dict[str, Target] = {}
    gone: set[str] = set()
    for name, target in targets.items():
        owner, _, kind = name.rpartition(".q_proj.")
        if owner:
            third, one = ("v_mlp", "linear1") if owner.startswith("single_blocks.") else ("v_proj", "qkv")
            names = [name, f"{owner}.k_proj.{kind}", f"{owner}.{third}.{kind}"]
            if all(part in targets for part in names):
                fused[f"{owner}.{one}.{kind}"] = joined(*(targets[part] for part in names))
                gone.update(names)
                continue
        fused[name] = target
    return {name: target for name, target in fused.items() if name not in gone}


def _reordered(targets: Mapping[str, Target], head_dim: int, to: RopeLayout) -> dict[str, Target]:
    """The channels of q and k, and of their norms, in the rotary layout ``to`` instead of the other one.

    What is not made of whole heads keeps its order, and fits no model.
    """
    order = _channel_order(head_dim, to)
    found = {}
    for name, target in targets.items():
        is_qk = ".q_proj." in name or ".k_proj." in name or name.endswith(("query_norm.scale", "key_norm.scale"))
        is_whole = all(rows.start % head_dim == rows.stop % head_dim == 0 for rows in target.rows)
        rows = tuple(replace(rows, order=order) for rows in target.rows)
        found[name] = replace(target, rows=rows) if is_qk and is_whole else target
    return found


def _channel_order(head_dim: int, to: RopeLayout) -> tuple[int, ...]:
    """Source channel of every target channel of one head."""
    to_half = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))
    order = to_half if to == "half" else to_half.argsort()
    return tuple(order.tolist())


def _diffusers(separate: Mapping[str, Target]) -> dict[str, Target]:
    """What each of diffusers' tensors is made of; ``separate``: q, k, v and v_mlp each by itself."""
    renamed = {}
    for name, target in separate.items():
        block, v_mlp, kind = name.partition(".v_mlp.")
        (rows,), rest = target.rows, target.shape[1:]
        if v_mlp:
            hidden, prefix = height(separate[f"{block}.linear2.weight"].shape), _diffusers_name(f"{block}.")
            v, mlp = rows.part(0, hidden), rows.part(hidden, rows.count)
            renamed[f"{prefix}attn.to_v.{kind}"] = Target((v.count, *rest), (v,))
            renamed[f"{prefix}proj_mlp.{kind}"] = Target((mlp.count, *rest), (mlp,))
        elif name.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = rows.part(0, rows.count // 2), rows.part(rows.count // 2, rows.count)
            renamed[_diffusers_name(name)] = Target(target.shape, (scale, shift))  # diffusers has scale first
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
