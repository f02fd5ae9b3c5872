import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acceleration import lora
from acceleration.config import LoraConfig
from acceleration.sharding import fsdp
from opensora.config.run import SampleConfig
from opensora.inference.find import read_adapters
from opensora.models.families import MODEL_SIZES, build_model, init_model_
from opensora.models.mmdit import FAMILY, MMDiTConfig, MMDiTModel
from opensora.models.weights.adapter_export import trained_adapter, write_adapter
from opensora.models.weights.adapter_fit import FittedAdapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.models.weights.adapters import read_adapter
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import fingerprint
from opensora.utils.rng import torch_generator

MODEL = replace(MODEL_SIZES["mmdit"]["debug"], cond_embed=False)
CFG = LoraConfig(rank=4, alpha=6.0, targets=FAMILY.lora_targets)
LAYOUT = {"format": "pt", "fused_qkv": "true", "rope_layout": "interleaved"}


def adapted(cfg: LoraConfig = CFG, model: MMDiTConfig = MODEL) -> tuple[MMDiTModel, list[str]]:
    with torch.device("meta"):
        built = build_model(model)
    return built, lora.apply(built, cfg)


def values(cfg: LoraConfig = CFG) -> dict[str, Tensor]:
    """Adapters that are all alive."""
    return {
        name: torch.randn(p.shape, generator=torch_generator("adapter", name)) * 0.2
        for name, p in adapted(cfg)[0].named_parameters()
        if p.requires_grad
    }


def base_model() -> MMDiTModel:
    model = build_model(MODEL).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15, generator=torch_generator("base", name))
    return model


def with_adapters(tensors: dict[str, Tensor], cfg: LoraConfig = CFG) -> MMDiTModel:
    model, _ = adapted(cfg)
    model.to_empty(device="cpu")
    model.load_state_dict({**base_model().state_dict(), **tensors})
    return model


def with_fitted(adapter: FittedAdapter, model: MMDiTConfig = MODEL, base: MMDiTModel | None = None) -> MMDiTModel:
    """The model with adapters of a file beside its layers, all in the base's type."""
    base = base or base_model()
    with torch.device("meta"):
        built = build_model(model)
    lora.attach(built, adapter.sizes())
    built.to_empty(device="cpu").to(next(base.parameters()).dtype)
    added = {name: adapter.tensor(name) for name, _ in built.named_parameters() if lora.is_adapter(name)}
    built.load_state_dict({**base.state_dict(), **added})
    return built


def inputs() -> dict[str, Tensor]:
    draw = torch_generator("inputs")
    return {
        "img": torch.randn(2, 6, MODEL.in_channels, generator=draw),
        "img_ids": torch.zeros(2, 6, 3),
        "txt": torch.randn(2, 3, MODEL.context_in_dim, generator=draw),
        "txt_ids": torch.zeros(2, 3, 3),
        "timesteps": torch.tensor([0.3, 0.8]),
        "y_vec": torch.randn(2, MODEL.vec_in_dim, generator=draw),
    }


def test_the_layers_keep_their_names_and_everything_else_is_frozen() -> None:
    model, names = adapted()
    plain = build_model(MODEL)
    added = {f"{name}.{kind}" for name in names for kind in (lora.A, lora.B)}
    assert set(model.state_dict()) == set(plain.state_dict()) | added
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added
    assert {name.split(".", 2)[2] for name in names if name.startswith("double_blocks.0")} == {
        f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    }
    assert [name for name in names if name.startswith("single_blocks.1")] == [
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    ]


def test_default_targets_fit_separate_projections() -> None:
    names = adapted(model=replace(MODEL, fused_qkv=False))[1]
    assert {name.split(".")[2] for name in names if name.startswith("single_blocks.0")} == {
        "q_proj",
        "k_proj",
        "v_mlp",
        "linear2",
    }
    assert "double_blocks.1.txt_attn.k_proj" in names


def test_a_layer_named_twice_has_one_adapter() -> None:
    targets = ("single_blocks.*.linear1", "single_blocks.0.*")
    assert adapted(LoraConfig(rank=2, targets=targets))[1] == [
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "single_blocks.1.linear1",
    ]


def test_a_target_that_names_no_layer() -> None:
    with pytest.raises(ValueError, match=r"'double_blocks.\*.core' matches no Linear"):
        adapted(LoraConfig(rank=2, targets=("single_blocks.*.linear1", "double_blocks.*.core")))


def test_it_starts_as_the_base() -> None:
    model, _ = adapted()
    model.to_empty(device="cpu")
    model.load_state_dict(base_model().state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name):
            lora.init_parameter_(name, parameter, torch_generator(1, "init", name))
    down = model.get_parameter("single_blocks.0.linear1.lora_A.weight")
    assert 0.9 / 64**0.5 < down.abs().max() <= 1 / 64**0.5  # uniform within 1/sqrt(in), as peft's
    assert torch.equal(model(**inputs()), base_model()(**inputs()))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_merged(scale: float) -> None:
    """As adapters whose B is scaled; merging twice is merging once."""
    tensors = values()
    scaled = {name: tensor * (scale if name.endswith(lora.B) else 1.0) for name, tensor in tensors.items()}
    wanted = with_adapters(scaled)(**inputs())
    model = with_adapters(tensors)
    for _ in range(2):
        fsdp.merge_adapters(model, scale)
        assert torch.allclose(model(**inputs()), wanted, atol=1e-5)


