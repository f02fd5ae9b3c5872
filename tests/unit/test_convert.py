import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opensora.models.mmdit import MMDiTConfig, MMDiTModel
from opensora.models.mmdit.convert import FLUX, LAYOUTS, OPEN_SORA_2, WEIGHTS, WeightLayout
from opensora.models.weights.reader import WeightFile, load_into, load_state_dict_for, read_state_dict
from opensora.models.weights.writer import convert_state_dict, save_state_dict
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import INDEX
from tests.unit.test_mmdit import DEBUG, inputs, random_model

ALL = [WeightLayout(fused_qkv=fused, rope_layout=rope) for fused in (True, False) for rope in ("interleaved", "half")]


def layout_of(cfg: MMDiTConfig) -> WeightLayout:
    return WeightLayout(fused_qkv=cfg.fused_qkv, rope_layout=cfg.rope_layout)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("base", [DEBUG, replace(DEBUG, depth_single_blocks=0), replace(DEBUG, qkv_bias=False)])
@pytest.mark.parametrize("to", ALL, ids=str)
def test_every_layout_computes_the_same_and_comes_back(base: MMDiTConfig, to: WeightLayout) -> None:
    first = random_model(base, torch.float64)
    state = dict(first.state_dict())
    converted = convert_state_dict(state, WEIGHTS, to=to, source=FLUX)
    cfg = replace(base, fused_qkv=to.fused_qkv, rope_layout=to.rope_layout)
    second = MMDiTModel(cfg).double()
    second.load_state_dict(converted, strict=True)
    given = inputs(cfg, dtype=torch.float64)
    assert torch.allclose(first(**given), second(**given), rtol=0, atol=1e-12)
    assert same(convert_state_dict(converted, WEIGHTS, to=FLUX, source=to), state)


def test_the_permutation_is_the_documented_one() -> None:
    state = dict(random_model(DEBUG).state_dict())
    half = convert_state_dict(state, WEIGHTS, to=OPEN_SORA_2)
    for d in range(8):  # head dim 16
        scale, permuted = state["single_blocks.1.norm.key_norm.scale"], half["single_blocks.1.norm.key_norm.scale"]
        assert permuted[d] == scale[2 * d] and permuted[8 + d] == scale[2 * d + 1]
        q, permuted = state["double_blocks.0.txt_attn.qkv.bias"][:64], half["double_blocks.0.txt_attn.q_proj.bias"]
        assert permuted[16 + d] == q[16 + 2 * d] and permuted[16 + 8 + d] == q[16 + 2 * d + 1]  # second head
    v = state["double_blocks.0.txt_attn.qkv.weight"][128:]
    assert torch.equal(half["double_blocks.0.txt_attn.v_proj.weight"], v)


def test_layouts_are_told_by_names_then_metadata() -> None:
    flux = dict(random_model(DEBUG).state_dict())
    assert WEIGHTS.detect_layout(flux, {}) == FLUX == LAYOUTS["flux"]
    assert WEIGHTS.detect_layout(convert_state_dict(flux, WEIGHTS, to=OPEN_SORA_2), {}) == OPEN_SORA_2
    assert WEIGHTS.detect_layout(flux, {"rope_layout": "half"}).rope_layout == "half"
    with pytest.raises(UserError, match="rope_layout=spiral"):
        WEIGHTS.detect_layout(flux, {"rope_layout": "spiral"})


@pytest.mark.parametrize("to", ALL, ids=str)
def test_files_state_their_layout_and_load_into_any_model(tmp_path: Path, to: WeightLayout) -> None:
    model = random_model(DEBUG)
    path = tmp_path / "made" / "model.safetensors"
    assert save_state_dict(model.state_dict(), path, WEIGHTS, source=FLUX, to=to, metadata={"step": "7"}) == [path]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()["rope_layout"] == to.rope_layout
        assert opened.metadata()["fused_qkv"] == str(to.fused_qkv).lower() and opened.metadata()["step"] == "7"
    for cfg in (DEBUG, replace(DEBUG, fused_qkv=False, rope_layout="half")):
        other = MMDiTModel(cfg)
        report = load_into(other, path, WEIGHTS, to=layout_of(cfg))
        assert report.fits and report.layout == to and report.loaded == len(other.state_dict())
        assert torch.allclose(other(**inputs(cfg)), model(**inputs(cfg)), atol=1e-4)


