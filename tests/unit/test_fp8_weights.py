"""Weights in fp8, plain and scaled, in every form that people have them: bit for bit what decoding by hand gives."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.conversion import convert_weights
from opensora.models.base import ModelConfig
from opensora.models.families import build_model, family_of
from opensora.models.mmdit.convert import LAYOUTS as MMDIT_LAYOUTS
from opensora.models.text.weights import T5, open_umt5
from opensora.models.weights.format import Layout, WeightFormat
from opensora.models.weights.reader import WeightFile, load_into, load_state_dict_for
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import INDEX
from tests.text_models import write_umt5
from tests.unit.test_hunyuan_video_files import SMALL as HUNYUAN_VIDEO
from tests.unit.test_mmdit import DEBUG as MMDIT
from tests.unit.test_wan_files import SMALL as WAN

Tensors = dict[str, Tensor]
KINDS = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}  # bits of exponent and mantissa, and the bias
E4M3 = torch.float8_e4m3fn
COMFYUI = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'


def by_hand(bits: int, kind: torch.dtype) -> float:
    """The number that a byte is."""
    exponent_bits, mantissa_bits, bias = KINDS[kind]
    exponent, mantissa = bits >> mantissa_bits & (1 << exponent_bits) - 1, bits & (1 << mantissa_bits) - 1
    sign, last = (-1.0 if bits & 128 else 1.0), exponent == (1 << exponent_bits) - 1
    if kind == E4M3 and last and mantissa == 7:  # the only NaN, and no infinity
        return float("nan")
    if kind == torch.float8_e5m2 and last:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * float(mantissa * 2.0 ** (1 - bias - mantissa_bits))
    return sign * float((1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias))


def table(kind: torch.dtype) -> np.ndarray[Any, Any]:
    return np.array([by_hand(bits, kind) for bits in range(256)], np.float32)


def decoded(values: Tensor, scale: Tensor | None) -> Tensor:
    """fp8 times its scale, by numpy in fp32."""
    found = table(values.dtype)[values.view(torch.uint8).numpy()]
    if scale is not None:
        number = scale.float().numpy()
        shape = (-1, *[1] * (found.ndim - 1)) if number.size > 1 else ()
        found = found * number.reshape(shape)
    assert found.dtype == np.float32
    return torch.from_numpy(np.ascontiguousarray(found))


def same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, signs of zeros too."""
    return one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_byte_is_the_number_it_should_be(kind: torch.dtype, tmp_path: Path) -> None:
    cfg = replace(WAN["t2v"], text_dim=256)
    state = made(cfg, family_of(cfg).weights.original)
    bits = torch.arange(256, dtype=torch.uint8).repeat(24, 1)
    state["text_embedding.0.weight"], scale = bits.view(kind), torch.tensor(0.0371)
    save_file({**state, "text_embedding.0.scale_weight": scale}, tmp_path / "m.safetensors")
    found = WeightFile(tmp_path, family_of(cfg).weights)["text_embedding.0.weight"]
    wanted = decoded(state["text_embedding.0.weight"], scale)
    numbers = ~wanted.isnan()
    assert int((~numbers).sum()) == 24 * (2 if kind == E4M3 else 6) and torch.equal(found.isnan(), wanted.isnan())
    assert same(found[numbers], wanted[numbers])


@dataclass(frozen=True)
class Form:
    """A file in fp8: what it holds, and what its weights are."""

    tensors: Tensors  # without prefix
    truth: Tensors
    fp8: frozenset[str]


def made(cfg: ModelConfig, layout: Layout, seed: int = 0) -> Tensors:
    """Weights under the names of a layout, of sizes as they are usual."""
    format, generator = family_of(cfg).weights, torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_model(cfg).state_dict().items()}
    ours = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {n: t.clone() for n, t in convert_state_dict(ours, format, source=format.layout(cfg), to=layout).items()}


def scale_for(weight: Tensor, dice: random.Random) -> Tensor:
    """Of the tensor, or of each output channel, in a shape and a type that tools write."""
    top = 448.0 if weight.dtype == E4M3 else 57344.0
    if dice.random() < 0.5 or weight.shape[0] == 1:
        scale = torch.tensor(dice.uniform(0.1, 1.0) / top).reshape(dice.choice([(), (1,), (1, 1)]))
    else:
        scale = torch.tensor([dice.uniform(0.1, 1.0) / top for _ in range(weight.shape[0])])
        scale = scale.reshape(-1, *[1] * dice.randrange(3))
    return scale.to(dice.choice([torch.float32, torch.float32, torch.bfloat16]))


