"""Files of Wan: original names and those of diffusers, real sizes, strictness, the way back, folders of the hub."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.conversion import convert_weights
from opensora.assembly.initial_weights import check_weights
from opensora.cli import convert
from opensora.models.families import (
    build_model,
    count_parameters,
    family_of,
    hub_config,
    other_encoders,
    read_hub_config,
)
from opensora.models.text.bytes import ByteTextConfig
from opensora.models.text.t5 import T5Config
from opensora.models.text.umt5 import UMT5Config
from opensora.models.vae.dct import DCTConfig
from opensora.models.vae.hunyuan import HunyuanConfig
from opensora.models.vae.wan import WanVAEConfig
from opensora.models.wan import SIZES, WanConfig
from opensora.models.wan.convert import DIFFUSERS, LAYOUTS, ORIGINAL, WEIGHTS, to_diffusers
from opensora.models.wan.hub import diffusers_config
from opensora.models.weights.adapter_fit import plan_adapter
from opensora.models.weights.reader import WeightFile, load_into
from opensora.models.weights.writer import convert_shapes, convert_state_dict, save_state_dict
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator

PARAMETERS = {  # of the published classes
    "t2v_1_3b": 1_418_996_800,
    "t2v_14b": 14_288_491_584,
    "i2v_14b": 16_394_878_784,
    "t2v_a14b": 14_288_491_584,
    "i2v_a14b": 14_288_901_184,
    "ti2v_5b": 4_999_787_712,
}
D, C, E, T = 24, 3, 10, 14  # width, latent channels, of a picture's token, of a text token
_SMALL: dict[str, Any] = {
    **{"in_channels": C, "hidden_size": D, "num_heads": 2, "depth": 3, "ffn_dim": 40, "text_dim": T}
}
SMALL = {
    "t2v": WanConfig(**_SMALL),
    "i2v": WanConfig(**_SMALL, references="clip"),
    "picture": WanConfig(**_SMALL, references="clip", image_dim=E),
    "in_place": WanConfig(**_SMALL, references="in_place"),
    "patches_of_two_frames": WanConfig(**_SMALL, patch_size=(2, 1, 3)),
}
# The original names, as the release has them: of the model, of each block, and what pictures add to both.
TOP = (
    *("patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias", "head.modulation"),
    *(
        f"{name}.{i}.{kind}"
        for name in ("text_embedding", "time_embedding")
        for i in (0, 2)
        for kind in ("weight", "bias")
    ),
    *("time_projection.1.weight", "time_projection.1.bias"),
)
BLOCK = (
    *(f"{a}.{n}.{kind}" for a in ("self_attn", "cross_attn") for n in "qkvo" for kind in ("weight", "bias")),
    *(f"{a}.norm_{n}.weight" for a in ("self_attn", "cross_attn") for n in "qk"),
    *("norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias", "modulation"),
)
PICTURE_TOP = tuple(f"img_emb.proj.{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("weight", "bias"))
PICTURE_BLOCK = (
    *(f"cross_attn.{n}_img.{kind}" for n in "kv" for kind in ("weight", "bias")),
    "cross_attn.norm_k_img.weight",
)


def ours(cfg: WanConfig) -> dict[str, Tensor]:
    return {
        name: torch.randn(tensor.shape, generator=torch_generator("wan files", name))
        for name, tensor in build_model(cfg).state_dict().items()
    }


def original(cfg: WanConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truth: our weights as the release has them."""
    pt, ph, pw = cfg.patch_size
    made = dict(state)
    made["patch_embedding.weight"] = made["patch_embedding.weight"].reshape(D, -1, pt, ph, pw)
    for kind in ("weight", "bias"):
        name = f"head.head.{kind}"
        made[name] = rearrange(made[name], "(c t h w) ... -> (t h w c) ...", c=C, t=pt, h=ph, w=pw)
    return {name: tensor.clone().contiguous() for name, tensor in made.items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reference(cfg: WanConfig) -> Any:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.WanTransformer3DModel.from_config(diffusers_config(cfg))


@pytest.mark.parametrize("name", [*PARAMETERS, *SMALL])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    cfg = SIZES[name] if name in PARAMETERS else SMALL[name]
    theirs = {n: tuple(x.shape) for n, x in reference(cfg).named_parameters()}
    with torch.device("meta"):
        held = {n: tuple(x.shape) for n, x in build_model(cfg).named_parameters()}
    layout = WEIGHTS.layout(cfg)
    assert convert_shapes(held, WEIGHTS, source=layout, to=DIFFUSERS) == theirs
    assert convert_shapes(theirs, WEIGHTS, source=DIFFUSERS, to=layout) == held
    assert count_parameters(cfg) == PARAMETERS.get(name, count_parameters(cfg))


@pytest.mark.parametrize("name", SMALL)
def test_original_names(name: str) -> None:
    cfg, reads = SMALL[name], SMALL[name].image_dim > 0
    state = ours(cfg)
    block = (*BLOCK, *(PICTURE_BLOCK if reads else ()))
    wanted = {*TOP, *(PICTURE_TOP if reads else ()), *(f"blocks.{i}.{n}" for i in range(3) for n in block)}
    assert state.keys() == wanted
    published = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=ORIGINAL)
    assert equal(published, original(cfg, state))
    assert published["patch_embedding.weight"].shape == (D, C + (4 + C) * (cfg.references == "clip"), *cfg.patch_size)