def written(folder: Path, cfg: LoraConfig = CFG, **metadata: str) -> Path:
    made = replace(trained_adapter(values(cfg), 6.0 / cfg.rank), base="somewhere")
    write_adapter(folder, made, "peft", metadata={**LAYOUT, **metadata})
    return folder


def test_peft_reads_what_we_write_and_computes_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(base_model(), str(written(tmp_path)))
    theirs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(theirs) == len(values())
    found, wanted = model(**inputs()), with_adapters(values())(**inputs())
    assert (found - base_model()(**inputs())).abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5)


def test_we_read_what_peft_writes_and_compute_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r"double_blocks\.1\.(img|txt)_attn\.(qkv|proj)")
    model = peft.get_peft_model(base_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch_generator(name))
    model.save_pretrained(str(tmp_path))
    adapters = read_adapters(tmp_path, MODEL, "lora")
    assert adapters.exported is not None and len(adapters.exported.sizes()) == 4
    ours = with_fitted(adapters.exported)
    assert torch.allclose(ours(**inputs()), model(**inputs()), atol=1e-5)


def test_the_file_has_pefts_names(tmp_path: Path) -> None:
    """What the test above proves where peft is installed."""
    names = set(load_file(written(tmp_path) / WEIGHTS))
    assert "base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight" in names
    assert "base_model.model.single_blocks.1.linear2.lora_B.weight" in names
    described = json.loads((tmp_path / CONFIG).read_text())
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 4, 6.0)
    assert set(described["target_modules"]) == set(adapted()[1])
    read = read_adapter(tmp_path)
    assert set(read.scales.values()) == {6.0 / 4} and read.base == "somewhere"
    assert all(torch.equal(read.tensors[f"base_model.model.{name}"], tensor) for name, tensor in values().items())


BAD: dict[str, tuple[Any, str]] = {
    "no rank": ({"r": 0}, "r=0"),
    "a rank that is true": ({"r": True}, "r=True"),
    "no LoRA": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "another rank here and there": (
        {"rank_pattern": {"qkv": 8}},
        "qkv is of rank 8 here, and its matrices are of rank 4",
    ),
    "another rank than the file's": ({"r": 8}, "of rank 8"),
    "biases": ({"bias": "all"}, "bias=all"),
    "a rank in words": ({"r": "many"}, "r='many'"),
    "a list": ([1, 2], "not a description of adapters"),
    "an alpha of none": ({"lora_alpha": None}, "lora_alpha=None"),
    "an alpha of nothing": ({"lora_alpha": 0}, "is 0: must be a finite number other than 0"),
    "an alpha that is infinite": ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
    "an alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    "changed weights": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "a pattern that never ends": ({"alpha_pattern": {"(.*)*x": 8}}, "too complex"),
    "a pattern that is none": ({"alpha_pattern": {"[": 8}}, "is no pattern"),
    "a pattern of a list": ({"alpha_pattern": ["qkv"]}, "alpha_pattern="),
    "an alpha of a pattern": ({"alpha_pattern": {"qkv": "8"}}, "alpha_pattern="),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_we_would_not_compute_as_peft_does(case: str, tmp_path: Path) -> None:
    changed, expected = BAD[case]
    config = json.loads((written(tmp_path) / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changed if isinstance(changed, dict) else changed))
    with pytest.raises(UserError, match=expected) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_adapters_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapters(tmp_path, MODEL, "lora")
    written(tmp_path)
    for change, expected in (
        ({"depth": 1}, r"the model has no such layer \(nearest: .*\); these adapters belong to another model"),
        ({"hidden_size": 128, "axes_dim": (8, 12, 12)}, "would be"),
    ):
        with pytest.raises(UserError, match=expected):
            read_adapters(tmp_path, replace(MODEL, **change), "lora")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop("base_model.model.single_blocks.0.linear1.lora_B.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"the other matrix of base_model.model.single_blocks.0.linear1 is missing"):
        read_adapters(tmp_path, MODEL, "lora")


def test_the_fingerprint_knows_weights_not_places(tmp_path: Path) -> None:
    model = base_model()
    init_model_(model, 0)
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        save_file(model.state_dict(), tmp_path / folder / "model.safetensors")
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "b/c") == fingerprint(tmp_path / "a/model.safetensors")
    init_model_(model, 1)
    save_file(model.state_dict(), tmp_path / "a/model.safetensors")
    assert fingerprint(tmp_path / "a") != first
    (tmp_path / "empty.safetensors").touch()
    fingerprint(tmp_path / "empty.safetensors")


def test_scale_is_alpha_over_rank() -> None:
    assert LoraConfig(rank=8).scale == 1.0
    assert LoraConfig(rank=8, alpha=4.0).scale == 0.5
    assert SampleConfig(weights="x", prompt="y").lora is None