def drawn(cfg: ModelConfig, layout: Layout, seed: int) -> Form:
    """Any form: which tensors are in fp8 and how they are scaled."""
    dice, scaled = random.Random(seed), seed % 3 != 0
    names = dice.choice([".scale_weight", ".weight_scale", ".weight_scale_inv"])
    tensors, truth, in_fp8 = {}, {}, set()
    for name, weight in made(cfg, layout, seed).items():
        matrix = name.endswith(".weight") and weight.dim() > 1
        if dice.random() < (0.7 if matrix or not scaled else 0.1):
            kind = dice.choice([E4M3, E4M3, torch.float8_e5m2])
            quantized = (weight * (2000 if scaled and matrix else 1)).clamp(-400, 400).to(kind)
            scale = scale_for(quantized, dice) if scaled and matrix else None
            if scaled and weight.dim() > 1 and not matrix:  # a table, which no tool scales
                tensors[name] = truth[name] = weight
                continue
            tensors[name], truth[name] = quantized, decoded(quantized, scale)
            in_fp8.add(name)
            if scale is not None:
                tensors[name.removesuffix(".weight") + names] = scale
                layer = name.removesuffix("weight")
                extra = {f"{layer}scale_input": torch.ones(()), f"{layer}input_scale": torch.tensor(0.3)}
                extra[f"{layer}comfy_quant"] = torch.tensor(list(COMFYUI), dtype=torch.uint8)
                tensors |= {one: tensor for one, tensor in extra.items() if dice.random() < 0.3}
        else:
            tensors[name] = weight.to(dice.choice([torch.float32, torch.bfloat16, torch.float16]))
            truth[name] = tensors[name].float()
    return Form(tensors, truth, frozenset(in_fp8))