def test_the_norm_of_attention_to_the_text_changes_its_number() -> None:
    state = ours(SMALL["picture"])
    theirs = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(SMALL["picture"]), to=DIFFUSERS)
    pairs = {
        "blocks.1.norm3.weight": "blocks.1.norm2.weight",
        "blocks.1.modulation": "blocks.1.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "blocks.2.cross_attn.k_img.bias": "blocks.2.attn2.add_k_proj.bias",
        "blocks.2.cross_attn.norm_k_img.weight": "blocks.2.attn2.norm_added_k.weight",
        "blocks.0.self_attn.o.weight": "blocks.0.attn1.to_out.0.weight",
        "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    }
    assert all(torch.equal(state[here], theirs[there]) for here, there in pairs.items())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_is_written_is_read(name: str, layout: str, shard_bytes: int | None, tmp_path: Path) -> None:
    """In one file or in shards with an index, with the metadata of a file and without it."""
    cfg, state = SMALL[name], ours(SMALL[name])
    target = tmp_path / "model.safetensors" if shard_bytes is None else tmp_path / "shards"
    more: dict[str, Any] = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    written = save_state_dict(state, target, WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout], **more)
    assert (len(written) > 3) == (shard_bytes is not None)
    files = [file for file in written if file.suffix == ".safetensors"]
    stored = {n: tensor for file in files for n, tensor in load_file(file).items()}
    if layout == "original":
        assert equal(stored, original(cfg, state))
    save_file(stored, tmp_path / "bare.safetensors")
    for path in (target, tmp_path / "bare.safetensors"):
        model = build_model(cfg)
        report = load_into(model, path, WEIGHTS, to=WEIGHTS.layout(cfg))
        assert report.fits and equal(model.state_dict(), state)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "module._orig_mod."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_other_tools(prefix: str, layout: str, tmp_path: Path) -> None:
    cfg, state = SMALL["picture"], ours(SMALL["picture"])
    stored = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout])
    stored = {n: tensor.contiguous() for n, tensor in stored.items()}
    beside = {"vae.decoder.weight": torch.ones(1), "text_encoders.umt5xxl.transformer.w": torch.ones(1)}
    save_file({f"{prefix}{n}": tensor for n, tensor in stored.items()} | beside, tmp_path / "m.safetensors")
    model = build_model(cfg)
    report = load_into(model, tmp_path / "m.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg))
    assert equal(model.state_dict(), state) and report.layout == LAYOUTS[layout]
    assert report.prefix == prefix.replace("_orig_mod.", "") and len(report.left_out) == 2


def test_our_own_order_is_stated(tmp_path: Path) -> None:
    cfg, state = SMALL["patches_of_two_frames"], ours(SMALL["patches_of_two_frames"])
    file, layout = tmp_path / "m.safetensors", WEIGHTS.layout(SMALL["patches_of_two_frames"])
    save_state_dict(state, file, WEIGHTS, source=layout)
    assert equal(load_file(file), state) and WeightFile(file, WEIGHTS).layout == layout
    assert equal(dict(WeightFile(file, WEIGHTS, ORIGINAL)), original(cfg, state))
    save_file(state, file, {"patch": "1,2,2,3"})
    with pytest.raises(UserError, match=r"patch=1,2,2,3 in the file's metadata: must be three sizes"):
        WeightFile(file, WEIGHTS)


def test_parts_are_read_without_the_rest(tmp_path: Path) -> None:
    """Rows and columns of the tensors that change, as processes that hold a piece ask for them."""
    cfg, state = SMALL["i2v"], ours(SMALL["i2v"])
    save_file(original(cfg, state), tmp_path / "m.safetensors")
    file = WeightFile(tmp_path / "m.safetensors", WEIGHTS, WEIGHTS.layout(cfg))
    for name in ("patch_embedding.weight", "head.head.weight", "blocks.1.modulation"):
        start = tuple(size // 3 for size in state[name].shape)
        part = torch.zeros([size - at for size, at in zip(state[name].shape, start, strict=True)])
        assert file.read_part(name, start, part)
        assert torch.equal(part, state[name][tuple(slice(at, None) for at in start)]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("patch_embedding.bias"), r"1 missing: patch_embedding\.bias"),
        (lambda s: s.update({"blocks.0.norm1.weight": torch.ones(D)}), r"1 unexpected: blocks\.0\.norm1\.weight"),
        (lambda s: s.update({"blocks.3.odd": torch.ones(D)}), r"1 unexpected: blocks\.3\.odd"),
        (lambda s: s.update({"patch_embedding.bias": torch.ones(D - 1)}), r"patch_embedding\.bias \(23,\), \(24,\)"),
        (
            lambda s: s.update({"patch_embedding.weight": torch.ones(D, C, 1, 2, 3)}),
            r"patch_embedding\.weight \(24, 18",
        ),
    ],
)
def test_files_that_do_not_fit(
    layout: str, change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path
) -> None:
    cfg, state = SMALL["t2v"], ours(SMALL["t2v"])
    stored = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout])
    stored = {n: tensor.contiguous() for n, tensor in stored.items()}
    change(stored)
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        load_into(build_model(cfg), tmp_path / "m.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg))
    assert "choose the model size of this file" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (D, 0, 1, 2, 2), (D, C, 2, 3), (7, 5), (3, 1, 1, 1, 1, 1)])
