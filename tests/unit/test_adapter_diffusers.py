"""LoRA files between us and diffusers and peft: what one writes the other reads, and computes the same with.

The models are small and random. Of single blocks diffusers takes it for granted that they are 3072 channels wide, where
a file has their fused layers: those are compared without a model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from acceleration import lora
from acceleration.config import LoraConfig
from opensora.assembly.adapter_files import fitted_adapters
from opensora.assembly.initial_weights import parameter_shapes
from opensora.models.base import ModelConfig
from opensora.models.families import MODEL_SIZES, build_model, family_of
from opensora.models.weights.adapter_export import export_adapter, trained_adapter
from opensora.models.weights.adapters import Adapter
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.rng import torch_generator
from tests.unit import test_hunyuan_video_diffusers_parity as hunyuan
from tests.unit import test_mmdit_flux_parity as flux
from tests.unit import test_wan_diffusers_parity as wan
from tests.unit.test_mmdit import inputs

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")

FLUX = replace(MODEL_SIZES["mmdit"]["debug"], cond_embed=False, guidance_embed=True)
MODELS: dict[str, ModelConfig] = {
    "mmdit": FLUX,
    "hunyuan_video": hunyuan.CASES["guidance"],
    "wan": wan.CASES["t2v"],
    "wan_i2v": wan.CASES["i2v_picture"],
}
MIXINS = {
    "mmdit": loaders.FluxLoraLoaderMixin,
    "hunyuan_video": loaders.HunyuanVideoLoraLoaderMixin,
    "wan": loaders.WanLoraLoaderMixin,
}
SCALE = 1.5


def ours_and_theirs(case: str) -> tuple[nn.Module, Any]:
    """The same weights in both."""
    cfg = MODELS[case]
    ours = build_model(cfg).requires_grad_(False)
    module: Any = {"mmdit": flux, "hunyuan_video": hunyuan}.get(cfg.kind, wan)
    theirs = flux.flux_like(cfg) if module is flux else module.reference(cfg)  # type: ignore[arg-type]
    for name, parameter in ours.named_parameters():
        draw = torch.randn(parameter.shape, generator=torch_generator("both", name))
        is_norm = "norm" in name and name.endswith(("weight", "scale")) and parameter.ndim == 1
        parameter.copy_(0.12 * draw + (1.0 if is_norm else 0.0))
    theirs.load_state_dict(as_theirs(cfg, ours.state_dict()), strict=True)
    return ours, theirs.requires_grad_(False)


def as_theirs(cfg: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    format: Any = family_of(cfg).weights
    return convert_state_dict(state, format, source=format.layout(cfg), to=format.diffusers)


def outputs(case: str, ours: nn.Module, theirs: Any) -> tuple[Tensor, Tensor]:
    cfg = MODELS[case]
    if cfg.kind == "hunyuan_video":
        both = hunyuan.Given(cfg, torch.float32)  # type: ignore[arg-type]
        return both.ours(ours), both.theirs(theirs)
    if cfg.kind == "wan":
        given = wan.Given("t2v" if case == "wan" else "i2v_picture", torch.float32)
        return given.ours(ours), given.theirs(theirs)
    told = inputs(cfg)  # type: ignore[arg-type]
    found = theirs(
        hidden_states=told["img"],
        encoder_hidden_states=told["txt"],
        pooled_projections=told["y_vec"],
        timestep=told["timesteps"],
        img_ids=told["img_ids"][0],
        txt_ids=told["txt_ids"][0],
        guidance=told["guidance"],
        return_dict=False,
    )[0]
    return ours(**told), found


def drawn(model: nn.Module, patterns: tuple[str, ...], rank: int = 4) -> Adapter:
    """Adapters of ours, whose B has so few digits that alpha/rank rounds none of them away."""
    with torch.device("meta"):
        names = lora.apply(build_model(model.cfg), LoraConfig(rank=rank, targets=patterns))  # type: ignore[arg-type]
    tensors = {}
    for name in names:
        layer, generator = model.get_submodule(name), torch_generator("low", name)
        assert isinstance(layer, nn.Linear)
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, layer.in_features, generator=generator)
        b = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
        tensors[f"{name}.lora_B.weight"] = b.bfloat16().float()
    return trained_adapter(tensors, SCALE)


def merge(model: nn.Module, adapter: Adapter) -> None:
    for layer, scale in adapter.scales.items():
        a, b = adapter.matrices(layer)
        model.get_submodule(layer).weight.add_(scale * b @ a)  # type: ignore[union-attr, operator]


def export(place: Path, cfg: ModelConfig, adapter: Adapter, form: str) -> Path:
    format, shapes = family_of(cfg).weights, parameter_shapes(cfg)
    layout = format.layout(cfg)
    return export_adapter(place, adapter, form, shapes=shapes, format=format, layout=layout, metadata={})


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max()).item()


# family and form -> layers whose adapters diffusers reads of such a file; all of them: the last of these rows
OF_BLOCKS = ("blocks.*.self_attn.*", "blocks.*.cross_attn.*", "blocks.*.ffn.*")
WITHOUT_PATCHES = (*OF_BLOCKS, "head.head", "time_projection.*", "text_embedding.*", "time_embedding.*")
DOUBLE = ("double_blocks.*.img_attn_*", "double_blocks.*.txt_attn_*", "double_blocks.*.*_mlp.*")
REFINER = tuple(f"txt_in.individual_token_refiner.blocks.*.{x}" for x in ("*", "mlp.*", "adaLN_modulation.1"))
READ: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "wan, comfyui": ("wan", "comfyui", WITHOUT_PATCHES),
    "wan, comfyui, some of q, k, v, o": ("wan", "comfyui", ("blocks.*.self_attn.q", "blocks.0.cross_attn.v")),
    "wan, kohya": ("wan", "kohya", OF_BLOCKS),
    "wan, diffusers": ("wan", "diffusers", ("patch_embedding", *WITHOUT_PATCHES)),
    "wan_i2v, comfyui": ("wan_i2v", "comfyui", (*WITHOUT_PATCHES, "img_emb.proj.*")),
    "wan_i2v, kohya": ("wan_i2v", "kohya", OF_BLOCKS),
    "wan_i2v, diffusers": ("wan_i2v", "diffusers", ("patch_embedding", *WITHOUT_PATCHES, "img_emb.proj.*")),
    "hunyuan_video, comfyui": (
        *("hunyuan_video", "comfyui"),
        (*DOUBLE, "double_blocks.*.*_mod.linear", "single_blocks.*.linear2", "single_blocks.*.modulation.linear"),
    ),
    "hunyuan_video, diffusers": (
        *("hunyuan_video", "diffusers"),
        (*DOUBLE, "single_blocks.*.*", "final_layer.adaLN_modulation.1", *REFINER),
    ),
    "mmdit, kohya": (
        *("mmdit", "kohya"),
        ("double_blocks.*.*_attn.*", "double_blocks.*.*_mlp.*", "double_blocks.*.*_mod.lin", "single_blocks.*.linear2"),
    ),
    "mmdit, diffusers": (
        *("mmdit", "diffusers"),
        ("double_blocks.*.*_attn.*", "double_blocks.*.*_mlp.*", "single_blocks.*.*", "final_layer.adaLN_modulation.1"),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_diffusers_reads_what_we_write(case: str, tmp_path: Path) -> None:
    """Weights that it merges and outputs before that, against ours with the formula added."""
    name, form, patterns = READ[case]
    cfg, (ours, theirs) = MODELS[name], ours_and_theirs(name)
    before = outputs(name, ours, theirs)[0]
    adapter = drawn(ours, patterns)
    file = export(tmp_path / "lora.safetensors", cfg, adapter, form)
    mixin: Any = MIXINS[cfg.kind]
    state = mixin.lora_state_dict(str(file))
    more = {"network_alphas": None} if cfg.kind == "mmdit" else {}
    mixin.load_lora_into_transformer(state, transformer=theirs, **more)
    merge(ours, adapter)
    found, truth = outputs(name, ours, theirs)
    assert relative(found, truth) <= 1e-5 and relative(before, truth) > 0.01
    theirs.fuse_lora()
    weights = {key.replace(".base_layer.", "."): x for key, x in theirs.state_dict().items() if ".lora_" not in key}
    wanted = as_theirs(cfg, ours.state_dict())
    assert weights.keys() == wanted.keys()
    assert all((weights[key] - tensor).abs().max() <= 1e-6 for key, tensor in wanted.items())


WIDE: dict[str, tuple[ModelConfig, str]] = {
    "mmdit": (replace(MODEL_SIZES["mmdit"]["11b"], depth=1, depth_single_blocks=1, fused_qkv=True), "kohya"),
    "hunyuan_video": (replace(MODEL_SIZES["hunyuan_video"]["13b"], depth=1, depth_single_blocks=1), "comfyui"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_diffusers_cuts_fused_layers_of_single_blocks_as_we_do(kind: str, tmp_path: Path) -> None:
    """HunyuanVideo's names it knows by those of a double block."""
    cfg, form = WIDE[kind]
    draw, tensors = torch_generator(kind), {}
    for layer in ("single_blocks.0.linear1", f"double_blocks.0.img_attn{'.' if kind == 'mmdit' else '_'}qkv"):
        height, width = parameter_shapes(cfg)[f"{layer}.weight"]
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, width, generator=draw)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(height, 2, generator=draw).bfloat16().float()
    made = trained_adapter(tensors, SCALE)
    files = {name: export(tmp_path / f"{name}.safetensors", cfg, made, name) for name in (form, "diffusers")}
    theirs, ours = MIXINS[kind].lora_state_dict(str(files[form])), load_file(files["diffusers"])
    assert theirs.keys() == ours.keys() and len(ours) == 14
    x = torch.randn(3, 3072, generator=draw)
    for layer in {key.rpartition(".lora_")[0] for key in ours}:
        parts = [x @ state[f"{layer}.lora_A.weight"].T @ state[f"{layer}.lora_B.weight"].T for state in (theirs, ours)]
        assert relative(*parts) <= 1e-5, layer