def written(form: Form, folder: Path, seed: int) -> None:
    """One file, or shards where a scale may be in another file than its weight; behind a prefix or none."""
    dice = random.Random(f"file {seed}")
    prefix = dice.choice(["", "model.diffusion_model."])
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in form.tensors.items()}
    if dice.random() < 0.7 and any(name.endswith("_weight") for name in tensors):
        tensors[f"{dice.choice(['', prefix])}scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    count = dice.choice([1, 3])
    if count == 1:
        save_file(tensors, folder / "any.safetensors")
        return
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    where = {name: dice.choice(files) for name in tensors}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def mmdit(layout: str) -> tuple[ModelConfig, Layout]:
    return MMDIT, MMDIT_LAYOUTS[layout]


def named(cfg: ModelConfig, layout: str) -> tuple[ModelConfig, Layout]:
    layouts: Any = family_of(cfg).weights
    return cfg, layouts.layouts[layout]


MODELS: dict[str, tuple[ModelConfig, Layout]] = {
    **{f"mmdit {layout}": mmdit(layout) for layout in MMDIT_LAYOUTS},
    **{f"wan {layout}": named(WAN["picture"], layout) for layout in ("original", "diffusers")},
    **{f"hunyuan_video {layout}": named(HUNYUAN_VIDEO, layout) for layout in ("original", "diffusers")},
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", MODELS)
def test_every_form_gives_the_numbers_that_decoding_by_hand_gives(kind: str, seed: int, tmp_path: Path) -> None:
    """Whole tensors, and any part of them, as processes read that hold a shard each."""
    cfg, layout = MODELS[kind]
    format = family_of(cfg).weights
    form = drawn(cfg, layout, seed)
    written(form, tmp_path, seed)
    with torch.device("meta"):
        model = build_model(cfg)
    file, report = load_state_dict_for(model, tmp_path, format, to=format.layout(cfg))
    truth = convert_state_dict(form.truth, format, source=layout, to=format.layout(cfg))
    assert set(file) == set(truth) and file.from_fp8 and len(file.in_fp8) == len(form.fp8)
    assert f"{len(form.fp8)} stored in fp8, " in str(report)
    dice = random.Random(f"parts {seed}")
    for name, wanted in truth.items():
        assert same(file[name].float().contiguous(), wanted.contiguous()), name
        start = tuple(dice.randrange(size) for size in wanted.shape)
        part = tuple(slice(at, dice.randint(at + 1, size)) for at, size in zip(start, wanted.shape, strict=True))
        for dtype in (torch.float32, torch.bfloat16):
            found = torch.full_like(wanted[part], float("nan"), dtype=dtype)
            assert file.read_part(name, start, found)
            assert torch.equal(found, wanted[part].to(dtype)), (name, part, dtype)


@pytest.mark.parametrize("kind", ["mmdit open-sora-2", "wan original", "hunyuan_video diffusers"])
def test_conversion_writes_bf16_and_leaves_other_types_alone(kind: str, tmp_path: Path) -> None:
    cfg, layout = MODELS[kind]
    format = family_of(cfg).weights
    form = drawn(cfg, layout, 4)
    (tmp_path / "from").mkdir()
    written(form, tmp_path / "from", 4)
    said, files = convert_weights(cfg, tmp_path / "from", tmp_path / "to")
    found = {name: t for file in files if file.suffix == ".safetensors" for name, t in load_file(file).items()}
    to = format.original if getattr(format, "exports_original", False) else format.layout(cfg)
    wanted = convert_state_dict(form.truth, format, source=layout, to=to)
    stored = WeightFile(tmp_path / "from", format, to)
    assert set(found) == set(wanted) and "stored in fp8" in said
    for name, tensor in found.items():
        assert tensor.dtype == (torch.bfloat16 if name in stored.from_fp8 else stored[name].dtype)
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    load_into(build_model(cfg), tmp_path / "to", format, to=format.layout(cfg))


def test_what_is_said_of_scales(tmp_path: Path) -> None:
    state, format = scaled(), family_of(WAN["t2v"]).weights
    more = {"blocks.0.ffn.0.scale_input": torch.ones(()), "blocks.1.ffn.0.input_scale": torch.ones(())}
    save_file({**state, **more}, tmp_path / "m.safetensors")
    to = format.layout(WAN["t2v"])
    report = str(load_into(build_model(WAN["t2v"]), tmp_path, format, to=to))
    assert "2 stored in fp8, 1 of them with a scale: blocks.0.ffn.0.bias, blocks.0.ffn.0.weight" in report
    assert "2 scales of activations not read: blocks.0.ffn.0.scale_input, blocks.1.ffn.0.input_scale" in report
    assert "fp8" not in str(load_into(build_model(WAN["t2v"]), saved(tmp_path, plain()), format, to=to))


def saved(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    file = folder / "another.safetensors"
    save_file(dict(tensors), file)
    return file


LAYER = "blocks.0.ffn.0"


def plain() -> Tensors:
    return made(WAN["t2v"], family_of(WAN["t2v"]).weights.original)


def scaled() -> Tensors:
    """One layer in scaled fp8, whose bias is in plain fp8."""
    state = plain()
    marks = {"scaled_fp8": torch.zeros(2, dtype=E4M3), f"{LAYER}.scale_weight": torch.tensor(0.01)}
    return {**state, **{f"{LAYER}.{one}": state[f"{LAYER}.{one}"].to(E4M3) for one in ("weight", "bias")}, **marks}


def form_of(**stated: Any) -> Tensor:
    return torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8)


WEIGHT, SCALE, FORM = f"{LAYER}.weight", f"{LAYER}.scale_weight", f"{LAYER}.comfy_quant"
GIVE = "give the bf16 or fp16 weights"
DAMAGED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no weight": (lambda t: t.pop(WEIGHT), f"{SCALE} is the scale of {WEIGHT}, which is not there: fetch"),
    "a weight of another type": (lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}), f"which is BF16, not fp8: {GIVE}"),
    "no scale": (lambda t: t.pop(SCALE), f"{WEIGHT} is F8_E4M3 without a scale, where scaled_fp8 tells of scaled fp8"),
    "no scale of one": (
        lambda t: t.update({"blocks.1.ffn.0.weight": t["blocks.1.ffn.0.weight"].to(E4M3)}),
        "blocks.1.ffn.0.weight is F8_E4M3 without a scale",
    ),
    "two scales": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(())}), f"is a second scale of {WEIGHT}"),
    "NaN": (lambda t: t.update({SCALE: torch.tensor(float("nan"))}), f"{SCALE} holds nan: must be finite and above 0"),
    "infinity": (lambda t: t.update({SCALE: torch.tensor(float("inf"))}), f"{SCALE} holds inf: must be finite"),
    "zero": (lambda t: t.update({SCALE: torch.zeros(40)}), f"{SCALE} holds 0: must be finite and above 0"),
    "below zero": (lambda t: t.update({SCALE: torch.tensor(-1.0)}), f"{SCALE} holds -1: must be finite and above 0"),
    "too small for fp32": (lambda t: t.update({SCALE: torch.tensor(1e-60).double()}), f"{SCALE} holds 0: must be"),
    "of inputs": (lambda t: t.update({SCALE: torch.ones(1, 24)}), f"{SCALE} has shape (1, 24): must be one number, or"),
    "of blocks": (
        lambda t: t.update({SCALE: torch.ones(40, 3)}),
        f"one for each of the 40 rows of {WEIGHT}; scales of",
    ),
    "empty": (lambda t: t.update({SCALE: torch.ones(0)}), f"{SCALE} has shape (0,)"),
    "of integers": (lambda t: t.update({SCALE: torch.ones(40, dtype=torch.uint8)}), f"{SCALE} is U8: scales are F64"),
    "in fp8": (lambda t: t.update({SCALE: torch.ones(40).to(E4M3)}), f"{SCALE} is F8_E4M3: scales are F64"),
    "int8": (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)}), f"{WEIGHT} is I8 (quantized, with {SCALE})"),
    "nvfp4": (lambda t: t.update({f"{LAYER}.weight_scale_2": torch.ones(())}), "weight_scale_2 belongs to quantized"),
    "nf4": (lambda t: t.update({f"{WEIGHT}.quant_map": torch.ones(16)}), "quant_map belongs to quantized weights"),
    "smoothed": (lambda t: t.update({f"{LAYER}.pre_quant_scale": torch.ones(24)}), "pre_quant_scale belongs to"),
    "a form of blocks": (
        lambda t: t.update({FORM: form_of(format="mxfp8")}),
        f"{FORM} states no form of fp8 ({{'format': 'mxfp8'}}; read are float8_e4m3fn",
    ),
    "rotated": (
        lambda t: t.update({FORM: form_of(format="float8_e4m3fn", convrot=True)}),
        "fp8 (convrot is not known)",
    ),
    "no form": (lambda t: t.update({FORM: torch.tensor([123], dtype=torch.uint8)}), f"{FORM} states no form of fp8 ("),
    "a form that is none": (lambda t: t.update({FORM: torch.ones(3)}), f"{FORM} states no form of fp8 (F32 of shape"),
}


