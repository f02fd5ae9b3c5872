"""LoRA files as the world ships them, on every layout of the model: W + scale * alpha/r * B A, computed independently.

The files are written here, from the formats' own definitions, and so is the truth: in fp64, in the Flux layout (q, k, v
in one, rotary pairs interleaved), then put into the model's layout by hand.
"""

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acceleration import lora
from acceleration.sharding import fsdp
from opensora.assembly.initial_weights import parameter_shapes
from opensora.inference.find import read_adapters
from opensora.models.families import MODEL_SIZES, build_model
from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.convert import WEIGHTS as FORMAT
from opensora.models.weights.adapter_export import convert_adapter, folded, trained_adapter, write_adapter
from opensora.models.weights.adapter_fit import plan_adapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.models.weights.names import known_layers
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator

FLUX = replace(MODEL_SIZES["mmdit"]["debug"], guidance_embed=True)  # hidden 64, 4 heads of 16, 2 + 2 blocks
HIDDEN, HEAD, INNER = 64, 16, 256
LAYOUTS = {
    f"{'fused' if fused else 'separate'}-{rope}": replace(FLUX, fused_qkv=fused, rope_layout=rope)
    for fused in (True, False)
    for rope in ("interleaved", "half")
}


@dataclass(frozen=True)
class Low:
    """One adapter of a file: delta = alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def delta(self) -> Tensor:
        return self.alpha / self.down.shape[0] * self.up.double() @ self.down.double()

    def exact(self) -> "Low":
        """With so few digits in ``up`` that alpha/rank rounds none away."""
        return replace(self, up=self.up.bfloat16().float())


@cache
def linears(model: MMDiTConfig) -> dict[str, tuple[int, int]]:
    """Every linear layer -> (outputs, inputs)."""
    with torch.device("meta"):
        built = build_model(model)
    return {n: (m.out_features, m.in_features) for n, m in built.named_modules() if isinstance(m, nn.Linear)}


def draw_low(shape: tuple[int, int], rank: int, alpha: float, *seed: int | str) -> Low:
    draw = torch_generator(*seed)
    return Low(torch.randn(rank, shape[1], generator=draw), torch.randn(shape[0], rank, generator=draw) * 0.1, alpha)


# -- Names of the same layers, written out --

Rows = tuple[str, int, int]  # layer of the Flux layout, rows of it


@cache
def diffusers_rows() -> dict[str, tuple[Rows, ...]]:
    """Layers of diffusers' FluxTransformer2DModel as rows of Flux's."""
    rows: dict[str, tuple[Rows, ...]] = {
        "x_embedder": (("img_in", 0, HIDDEN),),
        "context_embedder": (("txt_in", 0, HIDDEN),),
        "proj_out": (("final_layer.linear", 0, FLUX.in_channels),),
        "norm_out.linear": (
            ("final_layer.adaLN_modulation.1", HIDDEN, 2 * HIDDEN),  # scale first, Flux has shift first
            ("final_layer.adaLN_modulation.1", 0, HIDDEN),
        ),
    }
    for ours, theirs in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        rows[f"time_text_embed.{theirs}_embedder.linear_1"] = ((f"{ours}.in_layer", 0, HIDDEN),)
        rows[f"time_text_embed.{theirs}_embedder.linear_2"] = ((f"{ours}.out_layer", 0, HIDDEN),)
    for i in range(2):
        double, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for j, (q, added) in enumerate((("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))):
            rows[f"{theirs}.attn.{q}"] = ((f"{double}.img_attn.qkv", j * HIDDEN, (j + 1) * HIDDEN),)
            rows[f"{theirs}.attn.{added}"] = ((f"{double}.txt_attn.qkv", j * HIDDEN, (j + 1) * HIDDEN),)
        rows[f"{theirs}.attn.to_out.0"] = ((f"{double}.img_attn.proj", 0, HIDDEN),)
        rows[f"{theirs}.attn.to_add_out"] = ((f"{double}.txt_attn.proj", 0, HIDDEN),)
        for ours, ff, norm in (("img", "ff", "norm1"), ("txt", "ff_context", "norm1_context")):
            rows[f"{theirs}.{ff}.net.0.proj"] = ((f"{double}.{ours}_mlp.0", 0, INNER),)
            rows[f"{theirs}.{ff}.net.2"] = ((f"{double}.{ours}_mlp.2", 0, HIDDEN),)
            rows[f"{theirs}.{norm}.linear"] = ((f"{double}.{ours}_mod.lin", 0, 6 * HIDDEN),)
        single, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        for j, name in enumerate(("to_q", "to_k", "to_v")):
            rows[f"{theirs}.attn.{name}"] = ((f"{single}.linear1", j * HIDDEN, (j + 1) * HIDDEN),)
        rows[f"{theirs}.proj_mlp"] = ((f"{single}.linear1", 3 * HIDDEN, 3 * HIDDEN + INNER),)
        rows[f"{theirs}.proj_out"] = ((f"{single}.linear2", 0, HIDDEN),)
        rows[f"{theirs}.norm.linear"] = ((f"{single}.modulation.lin", 0, 3 * HIDDEN),)
    return rows


@cache
def separate_rows() -> dict[str, tuple[Rows, ...]]:
    """Layers of Open-Sora 2 as rows of Flux's, before q and k are reordered."""
    rows: dict[str, tuple[Rows, ...]] = {}
    for name, (height, _) in linears(FLUX).items():
        owner, _, last = name.rpartition(".")
        if last == "qkv":
            for j, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows[f"{owner}.{part}"] = ((name, j * HIDDEN, (j + 1) * HIDDEN),)
        elif last == "linear1":
            rows[f"{owner}.q_proj"] = ((name, 0, HIDDEN),)
            rows[f"{owner}.k_proj"] = ((name, HIDDEN, 2 * HIDDEN),)
            rows[f"{owner}.v_mlp"] = ((name, 2 * HIDDEN, height),)
        else:
            rows[name] = ((name, 0, height),)
    return rows