TARGETS = {
    "mmdit": (["to_q", "add_v_proj", "proj_mlp", "linear_1"], {"to_q": 2}),
    "hunyuan_video": (["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out"], {"to_q": 2}),
    "wan": (["to_q", "to_out.0", "net.2", "proj_out"], {"to_q": 2}),
}


@pytest.mark.parametrize("with_pipeline", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_we_read_what_diffusers_writes(kind: str, with_pipeline: bool, tmp_path: Path) -> None:
    """By a model's save_lora_adapter, and by a pipeline's save_lora_weights; some of q, k and v, two ranks."""
    cfg, (ours, theirs) = MODELS[kind], ours_and_theirs(kind)
    names, ranks = TARGETS[kind]
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, rank_pattern=ranks))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch_generator("theirs", name))
    if with_pipeline:
        collect = pytest.importorskip("diffusers.training_utils")._collate_lora_metadata
        layers = peft.get_peft_model_state_dict(theirs)
        MIXINS[kind].save_lora_weights(tmp_path, transformer_lora_layers=layers, **collect({"transformer": theirs}))
    else:
        theirs.save_lora_adapter(tmp_path)
    merge(ours, fitted_adapters(tmp_path, cfg, "lora").plain())
    found, truth = outputs(kind, ours, theirs)
    theirs.disable_adapters()
    assert relative(found, truth) <= 1e-5 and relative(outputs(kind, ours, theirs)[1], truth) > 0.01


