"""Files of Open-Sora 1.x, and of PixArt to start from: names and shapes of the real sizes, strict loading, export."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.initial_weights import check_initial, initial_weights
from opensora.models.families import build_model, family_of, hub_config, init_model_, read_hub_config
from opensora.models.pixart import PixArtConfig, PixArtSigmaConfig
from opensora.models.stdit import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.reader import WeightFile, load_into, load_state_dict_for
from opensora.models.weights.writer import convert_shapes, save_state_dict
from opensora.utils.errors import UserError
from opensora.utils.rng import torch_generator

REAL: dict[str, Any] = {
    "v1.0 STDiT-XL/2 16x256x256": STDiTConfig(space_scale=0.5),
    "v1.0 STDiT-XL/2 64x512x512": STDiTConfig(time_scale=2 / 3),
    "v1.1 STDiT2-XL/2": STDiT2Config(),
    "v1.2 STDiT3-XL/2": STDiT3Config(),
    "v1.2 STDiT3-3B/2": STDiT3Config(hidden_size=1872, num_heads=26),
    "v1.3 STDiT3-XL/2": STDiT3Config(in_channels=16, kernel_size=(8, 8, -1), use_spatial_rope=True, cond_embed=True),
}
_SHAPE: dict[str, Any] = {"hidden_size": 24, "depth": 2, "num_heads": 2, "caption_channels": 6, "model_max_length": 3}
SMALL: dict[str, Any] = {
    "stdit": STDiTConfig(**_SHAPE),
    "stdit2": STDiT2Config(**_SHAPE),
    "stdit3": STDiT3Config(**_SHAPE, patch_size=(2, 1, 2)),
    "windows": STDiT3Config(**_SHAPE, kernel_size=(2, 2, -1), use_spatial_rope=True, cond_embed=True),
}


def published_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(cfg).state_dict().items()}
    format = family_of(cfg).weights
    return convert_shapes(shapes, format, source=format.layout(cfg), to=PUBLISHED)


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_real_sizes(golden: Path, name: str) -> None:
    truth = json.loads((golden / "v1" / "names.json").read_text())[name]
    wanted = {name: tuple(shape) for name, shape in truth["shapes"].items() if not name.startswith("pos_embed")}
    assert published_shapes(REAL[name]) == wanted
    with torch.device("meta"):
        model = build_model(REAL[name])
    buffers = {name for name in truth["buffers"] if not name.startswith("pos_embed")}
    counted = {name: p.numel() for name, p in model.named_parameters() if name not in buffers}
    assert sum(counted.values()) == truth["parameters"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == buffers | set(truth["not_trained"])
    assert sum(size for name, size in counted.items() if name not in frozen) == truth["trainable"]


def weights(cfg: Any, seed: str = "w") -> dict[str, Tensor]:
    """Random ones under the family's names, as its own code would have saved them."""
    found = {n: torch.randn(s, generator=torch_generator(seed, n)) for n, s in published_shapes(cfg).items()}
    if isinstance(cfg, STDiTConfig):
        found["pos_embed"], found["pos_embed_temporal"] = torch.zeros(1, 9, 24), torch.zeros(1, 4, 24)
    return found