@cache
def flux_rows() -> dict[str, tuple[Rows, ...]]:
    return {name: ((name, 0, height),) for name, (height, _) in linears(FLUX).items()}


def halves(x: Tensor) -> Tensor:
    """Rows of whole heads from interleaved pairs (0 1)(2 3)... to half-split: even ones first."""
    return x.reshape(-1, HEAD // 2, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def in_layout(weights: Mapping[str, Tensor], model: MMDiTConfig) -> dict[str, Tensor]:
    """Linear weights of the Flux layout in the model's."""
    made = {}
    rows = flux_rows() if model.fused_qkv else separate_rows()
    for name, ((source, start, stop),) in rows.items():
        value = weights[source][start:stop].clone()
        if model.rope_layout == "half":
            if name.endswith(("qkv", "linear1")):
                value[: 2 * HIDDEN] = halves(value[: 2 * HIDDEN])
            elif name.endswith(("q_proj", "k_proj")):
                value = halves(value)
        made[name] = value
    return made


# -- Writers --


def peft_folder(lows: dict[str, Low], folder: Path, middle: str = "", prefix: str = "base_model.model.") -> Path:
    """Rank and alpha of the first layer for all, others by pattern."""
    first = next(iter(lows.values()))
    tensors = {}
    config = {"peft_type": "LORA", "r": first.down.shape[0], "lora_alpha": first.alpha, "bias": "none"}
    ranks, alphas = {}, {}
    for i, (name, low) in enumerate(lows.items()):
        tensors[f"{prefix}{name}.lora_A.{middle}weight"] = low.down
        tensors[f"{prefix}{name}.lora_B.{middle}weight"] = low.up
        key = name if i % 2 and name != "proj_out" else f"^{name}$"  # which is the end of other names too
        if low.down.shape[0] != config["r"]:
            ranks[key] = low.down.shape[0]
        if low.alpha != config["lora_alpha"]:
            alphas[key] = low.alpha
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**config, "rank_pattern": ranks, "alpha_pattern": alphas}))
    return folder


