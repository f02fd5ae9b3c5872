"""LoRA adapters into files, in the forms that tools exchange; ``read_adapter`` reads all of them back.

========== ==================== ============================================= ======================================
form       layers               tensors                                       alpha/rank
========== ==================== ============================================= ======================================
comfyui    of the release       ``diffusion_model.LAYER.lora_A.weight``       in B
diffusers  of diffusers' model  ``transformer.LAYER.lora_A.weight``           in B
kohya      of the release       ``lora_unet_LAYER.lora_down.weight``, with    ``lora_unet_LAYER.alpha``
                                underscores for dots
peft       of our model         ``base_model.model.LAYER.lora_A.weight``      ``adapter_config.json`` beside them
========== ==================== ============================================= ======================================

Where B holds it no tool can be wrong about the strength: without an alpha all of them add B A as it is. Differences of
whole tensors, ``LAYER.diff`` of a weight and ``LAYER.diff_b`` of a bias, have a name in ``comfyui`` alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from opensora.models.weights.adapter_fit import AdapterRows, FittedAdapter, owner, parameter
from opensora.models.weights.adapter_names import CONFIG, KINDS, METADATA_ALPHAS, PREFIX, WEIGHTS
from opensora.models.weights.adapters import Adapter
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.rows import Shape, Target, build
from opensora.utils.files.safetensors_files import write_file, write_json


@dataclass(frozen=True, kw_only=True)
class Form:
    """How files of one kind call adapters."""

    names: Literal["original", "diffusers", "own"]  # whose layers
    prefix: str  # of every name
    kinds: tuple[str, str] = KINDS  # what a layer's A and B end in
    flat: bool = False  # underscores for the dots of a layer
    alphas: bool = False  # an alpha tensor per layer
    differences: Mapping[str, str] = field(default_factory=dict)  # what those of a weight and of a bias end in


FORMS = {
    "comfyui": Form(names="original", prefix="diffusion_model.", differences={"weight": ".diff", "bias": ".diff_b"}),
    "diffusers": Form(names="diffusers", prefix="transformer."),
    "kohya": Form(
        names="original",
        prefix="lora_unet_",
        kinds=(".lora_down.weight", ".lora_up.weight"),
        flat=True,
        alphas=True,
    ),
    "peft": Form(names="own", prefix=PREFIX),
}


def forms_of(format: WeightFormat) -> tuple[str, ...]:
    """The forms that adapters of a family can be written in."""
    has = getattr(format, "diffusers", None) is not None
    return tuple(name for name, form in FORMS.items() if has or form.names != "diffusers")


def trained_adapter(tensors: Mapping[str, Tensor], scale: float) -> Adapter:
    """Adapters of a model of ours.

    Args:
        tensors: A and B by parameter name.
        scale: alpha/rank of all of them.
    """
    scales = {name.removesuffix(KINDS[0]): scale for name in tensors if name.endswith(KINDS[0])}
    return Adapter(path=Path(), base=None, tensors=dict(tensors), scales=scales, metadata={})


def export_adapter(
    place: Path,
    adapter: Adapter,
    form: str,
    *,
    shapes: Mapping[str, Shape],
    format: WeightFormat,
    layout: Layout,
    metadata: Mapping[str, str],
    digests: dict[str, str] | None = None,
) -> Path:
    """Write adapters of a model of ours in a form, one of ``forms_of(format)``; the file written.

    Args:
        place: a folder, or a file ``*.safetensors`` if the form is no folder.
        shapes: of all parameters of the model, in ``layout``.
        metadata: of the file, beside what says the layout.
    """
    named = {"original": format.original, "diffusers": getattr(format, "diffusers", None), "own": layout}
    to = named[FORMS[form].names]
    made = adapter if to is layout else convert_adapter(adapter, shapes, format, source=layout, to=to)
    return write_adapter(place, made, form, metadata={**metadata, **to.metadata()}, digests=digests)


def write_adapter(
    place: Path,
    adapter: Adapter,
    form: str,
    *,
    metadata: Mapping[str, str],
    digests: dict[str, str] | None = None,
) -> Path:
    """Write adapters whose layers go by the form's names already.

    Args:
        digests: gets the SHA-256 of every file by its name.
    """
    assert FORMS[form].differences or not adapter.differences, f"{form} has no names for differences"
    if form == "peft":
        return _write_peft(place, adapter, metadata, digests)
    described = FORMS[form]
    made = adapter if described.alphas else folded(adapter)
    tensors = {}
    for layer, scale in made.scales.items():
        name = described.prefix + (layer.replace(".", "_") if described.flat else layer)
        for kind, tensor in zip(described.kinds, made.matrices(layer), strict=True):
            assert f"{name}{kind}" not in tensors, f"{layer}: another layer has this name with underscores for dots"
            tensors[f"{name}{kind}"] = tensor
        if described.alphas:
            tensors[f"{name}.alpha"] = _number(scale * made.matrices(layer)[0].shape[0])
    for (layer, kind), tensor in made.differences.items():
        tensors[f"{described.prefix}{layer}{described.differences[kind]}"] = tensor
    is_file = place.suffix == ".safetensors"
    written = write_file(place if is_file else place / WEIGHTS, tensors, metadata, digests)
    if not is_file:
        (place / CONFIG).unlink(missing_ok=True)  # of an earlier export, whose names were peft's
    return written


def convert_adapter(
    adapter: Adapter, shapes: Mapping[str, Shape], format: WeightFormat, *, source: Layout, to: Layout
) -> Adapter:
    """Adapters of a model of ours for the layers of the same model in layout ``to``.

    A layer that is cut in several has for each part what the part needs: of the rank what is zero in its rows, and in
    no other's, is left out, and a part without any has no adapter.

    Args:
        shapes: of all parameters of the model, in layout ``source``.
    """
    targets = {name: target for name, target in format.targets(shapes, source, to).items() if len(target.shape) > 1}
    pieces = {name.removesuffix(".weight"): _pieces(target, adapter) for name, target in targets.items()}
    pieces = {layer: rows for layer, rows in pieces.items() if rows}
    outputs = {name.removesuffix(".weight"): target.shape[0] for name, target in targets.items()}
    made = FittedAdapter(adapter, pieces, outputs).plain()
    tensors: dict[str, Tensor] = {}
    scales = {}
    for layer, scale in made.scales.items():
        a, b = made.matrices(layer)
        if len(sources := {piece.layer for piece in pieces[layer]}) == 1:
            columns = _needed(b, adapter.matrices(*sources)[1])
            a, b = a[columns], b[:, columns]
        if b.shape[1]:
            a, b = _for_convolution(a, b, targets[f"{layer}.weight"].shape)
            tensors |= {f"{layer}{KINDS[0]}": a, f"{layer}{KINDS[1]}": b}
            scales[layer] = scale
    return replace(made, tensors=tensors, scales=scales, differences=_differences(adapter, shapes, format, source, to))


def _differences(
    adapter: Adapter, shapes: Mapping[str, Shape], format: WeightFormat, source: Layout, to: Layout
) -> dict[tuple[str, str], Tensor]:
    """Differences of a model of ours for the tensors of another layout; zeros in a part that has none."""
    given = {parameter(layer, kind, shapes): tensor for (layer, kind), tensor in adapter.differences.items()}

    def get(name: str, index: tuple[slice, ...]) -> Tensor:
        return (given[name] if name in given else torch.zeros(shapes[name]))[index]

    return {
        owner(name): build(target, shapes, get).contiguous()
        for name, target in format.targets(shapes, source, to).items()
        if any(rows.tensor in given for rows in target.rows)
    }


def folded(adapter: Adapter) -> Adapter:
    """The same products, of which alpha/rank is 1: B holds it, in fp32 where its own type would round it."""
    tensors = dict(adapter.tensors)
    for layer, scale in adapter.scales.items():
        b = adapter.matrices(layer)[1]
        exact = b.double() * scale
        short = exact.to(b.dtype)
        fits = b.dtype == torch.float64 or torch.equal(short.double(), exact)
        tensors[f"{layer}{KINDS[1]}"] = short if fits else exact.float()
    return replace(adapter, tensors=tensors, scales=dict.fromkeys(adapter.scales, 1.0))


def _pieces(target: Target, adapter: Adapter) -> tuple[AdapterRows, ...]:
    """Which rows of which adapters make up the adapter of a tensor of another layout."""
    found, position = [], 0
    for rows in target.rows:
        layer = rows.tensor.removesuffix(".weight")
        if layer in adapter.scales:
            places = torch.arange(position, position + rows.count)
            found.append(AdapterRows(layer=layer, rows=rows.indices(), places=places))
        position += rows.count
    return tuple(found)


def _needed(part: Tensor, whole: Tensor) -> Tensor:
    """(rank,) columns of B that rows of it need: those that are not zero in them, or are zero in all rows."""
    return (part != 0).any(0) | ~(whole != 0).any(0)


def _for_convolution(a: Tensor, b: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Both for a weight of this shape, which has dims more where it is that of a convolution."""
    more = len(shape) - 2
    return (a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *(1,) * more)) if more else (a, b)