def ours(cfg: Any, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truth: the same in our order, written out."""
    t, h, w = cfg.patch_size
    found = {}
    for name, tensor in published.items():
        if name.startswith("x_embedder") and name.endswith("proj.weight"):
            found[name.replace(".proj.", ".")] = rearrange(tensor, "d c t h w -> d (c t h w)")
        elif name.startswith("x_embedder"):
            found[name.replace(".proj.", ".")] = tensor
        elif name.startswith("final_layer.linear."):
            found[name] = rearrange(tensor, "(t h w c) ... -> (c t h w) ...", t=t, h=h, w=w)
        elif not name.startswith("pos_embed"):
            found[name] = tensor
    return found


def files(folder: Path, state: dict[str, Tensor]) -> Iterator[Path]:
    """The same weights in every kind of file that was published."""
    save_file(state, folder / "plain.safetensors")
    yield folder / "plain.safetensors"
    for name, content in {
        "plain.pt": state,
        "ema.pt": {"ema": state, "step": 3},
        "state_dict.pth": {"state_dict": state},
    }.items():
        torch.save(content, folder / name)
        yield folder / name
    hub = folder / "hub"
    hub.mkdir()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, hub / "model.safetensors")
    (hub / "config.json").write_text('{"model_type": "STDiT"}')
    yield hub


@pytest.mark.parametrize("kind", SMALL)
def test_published_files_load_strictly(tmp_path: Path, kind: str) -> None:
    cfg, state = SMALL[kind], weights(SMALL[kind])
    format, truth = family_of(cfg).weights, ours(cfg, state)
    for path in files(tmp_path, state):
        model = build_model(cfg)
        report = load_into(model, path, format, to=format.layout(cfg))
        assert report.fits and set(report.recomputed) == {name for name in state if name.startswith("pos_embed")}
        found = model.state_dict()
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in truth.items()), path


@pytest.mark.parametrize("kind", SMALL)
def test_export_is_the_familys_own(tmp_path: Path, kind: str) -> None:
    cfg, state = SMALL[kind], weights(SMALL[kind])
    format, layout = family_of(cfg).weights, family_of(cfg).weights.layout(SMALL[kind])
    path = tmp_path / "model.safetensors"
    save_state_dict(ours(cfg, state), path, format, source=layout, to=PUBLISHED)
    exported = load_file(path)
    wanted = {name: tensor for name, tensor in state.items() if not name.startswith("pos_embed")}
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    cfg, state = SMALL[kind], weights(SMALL[kind])
    block = "spatial_blocks" if kind in ("stdit3", "windows") else "blocks"
    state.pop(f"{block}.1.mlp.fc1.bias")
    state["strange"] = torch.zeros(1)
    state["t_block.1.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as error:
        format = family_of(cfg).weights
        load_into(build_model(cfg), tmp_path / "bad.safetensors", format, to=format.layout(cfg))
    text = str(error.value)
    assert "\n" not in text and f"{block}.1.mlp.fc1.bias" in text and "strange" in text and "t_block.1.bias" in text


def started(tmp_path: Path, cfg: Any, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """(weights of a model that starts from this file, what is said of it), read a part at a time."""
    path = tmp_path / "start.safetensors"
    save_file(state, path)
    model, format = build_model(cfg), family_of(cfg).weights
    init_model_(model, 3)
    file, report = load_state_dict_for(
        model,
        path,
        format,
        to=format.layout(cfg),
        allow_missing=format.may_lack,
        refit=format.refit,  # type: ignore[attr-defined]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = parameter.shape[0] if parameter.ndim else 0
            for start in range(0, rows, 5):
                file.read_part(name, (start, *[0] * (parameter.ndim - 1)), parameter[start : start + 5])
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, str(report)


def pixart_state(cfg: Any) -> dict[str, Tensor]:
    """As PixArt's own files: a plane of patches, tables of positions."""
    state = {n: torch.randn(s, generator=torch_generator("p", n)) for n, s in published_shapes(cfg).items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, 0].contiguous()
    return state | {"pos_embed": torch.zeros(1, 9, 24)}


def test_stdit_starts_from_pixart(tmp_path: Path) -> None:
    """Attention along time starts at zero, all else is the file's, and a longer null text ends in its last row."""
    pixart, cfg = PixArtConfig(**_SHAPE), replace(SMALL["stdit"], model_max_length=5)
    state = pixart_state(pixart)
    found, said = started(tmp_path, cfg, state)
    assert "left at their initial values: blocks.0.attn_temp" in said
    assert "made to fit (file, model): y_embedder.y_embedding (3, 6), (5, 6)" in said
    truth = ours(cfg, state | {"x_embedder.proj.weight": state["x_embedder.proj.weight"][:, :, None]})
    null = truth.pop("y_embedder.y_embedding")
    assert torch.equal(found["y_embedder.y_embedding"], torch.cat((null, null[-1:], null[-1:])))
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    new = {name: found[name] for name in found.keys() - truth.keys() - {"y_embedder.y_embedding"}}
    assert new and all("attn_temp" in name for name in new)
    assert all(not tensor.any() for name, tensor in new.items() if "proj" in name)


def test_stdit3_starts_from_pixart_sigma_with_more_channels(tmp_path: Path) -> None:
    """Its blocks are the spatial ones; temporal blocks add nothing; 4 channels stand for 16, null texts are cut."""
    sigma = PixArtSigmaConfig(**_SHAPE, qk_norm=True)
    cfg = replace(SMALL["windows"], in_channels=16, model_max_length=2)
    state = pixart_state(sigma)
    found, said = started(tmp_path, cfg, state)
    for name, pair in {
        "x_embedder.weight": "(24, 4, 2, 2), (24, 64)",
        "final_layer.linear.weight": "(32, 24), (128, 24)",
        "y_embedder.y_embedding": "(3, 6), (2, 6)",
    }.items():
        assert f"{name} {pair}" in said
    conv = state["x_embedder.proj.weight"]
    assert torch.equal(found["x_embedder.weight"], (conv.repeat(1, 4, 1, 1) / 4).flatten(1))
    for kind in ("weight", "bias"):
        last = state[f"final_layer.linear.{kind}"].unflatten(0, (4, 2, 4))  # places, halves, channels
        repeated = torch.cat([last] * 4, dim=2)  # (4, 2, 16, ...)
        wanted = rearrange(repeated, "p s c ... -> (s c p) ...")
        assert torch.equal(found[f"final_layer.linear.{kind}"], wanted)
    for name, tensor in state.items():
        if name.startswith("blocks."):
            assert torch.equal(found[f"spatial_{name}"], tensor), name
    for name, tensor in found.items():
        if name.startswith("temporal_blocks.") and name.endswith(("proj.weight", "mlp.fc2.weight")):
            assert not tensor.any(), name
    assert not found["x_embedder_cond.weight"].any() and not found["fps_embedder.mlp.2.weight"].any()


def test_what_is_made_to_fit_is_for_training_alone(tmp_path: Path) -> None:
    cfg = replace(SMALL["windows"], in_channels=16)
    save_file(weights(SMALL["windows"]), tmp_path / "four.safetensors")
    format = family_of(cfg).weights
    with pytest.raises(UserError, match=r"x_embedder\.weight"):
        load_into(build_model(cfg), tmp_path / "four.safetensors", format, to=format.layout(cfg))


def test_initial_weights_say_what_they_made_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pixart.safetensors"
    save_file(pixart_state(PixArtConfig(**_SHAPE)), path)
    train, lora = SimpleNamespace(init_from=str(path)), SimpleNamespace(rank=0)
    cfg: Any = SimpleNamespace(seed=0, model=SMALL["stdit"], train=train, lora=lora)
    check_initial(cfg)
    source = initial_weights(cfg, build_model(SMALL["stdit"]))
    value = torch.ones(24, 24)
    source("blocks.0.attn_temp.proj.weight", value)  # type: ignore[operator]
    assert not value.any()
    said = capsys.readouterr()
    assert "left at their initial values: blocks.0.attn_temp" in said.out + said.err


def test_rotary_frequencies_of_another_head(tmp_path: Path) -> None:
    """Windows rotate thirds of a head: what a file has for whole heads is not theirs."""
    cfg = SMALL["windows"]
    state = weights(replace(cfg, kernel_size=None, use_spatial_rope=False))
    found, said = started(tmp_path, cfg, state)
    dim = cfg.rotary_dim
    assert "rope.freqs (6,), (2,)" in said
    wanted = torch.tensor([10000.0 ** (-2 * i / dim) for i in range(dim // 2)])
    torch.testing.assert_close(found["rope.freqs"], wanted)


def test_a_file_knows_what_is_frozen(tmp_path: Path) -> None:
    """The null text and rotary frequencies are read like weights."""
    path = tmp_path / "w.safetensors"
    save_file(weights(SMALL["stdit3"]), path)
    file = WeightFile(path, family_of(SMALL["stdit3"]).weights)
    assert {"rope.freqs", "y_embedder.y_embedding"} <= set(file)


@pytest.mark.parametrize("name", ["v1.1 STDiT2-XL/2", "v1.2 STDiT3-3B/2", "v1.3 STDiT3-XL/2"])
def test_hub_folders_say_what_model_they_are_of(tmp_path: Path, name: str) -> None:
    cfg = REAL[name]
    said = hub_config(cfg)
    assert said is not None and said["model_type"] == cfg.kind.replace("stdit", "STDiT")
    code = {"enable_flash_attn": True, "drop_path": 0.0, "class_dropout_prob": 0.1, "transformers_version": "4.39"}
    (tmp_path / "config.json").write_text(json.dumps(said | code))
    assert read_hub_config(tmp_path) == cfg


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "config.json"),
        ("[]", "config.json"),
        ('{"model_type": "STDiT3", "hidden_size": "wide"}', "hidden_size=wide"),
        ('{"model_type": "STDiT3", "hidden_size": 1153}', "num_heads"),
        ('{"model_type": "STDiT3", "patch_size": [1, 2]}', "patch_size"),
        ('{"model_type": "STDiT2", "qk_norm": 1}', "qk_norm=1"),
    ],
)
def test_a_hub_configuration_that_is_none_is_refused_in_one_line(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_hub_config(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_other_folders_say_nothing(tmp_path: Path) -> None:
    assert read_hub_config(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert read_hub_config(tmp_path) is None
    assert hub_config(STDiTConfig()) is None