def one_file(
    folder: Path,
    lows: dict[str, Low],
    down: str,
    up: str,
    name: Callable[[str], str],
    metadata: dict[str, str] | None = None,
) -> Path:
    """kohya's and ComfyUI's: an alpha tensor per layer."""
    tensors = {}
    for layer, low in lows.items():
        tensors[f"{name(layer)}{down}"], tensors[f"{name(layer)}{up}"] = low.down.clone(), low.up.clone()
        tensors[f"{name(layer)}.alpha"] = torch.tensor(low.alpha, dtype=torch.float64)
    save_file(tensors, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def kohya(lows: dict[str, Low], folder: Path, prefix: str = "lora_unet_") -> Path:
    def flat(layer: str) -> str:
        return prefix + layer.replace(".", "_")

    return one_file(folder, lows, ".lora_down.weight", ".lora_up.weight", flat, {"ss_network_alpha": "999"})


def prefixed(
    prefix: str, down: str = ".lora_A.weight", up: str = ".lora_B.weight"
) -> Callable[[dict[str, Low], Path], Path]:
    return lambda lows, folder: one_file(folder, lows, down, up, lambda layer: prefix + layer)


def diffusers_metadata(lows: dict[str, Low], folder: Path) -> Path:
    """As save_lora_weights of diffusers: peft's configuration in the metadata."""
    tensors = {}
    for name, low in lows.items():
        tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"] = low.down, low.up
    first = next(iter(lows.values()))
    config = {
        "transformer.r": first.down.shape[0],
        "transformer.lora_alpha": first.alpha,
        "transformer.rank_pattern": {name: low.down.shape[0] for name, low in lows.items()},
        "transformer.alpha_pattern": {name: low.alpha for name, low in lows.items()},
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    return folder


FORMATS: dict[str, tuple[Callable[[], dict[str, tuple[Rows, ...]]], Callable[[dict[str, Low], Path], Path]]] = {
    "peft": (flux_rows, peft_folder),
    "peft, default": (flux_rows, lambda lows, folder: peft_folder(lows, folder, "default.")),
    "kohya": (flux_rows, kohya),
    "ComfyUI": (flux_rows, prefixed("diffusion_model.")),
    "transformer.": (flux_rows, prefixed("transformer.", ".lora_down.weight", ".lora_up.weight")),
    "no prefix": (flux_rows, prefixed("", ".lora.down.weight", ".lora.up.weight")),
    "wrapped": (flux_rows, prefixed("module._orig_mod.model.")),
    "diffusers": (diffusers_rows, prefixed("transformer.")),
    "diffusers, metadata": (diffusers_rows, diffusers_metadata),
    "diffusers, peft": (diffusers_rows, peft_folder),
    "diffusers, kohya": (diffusers_rows, lambda lows, folder: kohya(lows, folder, "lora_transformer_")),
    "Open-Sora 2, peft": (separate_rows, peft_folder),
    "Open-Sora 2, kohya": (separate_rows, kohya),
    "Open-Sora 2, ComfyUI": (separate_rows, prefixed("diffusion_model.")),
}


def random_lows(format: str, seed: int) -> dict[str, Low]:
    """A random subset of layers, at least one, each of a rank and an alpha of its own."""
    draw = random.Random(f"{format} {seed}")
    rows, shapes = FORMATS[format][0](), linears(FLUX)
    names = sorted(rows)
    chosen = draw.sample(names, draw.choice([1, 2, 5, len(names)]))
    lows = {}
    for name in chosen:
        shape = (sum(stop - start for _, start, stop in rows[name]), shapes[rows[name][0][0]][1])
        lows[name] = draw_low(shape, draw.choice([1, 2, 3, 5]), draw.choice([1.0, 0.7, 3.0, 8.0]), format, seed, name)
    return lows


@cache
def flux_weights() -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch_generator("base", name)).double()
        for name, shape in linears(FLUX).items()
    }


def base_model(model: MMDiTConfig) -> MMDiTModel:
    """A model in fp64 of these weights."""
    built = build_model(model).double().requires_grad_(False)
    for name, value in in_layout(flux_weights(), model).items():
        built.get_parameter(f"{name}.weight").copy_(value)
    return built


def merged(path: Path, model: MMDiTConfig, scale: float) -> dict[str, Tensor]:
    """Weights of the model with the adapters of a file, as sampling makes them."""
    built = base_model(model)
    exported = read_adapters(path, model, "lora").exported
    assert exported is not None
    with torch.device("meta"):
        adapted = build_model(model)
    lora.attach(adapted, exported.sizes())
    adapted.double().to_empty(device="cpu")
    names = [name for name, _ in adapted.named_parameters() if lora.is_adapter(name)]
    adapted.load_state_dict({**built.state_dict(), **{name: exported.tensor(name) for name in names}})
    fsdp.merge_adapters(adapted, scale)
    return {name: adapted.get_parameter(f"{name}.weight") for name in linears(model)}