@pytest.mark.parametrize("case", ["hunyuan_video", "wan_i2v"])
def test_peft_and_we_read_each_others_folders(case: str, tmp_path: Path) -> None:
    """Folders with ranks and alphas by pattern, of adapters of our model."""
    cfg, (ours, theirs) = MODELS[case], ours_and_theirs(case)
    modules = ["linear1", "img_attn_qkv"] if case == "hunyuan_video" else ["q", "k_img", "ffn.0"]
    patterns = {modules[0]: 2}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, rank_pattern=patterns, alpha_pattern={modules[0]: 5}
    )
    wrapped = peft.get_peft_model(ours, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch_generator("peft", name))
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    truth = outputs(case, wrapped, theirs)[0]
    found = fitted_adapters(tmp_path / "theirs", cfg, "lora").plain()
    assert {(found.matrices(layer)[0].shape[0], scale) for layer, scale in found.scales.items()} == {(2, 2.5), (4, 1.5)}
    export(tmp_path / "ours", cfg, found, "peft")
    again = peft.PeftModel.from_pretrained(ours_and_theirs(case)[0], str(tmp_path / "ours"))
    assert relative(outputs(case, again, theirs)[0], truth) <= 1e-5
    plain = ours_and_theirs(case)[0]
    assert relative(outputs(case, plain, theirs)[0], truth) > 0.01
    merge(plain, found)
    assert relative(outputs(case, plain, theirs)[0], truth) <= 1e-5