def test_tensors_of_any_shape_are_refused_in_one_line(layout: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Those that change their form, and one that does not."""
    cfg, state = SMALL["t2v"], ours(SMALL["t2v"])
    stored = convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=LAYOUTS[layout])
    for name in ("patch_embedding.weight", "head.head.weight", "head.head.bias", "blocks.1.modulation"):
        here = to_diffusers(name) if layout == "diffusers" else name
        odd = {n: tensor.contiguous() for n, tensor in stored.items()} | {here: torch.zeros(shape)}
        save_file(odd, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=rf"of another shape .*{re.escape(name)}") as caught:
            load_into(build_model(cfg), tmp_path / "m.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg))
        assert "\n" not in str(caught.value)
        WeightFile(tmp_path / "m.safetensors", WEIGHTS, replace(WEIGHTS.layout(cfg), patch=None))


def test_a_file_with_both_names_of_a_tensor_fits_nothing(tmp_path: Path) -> None:
    cfg = SMALL["t2v"]
    stored = convert_state_dict(ours(cfg), WEIGHTS, source=WEIGHTS.layout(cfg), to=DIFFUSERS)
    stored["blocks.0.norm3.weight"] = torch.ones(D)
    save_file({n: tensor.contiguous() for n, tensor in stored.items()}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected: blocks\.0\.norm"):
        load_into(build_model(cfg), tmp_path / "m.safetensors", WEIGHTS, to=WEIGHTS.layout(cfg))


def test_weights_of_another_kind_of_wan_do_not_fit(tmp_path: Path) -> None:
    for of, into, said in (("picture", "i2v", r"unexpected: .*_img"), ("i2v", "picture", r"missing: img_emb")):
        save_file(original(SMALL[of], ours(SMALL[of])), tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=said):
            load_into(build_model(SMALL[into]), tmp_path / "m.safetensors", WEIGHTS, to=WEIGHTS.layout(SMALL[into]))


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_model.blocks.1.self_attn.q", "diffusion_model.blocks.1.cross_attn.o", "diffusion_model.head.head"),
        ("transformer.blocks.1.attn1.to_q", "transformer.blocks.1.attn2.to_out.0", "transformer.proj_out"),
        ("lora_unet_blocks_1_self_attn_q", "lora_unet_blocks_1_cross_attn_o", "lora_unet_head_head"),
    ],
)
def test_layers_that_adapters_are_for(names: tuple[str, str, str]) -> None:
    """Under every name, also where only some layers of attention are adapted; rows of the last layer change places."""
    cfg = SMALL["t2v"]
    with torch.device("meta"):
        shapes = {n: tuple(x.shape) for n, x in build_model(cfg).state_dict().items()}
    sizes = {names[0]: (D, D), names[1]: (D, D), names[2]: (D, C * 4)}
    plan = plan_adapter(sizes, shapes, WEIGHTS, WEIGHTS.layout(cfg), {})
    assert list(plan.pieces) == ["blocks.1.self_attn.q", "blocks.1.cross_attn.o", "head.head"]
    (rows,) = plan.pieces["head.head"]
    assert rows.places.tolist() == [c * 4 + p for p in range(4) for c in range(C)]
    (rows,) = plan.pieces["blocks.1.self_attn.q"]
    assert rows.places.tolist() == list(range(D))


# --- folders of the hub ---------------------------------------------------------------------------------------------

RELEASED: dict[str, dict[str, Any]] = {  # what config.json of the releases says
    "t2v_1_3b": {"dim": 1536, "ffn_dim": 8960, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30},
    "t2v_14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40},
    "i2v_14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40},
    "i2v_a14b": {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40},
    "ti2v_5b": {"dim": 3072, "ffn_dim": 14336, "in_dim": 48, "model_type": "ti2v", "num_heads": 24, "num_layers": 30},
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", RELEASED)
def test_hub_folders_of_the_releases(name: str, sharded: bool, tmp_path: Path) -> None:
    """Two of them say the same: the weights beside it tell them apart."""
    common = {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "eps": 1e-06, "freq_dim": 256, "text_len": 512}
    said = {**common, **RELEASED[name], "out_dim": 48 if name == "ti2v_5b" else 16}
    (tmp_path / "config.json").write_text(json.dumps(said))
    held = {"blocks.0.self_attn.q.bias": torch.zeros(1)}
    picture = {"img_emb.proj.1.weight": torch.zeros(1280, 1280)} if name == "i2v_14b" else {}
    if sharded:
        parts = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": part for i, part in ((1, held), (2, picture))}
        for file, part in parts.items():
            save_file(part, tmp_path / file)
        index = {tensor: file for file, part in parts.items() for tensor in part}
        index |= {} if picture else {"blocks.0.self_attn.q.bias": next(iter(parts))}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save_file(held | picture, tmp_path / "diffusion_pytorch_model.safetensors")
    assert read_hub_config(tmp_path) == SIZES[name]
    assert hub_config(SIZES[name]) == {key: value for key, value in said.items() if key != "_diffusers_version"} | {
        "text_dim": 4096
    }


@pytest.mark.parametrize("name", [*RELEASED, *SMALL])
def test_hub_folders_of_diffusers(name: str, tmp_path: Path) -> None:
    cfg = SIZES[name] if name in RELEASED else SMALL[name]
    (tmp_path / "config.json").write_text(json.dumps(dict(reference(cfg).config)))
    in_place = cfg.references == "in_place" and name in SMALL  # which diffusers cannot say but by 48 channels
    assert read_hub_config(tmp_path) == (SMALL["t2v"] if in_place else cfg)


def test_hub_folders_of_ours(tmp_path: Path) -> None:
    for name, cfg in SMALL.items():
        folder = tmp_path / name
        save_state_dict(ours(cfg), folder, WEIGHTS, source=family_of(cfg).weights.layout(cfg), to=ORIGINAL)
        (folder / "config.json").write_text(json.dumps(hub_config(cfg)))
        assert read_hub_config(folder) == cfg


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "vace"}, r"model_type=vace: must be one of t2v, i2v, ti2v"),
        ({"model_type": ["t2v"]}, r"model_type="),
        ({"in_dim": 36}, r"in_dim=36: must be 16, for latents of 16 channels"),
        ({"dim": "wide"}, r"dim=wide: must be an integer"),
        ({"num_heads": 7}, r"num_heads=7: must be a divisor"),
        ({"freq_dim": 512}, r"freq_dim=512: must be 256"),
        ({"patch_size": [1, 2]}, r"patch_size=\[1, 2\]: must be three integers"),
        ({"_class_name": "WanTransformer3DModel", "in_channels": 20}, r"in_channels=20: must be 36"),
        ({"_class_name": "WanTransformer3DModel", "pos_embed_seq_len": 514}, r"pos_embed_seq_len=514: must be null"),
        ({"_class_name": "WanTransformer3DModel", "added_kv_proj_dim": 5120}, r"added_kv_proj_dim=5120: must be null"),
    ],
)
def test_hub_configurations_that_cannot_be_built(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel"} | changes))
    with pytest.raises(UserError, match=said) as caught:
        read_hub_config(tmp_path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_writes_either_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For the release's own code and for diffusers, whose model loads the folder as it is."""
    diffusers = pytest.importorskip("diffusers")
    cfg, state, source = SMALL["picture"], ours(SMALL["picture"]), tmp_path / "m.safetensors"
    save_file({f"model.diffusion_model.{n}": tensor for n, tensor in original(cfg, state).items()}, source)
    keys = [f"model.{key}={value}" for key, value in {"kind": "wan", "references": "clip", "image_dim": E}.items()]
    keys += [f"model.{key}={value}" for key, value in _SMALL.items()]
    for names in ("original", "diffusers"):
        assert convert.main([str(source), "--to", str(tmp_path / names), "--names", names, *keys]) == 0
        assert "config.json" in capsys.readouterr().out
        assert read_hub_config(tmp_path / names) == cfg
        assert dict(WeightFile(tmp_path / names, WEIGHTS, WEIGHTS.layout(cfg))).keys() == state.keys()
    assert equal(load_file(tmp_path / "original/model.safetensors"), original(cfg, state))
    theirs, said = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "diffusers", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert equal(theirs.state_dict(), convert_state_dict(state, WEIGHTS, source=WEIGHTS.layout(cfg), to=DIFFUSERS))
    for kind, message in (("wan", "must be one of original, diffusers"), ("dit", "has its own names alone")):
        with pytest.raises(UserError, match=rf"--names=flux: .*{message}"):
            convert.main([str(source), "--to", str(tmp_path / "no"), "--names", "flux", f"model.kind={kind}"])


def refusal(key: str, place: Path, cfg: WanConfig) -> str:
    """Why weights are refused; empty: they are not."""
    try:
        check_weights(key, place, cfg)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_given_shape_is_compared_with_the_folder(names: str, tmp_path: Path) -> None:
    """The number of heads changes no shape, and every pixel."""
    cfg = replace(SIZES["debug"], references="in_place")
    tensors = {n: torch.randn(x.shape) for n, x in build_model(cfg).state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors", WEIGHTS.layout(cfg).metadata())
    convert_weights(cfg, tmp_path / "a.safetensors", tmp_path / "out", names)
    check_weights("weights", tmp_path / "out", cfg)
    check_weights("weights", tmp_path / "out", replace(cfg, references="none"))  # the same weights, without frames
    wrong, file = replace(cfg, num_heads=2), next((tmp_path / "out").glob("*.safetensors"))
    wanted = "config.json: says num_heads=4, and model.num_heads is 2; set model.num_heads=4"
    for key, place in (("weights", tmp_path / "out"), ("train.init_from", file)):
        said = refusal(key, place, wrong)
        assert said.startswith(f"{key}={place}: ") and said.endswith(wanted)
    for said in (tmp_path / "out").glob("config.json"):  # of another file in the folder
        said.write_text(said.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    check_weights("weights", tmp_path / "out", cfg)


def test_the_folder_of_a_pipeline_names_the_folders_in_it(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2", "vae"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"holds no weights: give .*/transformer or .*/transformer_2$"):
        check_weights("weights", tmp_path, SIZES["debug"])


def test_encoders_of_other_models_are_named() -> None:
    cfg = SIZES["t2v_14b"]
    assert other_encoders(cfg, WanVAEConfig(), UMT5Config()) == ""
    assert other_encoders(cfg, DCTConfig(), ByteTextConfig()) == ""  # without weights, as in tests and the demo
    said = other_encoders(cfg, HunyuanConfig(), T5Config())
    assert said.startswith(
        "vae.kind=hunyuan and text.kind=t5: published weights of model.kind=wan read wan, wan22, umt5"
    )