def check(format: str, layout: str, seed: int, folder: Path) -> None:
    lows, model = random_lows(format, seed), LAYOUTS[layout]
    rows, write = FORMATS[format]
    wanted = {name: weight.clone() for name, weight in flux_weights().items()}
    for name, low in lows.items():
        delta = low.delta
        for source, start, stop in rows()[name]:
            wanted[source][start:stop] += 0.7 * delta[: stop - start]
            delta = delta[stop - start :]
    if rows is separate_rows:  # as the half-split file has them
        lows = {
            n: replace(low, up=halves(low.up)) if n.endswith(("q_proj", "k_proj")) else low for n, low in lows.items()
        }
    found = merged(write(lows, folder), model, 0.7)
    for name, weight in in_layout(wanted, model).items():
        assert (found[name] - weight).abs().max() <= 1e-12, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_random_adapters_in_every_format(format: str, layout: str, tmp_path: Path) -> None:
    check(format, layout, list(LAYOUTS).index(layout), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("format", FORMATS)
def test_many_random_adapters_in_every_format(format: str, tmp_path: Path) -> None:
    for seed in range(4, 104):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check(format, list(LAYOUTS)[seed % 4], seed, folder)


def test_a_name_is_not_taken_for_the_end_of_another(tmp_path: Path) -> None:
    """``proj_out`` of the model comes before that of a block."""
    rows = diffusers_rows()
    names = ["proj_out", "single_transformer_blocks.0.proj_out"]
    shapes = {name: (sum(b - a for _, a, b in rows[name]), linears(FLUX)[rows[name][0][0]][1]) for name in names}
    lows = {name: draw_low(shapes[name], rank, 2.0 * rank, name) for rank, name in ((3, names[0]), (1, names[1]))}
    exported = read_adapters(diffusers_metadata(lows, tmp_path), FLUX, "lora").exported
    assert exported is not None and sorted(rank for rank, _ in exported.sizes().values()) == [1, 3]


# -- What a file says, or does not --

PROJ = "double_blocks.0.img_attn.proj"
LOW = draw_low((HIDDEN, HIDDEN), 4, 6.0, "low")
PLAIN = {f"{PROJ}.lora_A.weight": LOW.down, f"{PROJ}.lora_B.weight": LOW.up}


def scale_of(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> float:
    save_file(tensors, folder / "a.safetensors", metadata=metadata)
    (scale,) = read_adapter(folder / "a.safetensors").scales.values()
    return scale


@pytest.mark.parametrize("alpha", [torch.tensor(6), torch.tensor([6.0]), torch.tensor(6.0, dtype=torch.bfloat16)])
def test_alpha_of_any_type_is_divided_by_the_rank(alpha: Tensor, tmp_path: Path) -> None:
    assert scale_of(tmp_path, {**PLAIN, f"{PROJ}.alpha": alpha}, {"ss_network_alpha": "1"}) == 1.5


@pytest.mark.parametrize("alpha", [torch.tensor(3e38), torch.tensor(-1e300, dtype=torch.float64), torch.tensor(2**62)])
def test_alpha_that_drowns_the_weights_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"alpha is .* for rank 4: alpha/rank is at most 1e\+06"):
        scale_of(tmp_path, {**PLAIN, f"{PROJ}.alpha": alpha})
    assert scale_of(tmp_path, {**PLAIN, f"{PROJ}.alpha": torch.tensor(4e6)}) == 1e6


@pytest.mark.parametrize("key", ["ss_network_alpha", "network_alpha", "lora_alpha"])
def test_alpha_in_the_metadata(key: str, tmp_path: Path) -> None:
    assert scale_of(tmp_path, PLAIN, {key: "2.0"}) == 0.5
    for value in ("many", "nan", "0", "inf", "[1]"):
        with pytest.raises(UserError, match="alpha in its metadata is"):
            scale_of(tmp_path, PLAIN, {key: value})


def test_no_alpha_at_all_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_of(tmp_path, PLAIN, {"ss_network_alpha": "None"}) == 1.0
    said = capsys.readouterr().err
    assert "says no alpha" in said


def test_alpha_beside_the_file_counts_when_the_file_is_given(tmp_path: Path) -> None:
    for given in (peft_folder({PROJ: LOW}, tmp_path), tmp_path / WEIGHTS, tmp_path / CONFIG):
        assert list(read_adapter(given).scales.values()) == [1.5]


def test_rank_stabilised_adapters(tmp_path: Path) -> None:
    peft_folder({PROJ: LOW}, tmp_path)
    described = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**described, "use_rslora": True}))
    assert list(read_adapter(tmp_path).scales.values()) == [6 / math.sqrt(4)]