def _number(value: float) -> Tensor:
    """One number, in fp64 where fp32 would round it."""
    short = torch.tensor(value, dtype=torch.float32)
    return short if short.item() == value else torch.tensor(value, dtype=torch.float64)


def _write_peft(folder: Path, adapter: Adapter, metadata: Mapping[str, str], digests: dict[str, str] | None) -> Path:
    """The folder that peft's ``PeftModel.from_pretrained`` reads."""
    ranks = {layer: adapter.matrices(layer)[0].shape[0] for layer in adapter.layers}
    if len({(ranks[layer], scale) for layer, scale in adapter.scales.items()}) > 1:
        adapter = folded(adapter)  # no one alpha is right for the file without its folder
    rank, scale = Counter(ranks.values()).most_common(1)[0][0], next(iter(adapter.scales.values()))
    others = {f"^{layer}": own for layer, own in ranks.items() if own != rank}
    stated = {} if others else {METADATA_ALPHAS[0]: repr(float(scale * rank))}
    named = {f"{PREFIX}{name}": tensor for name, tensor in adapter.tensors.items()}
    written = write_file(folder / WEIGHTS, named, {**metadata, **stated}, digests)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {layer: scale * own for layer, own in others.items()},
        "lora_dropout": 0.0,
        "target_modules": list(adapter.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    write_json(folder / CONFIG, described, digests)
    return written
