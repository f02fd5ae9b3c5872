"""Files of HunyuanVideo: original names and those of diffusers, strictness, the way back, adapters, hub folders."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.conversion import convert_weights
from opensora.assembly.initial_weights import check_weights
from opensora.cli import convert
from opensora.models.families import build_model, count_parameters, family_of, hub_config, read_hub_config
from opensora.models.hunyuan_video import SIZES, HunyuanVideoConfig
from opensora.models.hunyuan_video.convert import DIFFUSERS, LAYOUTS, ORIGINAL, WEIGHTS
from opensora.models.hunyuan_video.hub import diffusers_config
from opensora.models.weights.adapter_fit import plan_adapter
from opensora.models.weights.reader import WeightFile, load_into
from opensora.models.weights.writer import convert_shapes, convert_state_dict, save_state_dict
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator

D, C, INNER, TEXT = 16, 3, 40, 10  # width, latent channels, inside MLPs, of a text token
SMALL = HunyuanVideoConfig(
    **{"in_channels": C, "hidden_size": D, "num_heads": 2, "mlp_ratio": 2.5, "depth": 2, "depth_single_blocks": 3},
    **{"axes_dim": (2, 2, 4), "context_in_dim": TEXT, "vec_in_dim": 14},  # type: ignore[arg-type]
)
CASES = {
    "small": SMALL,
    "no_guidance": replace(SMALL, guidance_embed=False, depth_refiner_blocks=1),
    "patches": replace(SMALL, patch_size=(2, 3, 3)),
}
LAYOUT = WEIGHTS.layout(SMALL)
# The original names, as the release has them: linear layers with weight and bias, then norms with a weight alone.
TOP = (
    *("img_in.proj", "txt_in.input_embedder", "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"),
    *(f"{name}.mlp.{i}" for name in ("txt_in.t_embedder", "time_in", "guidance_in") for i in (0, 2)),
    *("vector_in.in_layer", "vector_in.out_layer", "final_layer.linear", "final_layer.adaLN_modulation.1"),
)
REFINER = ("norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
STREAM = ("mod.linear", "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")
SINGLE = ("linear1", "linear2", "modulation.linear")


def ours(cfg: HunyuanVideoConfig = SMALL) -> dict[str, Tensor]:
    return {
        name: torch.randn(tensor.shape, generator=torch_generator("hunyuan files", name))
        for name, tensor in build_model(cfg).state_dict().items()
    }


def stored(layout: str, cfg: HunyuanVideoConfig = SMALL) -> dict[str, Tensor]:
    """As a file has them."""
    made = convert_state_dict(ours(cfg), WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout])
    return {name: tensor.clone().contiguous() for name, tensor in made.items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reference(cfg: HunyuanVideoConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.HunyuanVideoTransformer3DModel.from_config(diffusers_config(cfg))


@pytest.mark.parametrize("name", ["13b", "debug"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    cfg = SIZES[name]
    theirs = {n: tuple(x.shape) for n, x in reference(cfg).named_parameters()}
    with torch.device("meta"):
        held = {n: tuple(x.shape) for n, x in build_model(cfg).named_parameters()}
    layout = WEIGHTS.layout(cfg)
    assert convert_shapes(held, WEIGHTS, source=layout, to=DIFFUSERS) == theirs
    assert convert_shapes(theirs, WEIGHTS, source=DIFFUSERS, to=layout) == held
    assert name != "13b" or count_parameters(cfg) == 12_821_012_544


def test_original_names() -> None:
    linear = {
        *TOP,
        *(f"txt_in.individual_token_refiner.blocks.{i}.{name}" for i in range(2) for name in REFINER),
        *(f"double_blocks.{i}.{stream}_{name}" for i in range(2) for stream in ("img", "txt") for name in STREAM),
        *(f"single_blocks.{i}.{name}" for i in range(3) for name in SINGLE),
    }
    norms = {
        *(f"double_blocks.{i}.{stream}_attn_{n}_norm" for i in range(2) for stream in ("img", "txt") for n in "qk"),
        *(f"single_blocks.{i}.{n}_norm" for i in range(3) for n in "qk"),
    }
    state, published = ours(), stored("original")
    assert state.keys() == {f"{n}.{k}" for n in linear for k in ("weight", "bias")} | {f"{n}.weight" for n in norms}
    assert published.keys() == state.keys() and published["img_in.proj.weight"].shape == (D, C, 1, 2, 2)
    assert all(torch.equal(published[name].flatten(), state[name].flatten()) for name in state)


def test_what_diffusers_has_apart_and_in_another_order() -> None:
    state, theirs = ours(), stored("diffusers")
    for kind in ("weight", "bias"):
        img, txt = (state[f"double_blocks.1.{stream}_attn_qkv.{kind}"].split(D) for stream in ("img", "txt"))
        refined = state[f"txt_in.individual_token_refiner.blocks.1.self_attn_qkv.{kind}"].split(D)
        single = state[f"single_blocks.2.linear1.{kind}"].split((D, D, D, INNER))
        for i, part in enumerate("qkv"):
            assert torch.equal(theirs[f"transformer_blocks.1.attn.to_{part}.{kind}"], img[i])
            assert torch.equal(theirs[f"transformer_blocks.1.attn.add_{part}_proj.{kind}"], txt[i])
            assert torch.equal(theirs[f"single_transformer_blocks.2.attn.to_{part}.{kind}"], single[i])
            name = f"context_embedder.token_refiner.refiner_blocks.1.attn.to_{part}.{kind}"
            assert torch.equal(theirs[name], refined[i])
        assert torch.equal(theirs[f"single_transformer_blocks.2.proj_mlp.{kind}"], single[3])
        shift, scale = state[f"final_layer.adaLN_modulation.1.{kind}"].split(D)
        assert torch.equal(theirs[f"norm_out.linear.{kind}"], torch.cat((scale, shift)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_is_written_is_read(name: str, layout: str, shard_bytes: int | None, tmp_path: Path) -> None:
    """In one file or in shards with an index, with the metadata of a file and without it."""
    cfg, state = CASES[name], ours(CASES[name])
    target = tmp_path / "model.safetensors" if shard_bytes is None else tmp_path / "shards"
    more: dict[str, Any] = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    written = save_state_dict(state, target, WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout], **more)
    assert (len(written) > 3) == (shard_bytes is not None)
    files = [file for file in written if file.suffix == ".safetensors"]
    save_file({n: x for file in files for n, x in load_file(file).items()}, tmp_path / "bare.safetensors")
    for path in (target, tmp_path / "bare.safetensors"):
        model = build_model(cfg)
        report = load_into(model, path, WEIGHTS, to=WEIGHTS.layout(cfg))
        assert report.fits and equal(model.state_dict(), state) and report.layout.diffusers == (layout == "diffusers")
        for to in LAYOUTS.values():
            wanted = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=to)
            assert equal(dict(WeightFile(path, WEIGHTS, to)), wanted)


def test_files_of_the_first_release(tmp_path: Path) -> None:
    """Those of torch.save, with the weights under ``module``."""
    torch.save({"module": stored("original"), "step": 3}, tmp_path / "mp_rank_00_model_states.pt")
    for path in (tmp_path, tmp_path / "mp_rank_00_model_states.pt"):
        model = build_model(SMALL)
        load_into(model, path, WEIGHTS, to=LAYOUT)
        assert equal(model.state_dict(), ours())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "transformer.", "module._orig_mod."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_other_tools(prefix: str, layout: str, tmp_path: Path) -> None:
    beside = {"vae.decoder.weight": torch.ones(1), "text_encoders.llama.transformer.w": torch.ones(1)}
    save_file({f"{prefix}{n}": x for n, x in stored(layout).items()} | beside, tmp_path / "m.safetensors")
    model = build_model(SMALL)
    report = load_into(model, tmp_path / "m.safetensors", WEIGHTS, to=LAYOUT)
    assert equal(model.state_dict(), ours()) and report.layout == LAYOUTS[layout]
    assert report.prefix == prefix.replace("_orig_mod.", "") and len(report.left_out) == 2


# (pattern, what ComfyUI calls it), in the order in which it renames.
COMFYUI = (
    *((r"(txt_in\.t_embedder|time_in|guidance_in)\.mlp\.0", r"\1.in_layer"),),
    *((r"(txt_in\.t_embedder|time_in|guidance_in)\.mlp\.2", r"\1.out_layer"),),
    *((r"c_embedder\.linear_1", "c_embedder.in_layer"), (r"c_embedder\.linear_2", "c_embedder.out_layer")),
    *((r"_mod\.linear", "_mod.lin"), (r"_attn_qkv", "_attn.qkv"), (r"_attn_proj", "_attn.proj")),
    *((r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.2"), (r"\.modulation\.linear", ".modulation.lin")),
    *((r"_attn_q_norm\.weight", "_attn.norm.query_norm.scale"), (r"\.q_norm\.weight", ".norm.query_norm.scale")),
    *((r"_attn_k_norm\.weight", "_attn.norm.key_norm.scale"), (r"\.k_norm\.weight", ".norm.key_norm.scale")),
)


def of_comfyui(name: str) -> str:
    for pattern, theirs in COMFYUI:
        name = re.sub(pattern, theirs, name)
    return name


@pytest.mark.parametrize("name", CASES)
def test_files_of_comfyui(name: str, tmp_path: Path) -> None:
    """Behind model.model., under the names of its layers; with one name in both ways it fits nothing."""
    cfg = CASES[name]
    tensors = {f"model.model.{of_comfyui(n)}": tensor for n, tensor in stored("original", cfg).items()}
    assert "model.model.double_blocks.0.img_attn.norm.query_norm.scale" in tensors
    save_file(tensors, tmp_path / "a.safetensors")
    built = build_model(cfg)
    assert load_into(built, tmp_path / "a.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg)).prefix == "model.model."
    assert equal(built.state_dict(), ours(cfg))
    twice = "model.model.double_blocks.0.img_attn_qkv.weight"
    save_file(tensors | {twice: torch.zeros(3 * D, D)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="1 unexpected"):
        load_into(built, tmp_path / "a.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg))


def test_adapters_by_the_names_of_comfyui() -> None:
    shapes = {n: tuple(tensor.shape) for n, tensor in ours().items()}
    layers = {
        n.removesuffix(".weight"): shape[::-1] for n, shape in shapes.items() if len(shape) == 2 and "weight" in n
    }
    for prefix, flat in (("diffusion_model.", False), ("lora_unet_", True)):
        called = {of_comfyui(f"{layer}.")[:-1]: layer for layer in layers}
        found = {prefix + (theirs.replace(".", "_") if flat else theirs): layers[n] for theirs, n in called.items()}
        plan = plan_adapter(found, shapes, WEIGHTS, LAYOUT, {})
        assert plan.pieces.keys() == layers.keys() and plan.prefix == prefix
        for theirs, layer in called.items():
            (piece,) = plan.pieces[layer]
            assert piece.layer == prefix + (theirs.replace(".", "_") if flat else theirs)


def test_our_own_order_is_stated(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_state_dict(ours(), file, WEIGHTS, source=LAYOUT)
    assert equal(load_file(file), ours()) and WeightFile(file, WEIGHTS).layout == LAYOUT
    assert equal(dict(WeightFile(file, WEIGHTS, ORIGINAL)), stored("original"))
    assert equal(dict(WeightFile(file, WEIGHTS, DIFFUSERS)), stored("diffusers"))
    save_file(ours(), file, {"patch": "1,2,2,3"})
    with pytest.raises(UserError, match=r"patch=1,2,2,3 in the file's metadata: must be three sizes"):
        WeightFile(file, WEIGHTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_read_without_the_rest(layout: str, tmp_path: Path) -> None:
    """Rows and columns of every tensor, as processes that hold a piece ask for them."""
    save_file(stored(layout), tmp_path / "m.safetensors")
    file = WeightFile(tmp_path / "m.safetensors", WEIGHTS, LAYOUT)
    for name, whole in ours().items():
        start = tuple(size // 3 for size in whole.shape)
        part = torch.zeros([size - at - (size > 2) for size, at in zip(whole.shape, start, strict=True)])
        assert file.read_part(name, start, part)
        at = tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))
        assert torch.equal(part, whole[at]), name


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        ("original", lambda s: s.pop("img_in.proj.bias"), r"1 missing: img_in\.proj\.bias"),
        ("diffusers", lambda s: s.pop("x_embedder.proj.bias"), r"1 missing: img_in\.proj\.bias"),
        (
            "diffusers",
            lambda s: s.pop("single_transformer_blocks.1.proj_mlp.weight"),
            r"1 missing: single_blocks\.1\.linear1\.weight; 3 unexpected: single_transformer_blocks\.1\.attn\.to_k",
        ),
        (
            "original",
            lambda s: s.update({"double_blocks.2.odd": torch.ones(D)}),
            r"1 unexpected: double_blocks\.2\.odd",
        ),
        ("diffusers", lambda s: s.update({"norm_out.odd.weight": torch.ones(D)}), r"1 unexpected: norm_out\.odd"),
        ("diffusers", lambda s: s.update({"img_in.proj.bias": torch.ones(D)}), r"1 unexpected: img_in\.proj\.bias"),
        ("original", lambda s: s.update({"img_in.proj.bias": torch.ones(D - 1)}), r"bias \(15,\), \(16,\)"),
        ("original", lambda s: s.update({"img_in.proj.weight": torch.ones(D, C, 1, 2, 3)}), r"weight \(16, 18\)"),
        (
            "diffusers",
            lambda s: s.update({"transformer_blocks.0.attn.to_k.weight": torch.ones(D - 2, D)}),
            r"double_blocks\.0\.img_attn_qkv\.weight \(46, 16\), \(48, 16\)",
        ),
    ],
)
def test_files_that_do_not_fit(
    layout: str, change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path
) -> None:
    state = stored(layout)
    change(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        load_into(build_model(SMALL), tmp_path / "m.safetensors", WEIGHTS, to=LAYOUT)
    assert "choose the model size of this file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_guidance_and_none_are_two_models(layout: str, tmp_path: Path) -> None:
    none = replace(SMALL, guidance_embed=False)
    for of, into, said in ((SMALL, none, r"4 unexpected: guidance_in"), (none, SMALL, r"4 missing: guidance_in")):
        save_file(stored(layout, of), tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=said):
            load_into(build_model(into), tmp_path / "m.safetensors", WEIGHTS, to=LAYOUT)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (
            {
                "diffusion_model.double_blocks.1.img_attn_qkv": (D, 3 * D),
                "diffusion_model.single_blocks.0.linear1": (D, 3 * D + INNER),
            },
            {"double_blocks.1.img_attn_qkv": range(3 * D), "single_blocks.0.linear1": range(3 * D + INNER)},
        ),
        (
            {
                "transformer.transformer_blocks.1.attn.to_k": (D, D),
                "transformer.transformer_blocks.1.attn.to_q": (D, D),
            },
            {"double_blocks.1.img_attn_qkv": [*range(D, 2 * D), *range(D)]},
        ),
        (
            {"transformer.single_transformer_blocks.0.proj_mlp": (D, INNER)},
            {"single_blocks.0.linear1": range(3 * D, 3 * D + INNER)},
        ),
        (
            {"lora_unet_double_blocks_1_txt_attn_proj": (D, D), "lora_unet_single_blocks_0_linear2": (D + INNER, D)},
            {"double_blocks.1.txt_attn_proj": range(D), "single_blocks.0.linear2": range(D)},
        ),
        (
            {"transformer.norm_out.linear": (D, 2 * D)},
            {"final_layer.adaLN_modulation.1": [*range(D, 2 * D), *range(D)]},
        ),
    ],
)
def test_layers_that_adapters_are_for(layers: dict[str, tuple[int, int]], wanted: Mapping[str, Any]) -> None:
    """Under every name, fused or apart, also where only some parts of attention are adapted."""
    shapes = {n: tuple(x.shape) for n, x in ours().items()}
    plan = plan_adapter(layers, shapes, WEIGHTS, LAYOUT, {})
    found = {
        name: [place for piece in pieces for place in piece.places.tolist()] for name, pieces in plan.pieces.items()
    }
    assert found == {name: list(places) for name, places in wanted.items()}


# --- folders of the hub ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_hub_folders_of_diffusers(name: str, sharded: bool, tmp_path: Path) -> None:
    """Written by that library, config.json and weights, and read without being told anything."""
    diffusers, cfg = pytest.importorskip("diffusers"), CASES[name]
    theirs = diffusers.HunyuanVideoTransformer3DModel.from_config(diffusers_config(cfg))
    theirs.load_state_dict(stored("diffusers", cfg), strict=True)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "10GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > (3 if sharded else 0)
    found: Any = read_hub_config(tmp_path)
    assert found == cfg
    model = build_model(found)
    load_into(model, tmp_path, WEIGHTS, to=family_of(found).weights.layout(found))
    assert equal(model.state_dict(), ours(cfg))


def test_the_published_configuration_is_the_published_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(reference(SIZES["13b"]).config)))
    assert read_hub_config(tmp_path) == SIZES["13b"] == HunyuanVideoConfig()
    (tmp_path / "config.json").write_text('{"_class_name": "HunyuanVideoTransformer3DModel"}')
    assert read_hub_config(tmp_path) == SIZES["13b"]
    assert hub_config(SIZES["13b"]) is None  # the original names are exported, whose release has none


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_condition_type": "latent_concat"}, r"image_condition_type=latent_concat: must be null"),
        ({"qk_norm": "layer_norm"}, r"qk_norm=layer_norm: must be rms_norm"),
        ({"in_channels": 33}, r"out_channels=16: must be in_channels=33"),
        ({"num_layers": "many"}, r"num_layers=many: must be an integer"),
        ({"num_layers": True}, r"num_layers=True: must be an integer"),
        ({"mlp_ratio": float("nan")}, r"mlp_ratio=nan: must be a number"),
        ({"rope_theta": 256.5}, r"rope_theta=256.5: must be a whole number"),
        ({"rope_axes_dim": [16, 56]}, r"rope_axes_dim=\[16, 56\]: must be three integers"),
        ({"guidance_embeds": 1}, r"guidance_embeds=1: must be true or false"),
        ({"num_attention_heads": 0}, r"hidden_size=0: must be an integer >= 1"),
    ],
)
def test_hub_configurations_that_cannot_be_built(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "HunyuanVideoTransformer3DModel"} | changes))
    with pytest.raises(UserError, match=said) as caught:
        read_hub_config(tmp_path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_writes_what_diffusers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    save_file(stored("original"), tmp_path / "m.safetensors")
    shape = {"in_channels": C, "hidden_size": D, "num_heads": 2, "mlp_ratio": 2.5, "depth": 2, "depth_single_blocks": 3}
    shape |= {"context_in_dim": TEXT, "vec_in_dim": 14}
    keys = ["model.kind=hunyuan_video", "model.axes_dim=[2,2,4]", *(f"model.{n}={value}" for n, value in shape.items())]
    target = tmp_path / "theirs"
    assert convert.main([str(tmp_path / "m.safetensors"), "--to", str(target), "--names=diffusers", *keys]) == 0
    assert "config.json" in capsys.readouterr().out and read_hub_config(target) == SMALL
    theirs, said = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(target, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert equal(theirs.state_dict(), stored("diffusers"))


@pytest.mark.parametrize("image_condition_type", ["token_replace", "latent_concat"])
def test_weights_that_go_on_from_a_picture_are_not_taken_for_others(image_condition_type: str, tmp_path: Path) -> None:
    """Their names and shapes may be the same; the config.json beside them tells."""
    save_file(stored("diffusers"), tmp_path / "diffusion_pytorch_model.safetensors")
    said = diffusers_config(SMALL)
    (tmp_path / "config.json").write_text(json.dumps(said))
    check_weights("weights", tmp_path, SMALL)
    with pytest.raises(UserError, match=r"says theta=256, and model.theta is 10000; set model.theta=256"):
        check_weights("weights", tmp_path, replace(SMALL, theta=10000))
    (tmp_path / "config.json").write_text(json.dumps(said | {"image_condition_type": image_condition_type}))
    with pytest.raises(UserError, match=rf"^weights=.*image_condition_type={image_condition_type}: must be null"):
        check_weights("weights", tmp_path, SMALL)


def test_patches_that_diffusers_has_no_key_for_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(SMALL, patch_size=(1, 2, 3))
    save_file(stored("original", cfg), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"--names=diffusers: model.patch_size=\(1, 2, 3\): must be as wide"):
        convert_weights(cfg, tmp_path / "a.safetensors", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