def refusal(file: Path, format: WeightFormat | None = None) -> str:
    """What is said of a file; nothing if it is read."""
    try:
        WeightFile(file, format or family_of(WAN["t2v"]).weights)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    change, words = DAMAGED[damage]
    tensors = scaled()
    file = saved(tmp_path, tensors)
    assert refusal(file) == ""
    change(tensors)
    said = refusal(saved(tmp_path, tensors))
    assert said.startswith(f"{file}: ") and words in said and "\n" not in said, said


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (
            {"layers": {LAYER: {"format": "int8_blockwise"}}},
            "states no form of fp8 ({'format': 'int8_blockwise'}; read",
        ),
        ({"layers": {LAYER: {"format": "float8_e4m3fn", "group_size": 64}}}, "(group_size is not known)"),
        ({"layers": 3}, "(no layers)"),
    ],
)
def test_forms_of_all_layers_in_metadata(stated: Any, words: str, tmp_path: Path) -> None:
    format, file = family_of(WAN["t2v"]).weights, tmp_path / "m.safetensors"
    right = {"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}, "other.x": {"format": "nvfp4"}}}
    save_file(scaled(), file, {"_quantization_metadata": json.dumps(right)})
    assert same(WeightFile(file, format)[WEIGHT], decoded(scaled()[WEIGHT], torch.tensor(0.01)))
    save_file(scaled(), file, {"_quantization_metadata": json.dumps(stated)})
    said = refusal(file)
    assert words in said and "\n" not in said, said


def test_nan_in_fp8_is_refused_where_weights_are_read(tmp_path: Path) -> None:
    tensors = scaled()
    tensors[WEIGHT] = torch.full((40, 24), 0x7F, dtype=torch.uint8).view(E4M3)
    with pytest.raises(UserError, match=f"{WEIGHT} holds NaN or infinite values"):
        convert_weights(WAN["t2v"], saved(tmp_path, tensors), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_the_text_encoder_as_comfyui_has_it(tmp_path: Path) -> None:
    """The embedding in fp16 and twice, matrices in scaled fp8, the tokenizer as a tensor, and a decoder's layer."""
    write_umt5(tmp_path)
    folder = tmp_path / "text_encoder"
    tensors, truth = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(folder / "model.safetensors").items():
        if re.search(r"SelfAttention\.[qkvo]\.|DenseReluDense", name):
            tensors[name] = (weight * 900).clamp(-448, 448).to(E4M3)
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = torch.tensor(1 / 900)
            truth[name] = decoded(tensors[name], torch.tensor(1 / 900))
        else:
            tensors[name] = weight.half()
            truth[name] = weight.half().float()
    tensors.pop("encoder.embed_tokens.weight", None)
    more = {"spiece_model": torch.ones(9, dtype=torch.uint8), "scaled_fp8": torch.zeros(0, dtype=E4M3)}
    more |= {"decoder.block.0.x.weight": torch.ones(2).to(E4M3), "decoder.block.0.x.scale_weight": torch.ones(())}
    repeated = {"encoder.embed_tokens.weight": torch.ones(2, 2).to(E4M3)}
    repeated["encoder.embed_tokens.scale_weight"] = torch.ones(())
    assert refusal(saved(tmp_path, {**tensors, **more, **repeated}), T5) == ""
    states = []
    for held in ({**tensors, **more, **repeated}, truth):
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        encoder = open_umt5("text.umt5_path", str(tmp_path))
        encoder.fill("cpu", torch.float32)
        states.append(encoder.module.state_dict())
    assert sum(name.endswith("scale_weight") for name in tensors) == 14
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