def test_shards_with_an_index(tmp_path: Path) -> None:
    state = dict(random_model(DEBUG).state_dict())
    files = save_state_dict(state, tmp_path, WEIGHTS, source=FLUX, shard_bytes=400_000)
    assert len(files) > 3 and files[-1].name == INDEX
    for path in (tmp_path, tmp_path / INDEX):
        read, layout = read_state_dict(path, WEIGHTS)
        assert layout == FLUX and same(read, state)
    files[1].unlink()
    with pytest.raises(UserError, match=files[1].name):
        read_state_dict(tmp_path, WEIGHTS)


def test_a_folder_without_index_is_its_files(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in random_model(DEBUG).state_dict().items()}
    names = list(state)
    save_file({name: state[name] for name in names[:9]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[9:]}, tmp_path / "b.safetensors")
    assert same(read_state_dict(tmp_path, WEIGHTS)[0], state)
    save_file({names[0]: state[names[0]]}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=f"{names[0]} is in two files"):
        read_state_dict(tmp_path, WEIGHTS)


def test_flux_weights_start_a_conditioned_model(tmp_path: Path) -> None:
    flux = random_model(replace(DEBUG, cond_embed=False))
    path = save_state_dict(flux.state_dict(), tmp_path / "flux.safetensors", WEIGHTS, source=FLUX)[0]
    model = random_model(DEBUG)
    assert model.cond_in is not None
    torch.nn.init.zeros_(model.cond_in.weight)
    torch.nn.init.zeros_(model.cond_in.bias)
    report = load_into(model, path, WEIGHTS, to=FLUX, allow_missing=("cond_in.*",))
    assert report.left_at_init == ("cond_in.weight", "cond_in.bias")
    given = inputs(DEBUG)
    assert torch.allclose(model(**given), flux(**{**given, "cond": None}))
    with pytest.raises(UserError, match=r"2 missing: cond_in.weight, cond_in.bias"):
        load_into(model, path, WEIGHTS, to=FLUX)


def test_everything_that_does_not_fit_is_in_one_line(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in random_model(DEBUG).state_dict().items()}
    del state["txt_in.bias"]
    state["img_in.weight"] = torch.zeros(3, 4)
    state["extra"] = torch.zeros(1)
    path = save_state_dict(state, tmp_path / "bad.safetensors", WEIGHTS, source=FLUX)[0]
    with torch.device("meta"):
        model = MMDiTModel(DEBUG)
    with pytest.raises(UserError) as caught:
        load_state_dict_for(model, path, WEIGHTS, to=FLUX, allow_missing=("cond_in.*",))
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(path))
    assert "1 missing: txt_in.bias" in line and "1 unexpected: extra" in line
    assert "img_in.weight (3, 4), (64, 16)" in line


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "none.safetensors", WEIGHTS)
    with pytest.raises(UserError, match="holds no weights"):
        read_state_dict(tmp_path, WEIGHTS)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor in sight")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_state_dict(broken, WEIGHTS)
    index = tmp_path / INDEX
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(UserError, match="weight_map"):
        read_state_dict(tmp_path, WEIGHTS)
    with pytest.raises(UserError, match="no MMDiT"):
        convert_state_dict({"a.weight": torch.zeros(2, 2)}, WEIGHTS, to=OPEN_SORA_2, source=FLUX)