def test_alpha_of_tensors_and_of_the_configuration_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft_folder({PROJ: LOW}, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, f"base_model.model.{PROJ}.alpha": torch.tensor(2.0)}, tmp_path / WEIGHTS)
    assert list(read_adapter(tmp_path).scales.values()) == [0.5]
    said = capsys.readouterr().err
    assert "lora_alpha" in said and "the alpha tensors count" in said


MATRIX = torch.ones(4, 64)
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA of kohya": ({**PLAIN, f"{PROJ}.dora_scale": torch.ones(64, 1)}, "these are DoRA"),
    "DoRA of peft": ({**PLAIN, f"{PROJ}.lora_magnitude_vector.weight": torch.ones(64)}, "these are DoRA"),
    "LoHa": ({"lora_unet_x.hada_w1_a": MATRIX}, "these are LoHa"),
    "LoKr": ({"lycoris_x.lokr_w1": MATRIX}, "these are LoKr"),
    "OFT": ({"lora_unet_x.oft_blocks": MATRIX}, "these are OFT"),
    "IA3": ({"lora_unet_x.on_input": MATRIX}, "these are IA3"),
    "Tucker": ({**PLAIN, f"{PROJ}.lora_mid.weight": MATRIX}, "third matrix"),
    "two differences": (
        {**PLAIN, f"{PROJ}.diff_b": MATRIX[0], f"{PROJ}.b_norm": MATRIX[1].clone()},
        "two differences for the same place",
    ),
    "two biases": (
        {**PLAIN, f"{PROJ}.diff_b": MATRIX[0], f"{PROJ}.lora_B.bias": MATRIX[1].clone()},
        "lora_B.bias: two differences for the same place",
    ),
    "a bias of B alone": ({**PLAIN, "x.lora_B.bias": MATRIX[0]}, "x.lora_B.bias: the matrices of x are missing"),
    "a difference that is NaN": ({f"{PROJ}.diff_b": MATRIX[0] * math.nan}, "diff_b holds NaN"),
    "a difference in fp8": ({f"{PROJ}.diff_b": MATRIX[0].to(torch.float8_e4m3fn)}, r"diff_b is F8_E4M3"),
    "whole weights": ({**PLAIN, "diffusion_model.img_in.set_weight": MATRIX}, "set_weight: these are whole weights"),
    "something left over": ({**PLAIN, f"{PROJ}.lora_C.weight": MATRIX}, "lora_C.weight is no part of LoRA"),
    "A and B beside down and up": (
        {**PLAIN, "img_in.lora_down.weight": MATRIX, "img_in.lora_up.weight": LOW.up.clone()},
        "names of two forms in one file",
    ),
    "XLabs": ({"double_blocks.0.processor.qkv_lora1.down.weight": MATRIX}, "as XLabs writes it"),
    "GLoRA": ({"lora_unet_x.a1.weight": MATRIX}, "these are GLoRA"),
    "old diffusers": ({"transformer.x.attn.processor.to_q_lora.down.weight": MATRIX}, "or an old diffusers"),
    "biases of A": ({**PLAIN, f"{PROJ}.lora_A.bias": torch.ones(4)}, "LoRA with biases of A"),
    "embeddings": ({"x.lora_embedding_A": MATRIX}, "LoRA of embeddings"),
    "weights": ({f"{PROJ}.weight": MATRIX}, "no part of LoRA.*given as weights="),
    "text alone": (
        {"lora_te1_x.lora_down.weight": MATRIX, "lora_te1_x.lora_up.weight": MATRIX.clone()},
        "no adapters for the",
    ),
    "half": ({f"{PROJ}.lora_A.weight": MATRIX}, "the other matrix of"),
    "alpha alone": ({**PLAIN, "y.alpha": torch.tensor(1.0)}, "y.alpha: the matrices of y are missing"),
    "two names": ({**PLAIN, f"{PROJ}.lora_down.weight": MATRIX}, "two matrices for the same place"),
    "two adapters": (
        {**PLAIN, "y.lora_A.style.weight": MATRIX, "y.lora_B.style.weight": MATRIX.T.contiguous()},
        "two adapters in one file",
    ),
    "other ranks": ({**PLAIN, f"{PROJ}.lora_A.weight": torch.ones(3, 64)}, r"\(3, 64\) and \(64, 4\): must be"),
    "a vector": ({**PLAIN, f"{PROJ}.lora_A.weight": torch.ones(64)}, r"\(64,\) and"),
    "rank 0": ({f"{PROJ}.lora_A.weight": torch.ones(0, 64), f"{PROJ}.lora_B.weight": torch.ones(64, 0)}, r"\(0, 64\)"),
    "NaN": ({**PLAIN, f"{PROJ}.lora_A.weight": LOW.down * math.nan}, "lora_A.weight holds NaN"),
    "infinity": ({**PLAIN, f"{PROJ}.lora_B.weight": LOW.up / 0}, "lora_B.weight holds NaN or infinite"),
    "NaN as alpha": ({**PLAIN, f"{PROJ}.alpha": torch.tensor(math.nan)}, "alpha holds NaN"),
    "0 as alpha": ({**PLAIN, f"{PROJ}.alpha": torch.tensor(0.0)}, "alpha is 0: must be"),
    "many alphas": ({**PLAIN, f"{PROJ}.alpha": torch.ones(2)}, "alpha has 2 values of F32"),
    "a complex alpha": (
        {**PLAIN, f"{PROJ}.alpha": torch.ones((), dtype=torch.complex64)},
        "alpha has 1 values of C64: must be one number",
    ),
    "integers": ({**PLAIN, f"{PROJ}.lora_A.weight": LOW.down.int()}, "lora_A.weight is I32: must be one of F64"),
    "fp8": ({**PLAIN, f"{PROJ}.lora_A.weight": LOW.down.to(torch.float8_e4m3fn)}, r"is F8_E4M3 \(fp8\)"),
    "no tensors": ({}, "no adapters for the model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_plain_lora_is_named(case: str, tmp_path: Path) -> None:
    tensors, expected = OTHERS[case]
    save_file(tensors, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(UserError, match=expected) as caught:
            read_adapter(path)
        assert "\n" not in str(caught.value) and str(tmp_path / "a.safetensors") in str(caught.value)


ELSEWHERE: dict[str, tuple[dict[str, str], str]] = {
    "a block too many": (
        {"double_blocks.2.img_attn.proj": "", PROJ: ""},
        r"double_blocks\.2\.img_attn\.proj: the model",
    ),
    "a block too many, alone": (
        {"lora_unet_single_transformer_blocks_5_proj_out": ""},
        "blocks_5_proj_out: the model has",
    ),
    "another family": ({"lora_unet_blocks_0_self_attn_q": ""}, "the model has no such layer"),
    "another size": ({"lora_unet_txt_in": ""}, "lora_unet_txt_in is 64 -> 64, and would be 32 -> 64"),
    "a name that is nearly one": (
        {"lora_unet_double_blocks_0_img_attn_proi": ""},
        r"proi: the model has no such layer \(nearest: double_blocks_0_img_attn_proj\)",
    ),
    "a name that is nearly one of diffusers": (
        {"transformer.transformer_blocks.0.attn.to_out.1": ""},
        r"to_out\.1: the model has no such layer \(nearest: transformer_blocks\.0\.attn\.to_out\.0\)",
    ),
    "with dots and without": (
        {"double_blocks.0.img_attn.proj": "", "double_blocks_1_img_attn_proj": ""},
        "names of two forms in one file",
    ),
    "by the release's names and by those of diffusers": (
        {"a.double_blocks.0.img_attn.proj": "", "a.transformer_blocks.1.attn.to_out.0": ""},
        "names of two forms in one file",
    ),
    "two models": ({f"first.{PROJ}": "", f"second.{PROJ}": ""}, "layers of two models in one file"),
    "the same layer in two ways": (
        {f"a.{PROJ}": "", "a.transformer_blocks.0.attn.to_out.0": ""},
        "two adapters for the",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_adapters_for_other_layers_are_refused_by_name(case: str, tmp_path: Path) -> None:
    layers, expected = ELSEWHERE[case]
    path = one_file(tmp_path, dict.fromkeys(layers, LOW), ".lora_A.weight", ".lora_B.weight", str)
    with pytest.raises(UserError, match=expected) as caught:
        read_adapters(path, FLUX, "lora")
    assert "belong to another model" in str(caught.value) and str(caught.value).startswith(f"lora={path}: ")


def test_parts_for_text_encoders_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {f"lora_te1_x.{kind}.weight": MATRIX.clone() for kind in ("lora_down", "lora_up")}
    save_file({**PLAIN, **text, "text_encoder.y.dora_scale": MATRIX.clone()}, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path).layers == (PROJ,)
    said = capsys.readouterr().err
    assert "3 tensors are for text encoders" in said


def test_places_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no adapter_config\.json and no safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is pickled and not opened"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"is a file of torch\.save"):
        read_adapter(tmp_path / "adapter_model.bin")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(UserError, match="is a named pipe"):
            read_adapter(path)
    (tmp_path / "pipe.safetensors").unlink()
    for name in "ab":
        save_file(PLAIN, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 safetensors files, as a\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(UserError, match="not a description of adapters"):
        read_adapter(tmp_path)


# -- Names without dots --

TALL = {
    f"{name} {layout}": replace(cfg, fused_qkv=LAYOUTS[layout].fused_qkv)
    for layout in ("fused-half", "separate-half")
    for name, cfg in MODEL_SIZES["mmdit"].items()
} | {"without single blocks": replace(FLUX, depth_single_blocks=0)}


@pytest.mark.parametrize("case", TALL)
def test_every_layer_is_found_by_its_name_with_underscores(case: str) -> None:
    """Also where blocks have two digits: no two layers become the same name."""
    model = TALL[case]
    with torch.device("meta"):
        built = build_model(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    sizes = {n: (m.in_features, m.out_features) for n, m in built.named_modules() if isinstance(m, nn.Linear)}
    flat = {f"lora_unet_{name.replace('.', '_')}": size for name, size in sizes.items()}
    layout = FORMAT.layout(model)
    found = plan_adapter(flat, shapes, FORMAT, layout, layout.metadata()).pieces
    assert len(flat) == len(sizes) == len(found)
    for name, pieces in found.items():
        (piece,) = pieces if name in sizes and len(pieces) == 1 else (None,)
        if piece is not None:
            assert piece.layer == f"lora_unet_{name.replace('.', '_')}" and torch.equal(piece.places, piece.rows)
            assert torch.equal(piece.rows, torch.arange(sizes[name][1]))
        else:  # q, k and v in one: runs of the same layer
            assert {one.layer for one in pieces} == {f"lora_unet_{name.replace('.', '_')}"}
            assert torch.equal(torch.cat([one.rows for one in pieces]), torch.arange(sizes[name][1]))


def test_a_name_with_underscores_that_could_be_two_layers() -> None:
    known = ["blocks.0.k_img", "blocks.0.k.img", "blocks.0.q"]
    with pytest.raises(ValueError, match=r"could be blocks\.0\.k_img or blocks\.0\.k\.img; give a file with dots"):
        known_layers(["lora_unet_blocks_0_k_img"], known)
    found = {"lora_unet_blocks_0_q": "blocks.0.q"}
    assert known_layers(list(found), known) == ("lora_unet_", found)
    assert known_layers(["x.blocks.0.k_img"], known) == ("x.", {"x.blocks.0.k_img": "blocks.0.k_img"})


def test_other_names_of_a_layer_are_no_other_layers() -> None:
    known, aliases = (
        ["blocks.0.img_qkv", "blocks.0.fc1"],
        {"blocks.0.img.qkv": "blocks.0.img_qkv", "blocks.0.0": "blocks.0.fc1"},
    )
    for layer, name in (("img_qkv", "img_qkv"), ("img.qkv", "img_qkv"), ("0", "fc1"), ("fc1", "fc1")):
        found = {f"x.blocks.0.{layer}": f"blocks.0.{name}"}
        assert known_layers(list(found), known, aliases) == ("x.", found)
        flat = {f"lora_unet_blocks_0_{layer.replace('.', '_')}": f"blocks.0.{name}"}
        assert known_layers(list(flat), known, aliases) == ("lora_unet_", flat)


def test_parts_that_were_one_layer_share_its_rank_again(tmp_path: Path) -> None:
    """Of q, k and v with the same A one adapter is made, not three; what has another A is beside it."""
    lows = {f"double_blocks.0.img_attn.{x}_proj": draw_low((HIDDEN, HIDDEN), 2, 2.0, x) for x in "qkv"}
    q, k, _ = lows
    lows[k] = replace(lows[k], down=lows[q].down.clone(), alpha=6.0)
    fitted = read_adapters(prefixed("diffusion_model.")(lows, tmp_path), LAYOUTS["fused-half"], "lora").exported
    assert fitted is not None and fitted.sizes() == {"double_blocks.0.img_attn.qkv": (4, 1.0)}


def test_a_part_without_an_adapter_of_its_own_has_none_when_a_layer_is_cut(tmp_path: Path) -> None:
    """What one file has of q alone is in the other of q alone as well, with its rank."""
    name = "single_blocks.1.linear1"
    tensors = {f"{name}.lora_A.weight": torch.randn(5, HIDDEN), f"{name}.lora_B.weight": torch.zeros(3 * 64 + INNER, 5)}
    tensors[f"{name}.lora_B.weight"][:HIDDEN, :2] = 1.0
    tensors[f"{name}.lora_B.weight"][-1, 2] = 1.0
    model, shapes = FLUX, parameter_shapes(FLUX)
    source, to = FORMAT.layout(model), FORMAT.diffusers  # type: ignore[attr-defined]
    made = convert_adapter(trained_adapter(tensors, 1.0), shapes, FORMAT, source=source, to=to)
    ranks = {layer: made.matrices(layer)[0].shape[0] for layer in made.layers}
    block = "single_transformer_blocks.1"
    assert ranks == {f"{block}.attn.to_q": 4, f"{block}.attn.to_k": 2, f"{block}.attn.to_v": 2, f"{block}.proj_mlp": 3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_in_b_rounds_nothing_that_fp32_can_hold(dtype: torch.dtype) -> None:
    """Half precision stays where it can."""
    tensors = {name: tensor.to(dtype) for name, tensor in PLAIN.items()}
    for scale, fits in ((2.0, True), (0.7, dtype == torch.float32)):
        made = folded(trained_adapter(tensors, scale))
        b, wanted = made.tensors[f"{PROJ}.lora_B.weight"], LOW.up.to(dtype).double() * scale
        assert made.scales == {PROJ: 1.0} and b.dtype == (dtype if fits else torch.float32)
        assert (b.double() - wanted).abs().max() <= 2**-24 * wanted.abs().max()


# -- For ComfyUI --


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_for_comfyui_is_read_back_equal(layout: str, tmp_path: Path) -> None:
    """In the Flux layout, alpha/rank in B: computed here from the file alone, and on every layout of the model."""
    model = LAYOUTS[layout]
    rows = flux_rows() if model.fused_qkv else separate_rows()
    chosen = random.Random(layout).sample(sorted(rows), 20)
    shapes = linears(model)
    lows = {name: draw_low(shapes[name], 4, 6.0, layout, name).exact() for name in chosen}
    tensors = {f"{n}.{kind}": x for n, low in lows.items() for kind, x in ((lora.A, low.down), (lora.B, low.up))}
    made, source = trained_adapter(tensors, 1.5), FORMAT.layout(model)
    renamed = convert_adapter(made, parameter_shapes(model), FORMAT, source=source, to=FORMAT.original)
    (tmp_path / CONFIG).write_text("left by an export of another kind")
    write_adapter(tmp_path, renamed, "comfyui", metadata={"rope_layout": "interleaved"})
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]

    wanted = {name: weight.clone() for name, weight in flux_weights().items()}
    file = load_file(tmp_path / WEIGHTS)
    layers = {key.removesuffix(f".{lora.A}") for key in file if key.endswith(lora.A)}
    assert len(file) == 2 * len(layers)
    for layer in layers:
        a, b = (file[f"{layer}.{kind}"].double() for kind in (lora.A, lora.B))
        wanted[layer.removeprefix("diffusion_model.")] += 0.7 * b @ a
    truth = {name: weight.clone() for name, weight in in_layout(flux_weights(), model).items()}
    for name, low in lows.items():
        truth[name] += 0.7 * low.delta
    for other in LAYOUTS.values():
        found = merged(tmp_path, other, 0.7)
        for name, weight in in_layout(wanted, other).items():
            assert (found[name] - weight).abs().max() <= 1e-12, name
    for name, weight in in_layout(wanted, model).items():
        assert (weight - truth[name]).abs().max() <= 1e-12, name


def test_an_exported_file_keeps_its_alpha_without_its_folder(tmp_path: Path) -> None:
    write_adapter(tmp_path, trained_adapter(PLAIN, 1.5), "peft", metadata={})
    (tmp_path / CONFIG).unlink()
    assert list(read_adapter(tmp_path).scales.values()) == [1.5]