@pytest.mark.parametrize("written", [FLUX, OPEN_SORA_2], ids=str)
@pytest.mark.parametrize("to", ALL, ids=str)
def test_a_part_is_read_without_the_rest(tmp_path: Path, written: WeightLayout, to: WeightLayout) -> None:
    """Any rows and columns, in any layout; at most one head more on either side is taken from the file."""
    state = random_model(DEBUG).state_dict()
    path = save_state_dict(state, tmp_path / "m.safetensors", WEIGHTS, source=FLUX, to=written)[0]
    file = WeightFile(path, WEIGHTS, to)
    whole = {name: tensor.clone() for name, tensor in file.items()}
    assert same(whole, convert_state_dict(read_state_dict(path, WEIGHTS)[0], WEIGHTS, to=to))
    asked = spy(file)
    for index, (name, tensor) in enumerate(whole.items()):
        rows = tensor.shape[0]
        for start, stop in ((0, rows), (rows // 3, 2 * rows // 3), (rows - 1, rows), (index % rows, index % rows + 1)):
            left = tensor.shape[1] // 2 if tensor.dim() > 1 else 0
            for columns in {(0, left), (left, None)} if left else [(0, None)]:
                wanted = tensor[start:stop, slice(*columns)] if left else tensor[start:stop]
                part = torch.full_like(wanted, torch.nan)
                asked.clear()
                assert file.read_part(name, (start, *([columns[0]] if left else [])), part)
                assert torch.equal(part, wanted), (name, start, stop)
                assert sum(asked) <= wanted.shape[0] + 2 * 3 * 15  # two ends of each of q, k and v, heads of 16
    assert not file.read_part("no.such.tensor", (0,), torch.zeros(1))


def spy(file: WeightFile) -> list[int]:
    """Rows asked for from now on, one entry per read; whole tensors must not be read."""
    asked: list[int] = []

    class Slices:
        def __init__(self, slices: Any) -> None:
            self.slices = slices

        def __getitem__(self, key: Any) -> torch.Tensor:
            found = self.slices[key]
            asked.append(found.shape[0])
            return found

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> Slices:
            return Slices(self.file.get_slice(name))

    file._places = {name: (replace(one, file=File(one.file)), stored) for name, (one, stored) in file._places.items()}
    return asked


def test_nothing_is_read_before_all_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_state_dict(random_model(DEBUG).state_dict(), tmp_path / "m.safetensors", WEIGHTS, source=FLUX)[0]
    monkeypatch.setattr(WeightFile, "__getitem__", None)
    monkeypatch.setattr(WeightFile, "_read", None)
    with torch.device("meta"):
        file, report = load_state_dict_for(MMDiTModel(DEBUG), path, WEIGHTS, to=FLUX)
        with pytest.raises(UserError, match="of another shape"):
            load_state_dict_for(MMDiTModel(replace(DEBUG, hidden_size=32, axes_dim=(2, 2, 4))), path, WEIGHTS, to=FLUX)
    assert report.fits and len(file) == report.loaded


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"])
def test_fused_tensors_too_odd_to_be_cut_are_reported(tmp_path: Path, name: str) -> None:
    state = {key: tensor.clone() for key, tensor in random_model(DEBUG).state_dict().items()}
    state[name] = state[name][:100]  # 64 wide: no three equal parts, and less than q and k
    save_file(state, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = MMDiTModel(DEBUG)
    with pytest.raises(UserError, match=f"{name} \\(100, 64\\)"):
        load_state_dict_for(model, tmp_path, WEIGHTS, to=FLUX)


ODD: dict[str, tuple[str, tuple[int, ...], str]] = {  # of a file with separate projections: tensor, shape, what is said
    "k of another width": (
        "double_blocks.0.img_attn.k_proj.weight",
        (64, 1),
        r"1 of another shape \(file, model\): .*\.qkv\.weight made of .*q_proj.weight \(64, 64\) and .* \(64, 1\) and",
    ),
    "k without rows": ("double_blocks.0.img_attn.k_proj.bias", (), r"img_attn\.qkv\.bias \(129,\), \(192,\)"),
    "half a head": ("single_blocks.0.q_proj.bias", (24,), r"single_blocks\.0\.linear1\.bias \(408,\), \(448,\)"),
    "a norm that is a number": ("double_blocks.0.img_attn.norm.key_norm.scale", (), r"key_norm\.scale \(\), \(16,\)"),
    "a norm of nothing": ("double_blocks.0.img_attn.norm.key_norm.scale", (0,), r"key_norm\.scale \(0,\), \(16,\)"),
    "a norm of a few": ("double_blocks.0.img_attn.norm.key_norm.scale", (3,), r"key_norm\.scale \(3,\), \(16,\)"),
}


@pytest.mark.parametrize("case", ODD)
def test_tensors_too_odd_to_be_joined_or_permuted_are_reported(tmp_path: Path, case: str) -> None:
    name, shape, expected = ODD[case]
    state = convert_state_dict(dict(random_model(DEBUG).state_dict()), WEIGHTS, to=OPEN_SORA_2)
    save_file({**state, name: torch.zeros(shape)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = MMDiTModel(DEBUG)
    with pytest.raises(UserError, match=expected) as caught:
        load_state_dict_for(model, tmp_path, WEIGHTS, to=FLUX)
    assert "\n" not in str(caught.value)


def test_a_name_that_another_tensor_takes_is_reported(tmp_path: Path) -> None:
    """q by itself beside q, k, v in one: neither is dropped without a word."""
    state = {key: tensor.clone() for key, tensor in random_model(DEBUG).state_dict().items()}
    save_file({**state, "double_blocks.0.img_attn.q_proj.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected: double_blocks\.0\.img_attn\.(q_proj|qkv)\.weight"):
        load_state_dict_for(MMDiTModel(DEBUG), tmp_path, WEIGHTS, to=FLUX)


PREFIXES = [
    "model.diffusion_model.",
    "module.",
    "model.",
    "_orig_mod.",
    "ema.",
    "module._orig_mod.",
    "net.inner.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("written", [FLUX, OPEN_SORA_2], ids=str)
def test_names_behind_a_common_prefix(tmp_path: Path, prefix: str, written: WeightLayout) -> None:
    state = dict(random_model(DEBUG).state_dict())
    named = {f"{prefix}{name}": tensor for name, tensor in convert_state_dict(state, WEIGHTS, to=written).items()}
    save_file(named, tmp_path / "m.safetensors")
    model = MMDiTModel(DEBUG)
    report = load_into(model, tmp_path, WEIGHTS, to=FLUX)
    assert same(dict(model.state_dict()), state)
    plain = prefix.replace("_orig_mod.", "")
    assert report.prefix == plain and ("names in the file begin with" in str(report)) == bool(plain)


def test_names_of_compiled_blocks_and_other_models_in_the_same_file(tmp_path: Path) -> None:
    state = dict(random_model(DEBUG).state_dict())
    wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()}
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in wrapped.items()}
    others = {"vae.decoder.conv_in.weight": torch.zeros(2, dtype=torch.int32), "text_encoders.t5.x": torch.zeros(1)}
    save_file({**named, **others}, tmp_path / "all_in_one.safetensors")
    model = MMDiTModel(DEBUG)
    report = load_into(model, tmp_path, WEIGHTS, to=FLUX)
    assert same(dict(model.state_dict()), state) and set(report.left_out) == set(others)
    assert "2 of other models left out: " in str(report)
    save_file(
        {**named, **{f"ema.{name}": tensor.clone() for name, tensor in state.items()}}, tmp_path / "two.safetensors"
    )
    with pytest.raises(UserError, match=r"holds several sets of weights, as .* and .*: give a file with one"):
        load_into(model, tmp_path / "two.safetensors", WEIGHTS, to=FLUX)


BAD_TENSORS = {
    "int32": (lambda x: x.int(), "img_in.weight is I32: must be one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2; convert"),
    "bool": (lambda x: x.bool(), "img_in.weight is BOOL"),
    "complex": (lambda x: x.to(torch.complex64), "img_in.weight is C64"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_types_that_are_no_weights_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    change, expected = BAD_TENSORS[kind]
    state = dict(random_model(DEBUG).state_dict())
    save_file({**state, "img_in.weight": change(state["img_in.weight"])}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=expected):
        load_state_dict_for(MMDiTModel(DEBUG), tmp_path, WEIGHTS, to=FLUX)


@pytest.mark.parametrize("mark", ["img_in.scale_weight", "img_in.weight_scale", "img_in.weight.absmax"])
def test_marks_of_quantized_weights_beside_others_are_refused_by_name(tmp_path: Path, mark: str) -> None:
    """Those of fp8, which is read, where there is none: tests/unit/test_fp8_weights.py."""
    state = dict(random_model(DEBUG).state_dict())
    for weight in (state["img_in.weight"], state["img_in.weight"].to(torch.int8)):
        save_file({**state, "img_in.weight": weight, mark: torch.ones(())}, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=f"{mark}.*give the bf16 or fp16 weights"):
            load_state_dict_for(MMDiTModel(DEBUG), tmp_path, WEIGHTS, to=FLUX)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_point_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in random_model(DEBUG).state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    model = MMDiTModel(DEBUG)
    load_into(model, tmp_path, WEIGHTS, to=FLUX)
    assert same(dict(model.state_dict()), {name: tensor.float() for name, tensor in state.items()})


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    state = dict(random_model(DEBUG).state_dict())
    save_state_dict(state, tmp_path / "shards", WEIGHTS, source=FLUX, shard_bytes=400_000)
    save_file(state, tmp_path / "weights.bin")
    (tmp_path / "linked").symlink_to(tmp_path / "weights.bin")
    (tmp_path / "index").write_bytes(b"\n " + (tmp_path / "shards" / INDEX).read_bytes())
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        (tmp_path / shard.name).symlink_to(shard)
    for name in ("weights.bin", "linked", "index", "shards"):
        assert same(dict(WeightFile(tmp_path / name, WEIGHTS)), state), name


def test_other_formats_are_named_with_the_remedy(tmp_path: Path) -> None:
    for start, expected in (
        (b"GGUF\3\0\0\0", "is a GGUF file of quantized weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "fetch it with git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\3\4" + bytes(100), r"is a file of torch\.save.*nothing is unpickled"),
        (b"\x80\2}q\0.", "is a pickle"),
        (b"", "cannot be read as safetensors"),
        (b"{}", "is not a safetensors index"),
    ):
        (tmp_path / "m.safetensors").write_bytes(start)
        with pytest.raises(UserError, match=expected):
            WeightFile(tmp_path / "m.safetensors", WEIGHTS)
    save_file({"diffusion_model.img_in.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"these are adapters \(LoRA\), not weights: give them as lora="):
        WeightFile(tmp_path, WEIGHTS, OPEN_SORA_2)
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1, 1)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="weights under diffusers' names"):
        WeightFile(tmp_path, WEIGHTS, OPEN_SORA_2)


@pytest.mark.timeout(60)
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "m.safetensors"}}))
    (tmp_path / "alone").mkdir()
    os.mkfifo(tmp_path / "alone/m.safetensors")
    for path, expected in (
        (tmp_path / "m.safetensors", "is a named pipe: give a file"),
        (tmp_path / "alone", "is a named pipe"),
        (tmp_path, "names files that are not beside it"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "\0", "null"),
    ):
        with pytest.raises(UserError, match=expected):
            WeightFile(path, WEIGHTS)


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """One that is missing, given alone, or of another release than the index."""
    state = dict(random_model(DEBUG).state_dict())
    first, second = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
    halves = [dict(list(state.items())[start::2]) for start in (0, 1)]
    for name, half in zip((first, second), halves, strict=True):
        save_file(half, tmp_path / name)
    assert len(WeightFile(tmp_path, WEIGHTS)) == len(state)
    with pytest.raises(UserError, match=f"{first}: is one of 2 files of the same weights: give their folder"):
        WeightFile(tmp_path / first, WEIGHTS)

    map_ = {tensor: name for name, half in zip((first, second), halves, strict=True) for tensor in half}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": map_}))
    assert len(WeightFile(index, WEIGHTS)) == len(state)
    for lie in ({**map_, "img_in.gone": second}, {**map_, "img_in.weight": second, "img_in.bias": second}):
        index.write_text(json.dumps({"weight_map": lie}))
        with pytest.raises(UserError, match=f"{second}: does not hold img_in.*as its index says: fetch"):
            WeightFile(tmp_path, WEIGHTS)

    index.unlink()
    (tmp_path / second).unlink()
    for place in (tmp_path, tmp_path / first):
        with pytest.raises(UserError, match=f"is one of 2 files of the same weights: fetch {second} too"):
            WeightFile(place, WEIGHTS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_folder_of_pickles_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=rf"no safetensors, and nothing is unpickled \({name}\): save its tensors by"):
        WeightFile(tmp_path, WEIGHTS)
