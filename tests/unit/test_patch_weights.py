"""Files of DiT, Latte and PixArt: names and shapes of the real sizes, published forms, strictness, the way back."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.cli import convert
from opensora.config.load import to_yaml
from opensora.models.dit import SIZES as DIT
from opensora.models.dit import DiTConfig
from opensora.models.families import build_model, family_of, has_frozen_parameters
from opensora.models.latte import SIZES as LATTE
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.models.pixart.config import MS_SIZES, SIGMA_SIZES
from opensora.models.pixart.config import SIZES as PIXART
from opensora.models.weights.adapter_fit import plan_adapter
from opensora.models.weights.patches import PUBLISHED, channels_first, channels_last
from opensora.models.weights.reader import WeightFile, load_into
from opensora.models.weights.writer import convert_shapes, convert_state_dict, save_state_dict, shapes_of
from opensora.utils.errors import UserError

REAL: dict[str, Any] = {
    "v1.0 DiT-XL/2 label_1000 1x256x256": replace(DIT["xl2"], condition="label_1000"),
    "v1.0 DiT-XL/2 text (CLIP B/32) 1x256x256": DIT["xl2"],
    "v1.0 DiT-XL/2x2 text 16x256x256": DIT["xl2x2"],
    "v1.0 Latte-XL/2 label_101 16x256x256": replace(LATTE["xl2"], condition="label_101"),
    "v1.0 Latte-XL/2 text 16x256x256": LATTE["xl2"],
    "v1.0 PixArt-XL/2 1x512x512": PIXART["xl2"],
    "v1.0 PixArtMS-XL/2 1x1920x512": MS_SIZES["xl2"],
    "v1.2 PixArt-1B/2 1x2048x2048": PIXART["1b2"],
    "v1.2 PixArt-Sigma-XL/2 1x2048x2048": replace(
        SIGMA_SIZES["xl2"],
        kv_compress_sampling="conv",
        kv_compress_scale_factor=2,
        kv_compress_layer=tuple(range(14, 28)),
    ),
}
_SMALL: dict[str, Any] = {"hidden_size": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "caption_channels": 10}
SMALL: dict[str, Any] = {
    "dit": DiTConfig(**_SMALL),
    "dit_class": DiTConfig(**_SMALL, condition="label_5"),
    "dit_xl2x2": DiTConfig(**_SMALL, patch_size=(2, 2, 2)),
    "dit_noise_alone": DiTConfig(**_SMALL, patch_size=(1, 2, 3), learn_sigma=False, in_channels=3),
    "latte": LatteConfig(**_SMALL),
    "latte_class": LatteConfig(**_SMALL, condition="label_5"),
    "pixart": PixArtConfig(**_SMALL, model_max_length=6),
    "pixart_ms": PixArtMSConfig(**_SMALL, model_max_length=6),
    "pixart_sigma": PixArtSigmaConfig(
        **_SMALL,
        model_max_length=6,
        qk_norm=True,
        kv_compress_sampling="conv",
        kv_compress_scale_factor=2,
        kv_compress_layer=(1,),
    ),
}


def filled(cfg: Any) -> nn.Module:
    model = build_model(cfg)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def theirs(cfg: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    format = family_of(cfg).weights
    return convert_state_dict(state, format, source=format.layout(cfg), to=PUBLISHED)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_real_sizes(golden: Path, name: str) -> None:
    """Exports have every name of the family but the tables that it computes, and its files fill our model exactly."""
    truth = json.loads((golden / "v1" / "names.json").read_text())[name]
    published = {n: tuple(shape) for n, shape in truth["shapes"].items()}
    cfg = REAL[name]
    with torch.device("meta"):
        model = build_model(cfg)
    ours = {n: tuple(tensor.shape) for n, tensor in model.state_dict().items()}
    format = family_of(cfg).weights
    kept = {n: shape for n, shape in published.items() if not n.startswith("pos_embed")}
    assert convert_shapes(ours, format, source=format.layout(cfg), to=PUBLISHED) == kept
    assert convert_shapes(kept, format, source=PUBLISHED, to=format.layout(cfg)) == ours
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == truth["trainable"]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in truth["buffers"] if not n.startswith("pos_embed")}
    assert has_frozen_parameters(cfg) == bool(frozen)


@pytest.mark.parametrize("name", SMALL)
def test_exports_are_the_familys_files(name: str, tmp_path: Path) -> None:
    """What we write has its names and shapes; what we read of it is what was written; metadata is not needed."""
    cfg = SMALL[name]
    model, format, file = filled(cfg), family_of(cfg).weights, tmp_path / "model.safetensors"
    save_state_dict(model.state_dict(), file, format, source=format.layout(cfg), to=format.original)
    state = load_file(file)
    assert equal(state, theirs(cfg, model.state_dict()))
    if not name.startswith("latte"):
        assert {n.replace("x_embedder.proj.", "x_embedder.") for n in state} == model.state_dict().keys()
    assert state["x_embedder.proj.weight"].shape == (24, cfg.in_channels, *cfg.patch_size)
    save_file(state, tmp_path / "bare.safetensors")
    for path in (file, tmp_path / "bare.safetensors"):
        again = build_model(cfg)
        report = load_into(again, path, format, to=format.layout(cfg))
        assert report.fits and equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_our_own_layout_goes_round(name: str, tmp_path: Path) -> None:
    cfg = SMALL[name]
    model, format = filled(cfg), family_of(cfg).weights
    save_state_dict(model.state_dict(), tmp_path / "a.safetensors", format, source=format.layout(cfg))
    again = build_model(cfg)
    load_into(again, tmp_path / "a.safetensors", format, to=format.layout(cfg))
    assert equal(again.state_dict(), model.state_dict())
    published = WeightFile(tmp_path / "a.safetensors", format, PUBLISHED)  # knows patches by its metadata
    assert equal(dict(published), theirs(cfg, model.state_dict()))


def test_published_channels_of_a_token_come_last() -> None:
    """Row (pt, ph, pw, c) of a file is what our row (c, pt, ph, pw) is made of, written out."""
    pt, ph, pw, c = 2, 3, 2, 4
    first, last = channels_first(48, (pt, ph, pw)), channels_last(48, (pt, ph, pw))
    assert first is not None and last is not None
    for i in range(pt):
        for j in range(ph):
            for k in range(pw):
                for channel in range(c):
                    ours, published = ((channel * pt + i) * ph + j) * pw + k, ((i * ph + j) * pw + k) * c + channel
                    assert first[ours] == published and last[published] == ours
    assert channels_first(47, (2, 3, 2)) is None


def torch_file(path: Path, state: dict[str, Any]) -> Path:
    torch.save(state, path)
    return path


def images(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a model of stills has its patches: without a time axis."""
    return state | {"x_embedder.proj.weight": state["x_embedder.proj.weight"][:, :, 0]}


def test_files_of_the_original_image_models(tmp_path: Path) -> None:
    """DiT's plain file, Latte's average, PixArt's checkpoint: planes for patches, tables of positions, more entries."""
    forms = {
        "dit_class": lambda state: images(state) | {"pos_embed": torch.zeros(1, 16, 24)},
        "latte_class": lambda state: {
            "ema": images(state) | {"pos_embed": torch.zeros(1, 16, 24), "temp_embed": torch.zeros(1, 16, 24)},
            "model": {name: tensor + 1 for name, tensor in state.items()},
            "train_steps": 7,
        },
        "pixart": lambda state: {
            "state_dict": images(state) | {"pos_embed": torch.zeros(1, 16, 24)},
            "epoch": 3,
        },
        "pixart_ms": lambda state: {"state_dict": images(state)},
        "dit": lambda state: {
            "ema": state | {"pos_embed_spatial": torch.zeros(1, 4), "pos_embed_temporal": torch.zeros(1)}
        },
    }
    for name, form in forms.items():
        cfg = SMALL[name]
        model, again, format = filled(cfg), build_model(cfg), family_of(cfg).weights
        path = torch_file(tmp_path / f"{name}.pt", form(theirs(cfg, model.state_dict())))
        report = load_into(again, path, format, to=format.layout(cfg))
        assert equal(again.state_dict(), model.state_dict()), name
        assert len(report.recomputed) == {"pixart_ms": 0, "dit": 2, "latte_class": 2}.get(name, 1), name


def test_sharded_checkpoints_of_the_family(tmp_path: Path) -> None:
    """A folder with shards of torch.save and an index below ``model``; a shard that is not there is named."""
    cfg = SMALL["pixart"]
    model, again, format = filled(cfg), build_model(cfg), family_of(cfg).weights
    state, folder = theirs(cfg, model.state_dict()), tmp_path / "epoch0-global_step7"
    (folder / "model").mkdir(parents=True)
    names = [f"pytorch_model-{number:05d}.bin" for number in (1, 2, 3)]
    placed = {name: names[index % 3] for index, name in enumerate(sorted(state))}
    for file in names:
        torch_file(folder / "model" / file, {name: state[name] for name in state if placed[name] == file})
    index = folder / "model" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for place in (folder, folder / "model", index):
        load_into(again, place, format, to=format.layout(cfg))
        assert equal(again.state_dict(), model.state_dict())
    (folder / "model" / names[1]).unlink()
    with pytest.raises(UserError, match=r"names files that are not beside it \(pytorch_model-00002.bin\)"):
        load_into(again, folder, format, to=format.layout(cfg))


class Stranger:
    """What a pickle may hold beside tensors."""


def test_programs_are_not_unpickled(tmp_path: Path) -> None:
    cfg = SMALL["dit"]
    format = family_of(cfg).weights
    path = torch_file(tmp_path / "a.pt", {"ema": theirs(cfg, filled(cfg).state_dict()), "args": Stranger()})
    with pytest.raises(UserError, match="holds more than tensors"):
        load_into(build_model(cfg), path, format, to=format.layout(cfg))


def keys_of(cfg: Any) -> list[str]:
    """The configuration as it is typed on a command line."""
    return [f"model.{line}" for line in to_yaml(cfg).replace(": ", "=").splitlines()]


def test_the_command_writes_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint with more than weights, which is read as it would be; what does not fit is a line, and writes
    nothing."""
    cfg = SMALL["pixart"]
    model, out = filled(cfg), tmp_path / "out"
    state = {name: tensor.half() for name, tensor in theirs(cfg, model.state_dict()).items()}
    path = torch_file(tmp_path / "a.pth", {"state_dict": state | {"pos_embed": torch.zeros(1, 16, 24)}, "epoch": 3})
    assert convert.main([str(path), "--to", str(out), *keys_of(cfg)]) == 0
    assert "tensors loaded; 1 computed by the model and not read: pos_embed" in capsys.readouterr().out
    assert equal(load_file(out / "model.safetensors"), state)
    for other, said in ((SMALL["pixart_ms"], "missing"), (replace(cfg, depth=2), "unexpected")):
        with pytest.raises(UserError, match=said):
            convert.main([str(path), "--to", str(tmp_path / "nothing"), *keys_of(other)])
    broken = torch_file(tmp_path / "b.pth", {"state_dict": state | {"t_block.1.bias": torch.full((144,), torch.inf)}})
    with pytest.raises(UserError, match=r"t_block.1.bias holds NaN or infinite values"):
        convert.main([str(broken), "--to", str(tmp_path / "nothing"), *keys_of(cfg)])
    with pytest.raises(UserError, match=r"model: missing"):
        convert.main([str(path), "--to", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", SMALL)
def test_loading_is_strict(name: str, tmp_path: Path) -> None:
    """Seeded damages of every tensor: one line that names it, whatever is missing, strange or of another shape."""
    cfg = SMALL[name]
    state, format = theirs(cfg, filled(cfg).state_dict()), family_of(cfg).weights
    draw = random.Random(name)
    for damaged in draw.sample(sorted(state), 6):
        missing = {n: x for n, x in state.items() if n != damaged}
        wrong = state | {damaged: torch.zeros(*[size + 1 for size in state[damaged].shape])}
        for tensors, said in ((missing, "1 missing"), (wrong, "of another shape")):
            save_file(tensors, tmp_path / "a.safetensors")
            with pytest.raises(UserError, match=said) as caught:
                load_into(build_model(cfg), tmp_path / "a.safetensors", format, to=format.layout(cfg))
            assert len(str(caught.value).splitlines()) == 1
    save_file(state | {"blocks.9.attn.qkv.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="1 unexpected"):
        load_into(build_model(cfg), tmp_path / "a.safetensors", format, to=format.layout(cfg))


def test_weights_of_another_kind_or_vendor_are_refused(tmp_path: Path) -> None:
    save_file(theirs(SMALL["pixart_ms"], filled(SMALL["pixart_ms"]).state_dict()), tmp_path / "ms.safetensors")
    save_file({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, tmp_path / "diffusers.safetensors")
    for path, said in (("ms", "unexpected"), ("diffusers", "diffusers' names")):
        cfg = SMALL["pixart"]
        with pytest.raises(UserError, match=said):
            load_into(
                build_model(cfg),
                tmp_path / f"{path}.safetensors",
                family_of(cfg).weights,
                to=family_of(cfg).weights.layout(cfg),
            )


@pytest.mark.parametrize("rows", [1, 4, 6, 9])
def test_the_null_text_is_as_long_as_the_models_texts(rows: int, tmp_path: Path) -> None:
    """A longer file is cut, the last row of a shorter one repeated."""
    cfg = SMALL["pixart"]
    state, format = theirs(cfg, filled(cfg).state_dict()), family_of(cfg).weights
    null = torch.randn(rows, 10)
    save_file(state | {"y_embedder.y_embedding": null}, tmp_path / "a.safetensors")
    model = build_model(cfg)
    load_into(model, tmp_path / "a.safetensors", format, to=format.layout(cfg))
    expected = torch.stack([null[min(row, rows - 1)] for row in range(6)])
    assert torch.equal(model.get_parameter("y_embedder.y_embedding"), expected)


def test_any_shape_goes_round(tmp_path: Path) -> None:
    """Seeded patches, channels and depths."""
    draw = random.Random(14)
    for _ in range(30):
        kind = draw.choice([DiTConfig, LatteConfig, PixArtConfig])
        cfg = kind(
            hidden_size=4 * draw.randint(1, 4),
            depth=draw.randint(1, 5),
            num_heads=1,
            patch_size=tuple(draw.randint(1, 3) for _ in range(3)),
            in_channels=draw.randint(1, 5),
            caption_channels=draw.randint(1, 5),
        )
        model, format = filled(cfg), family_of(cfg).weights
        back = convert_state_dict(theirs(cfg, model.state_dict()), format, source=PUBLISHED, to=format.layout(cfg))
        assert equal(back, model.state_dict())


@pytest.mark.parametrize("name", ["dit_xl2x2", "latte", "pixart"])
@pytest.mark.parametrize("stated", ["", "linear", "convolution"])
def test_adapters_by_either_names_and_in_either_order(name: str, stated: str) -> None:
    """Rows of an adapter of the last layer are the family's unless the file says otherwise, or has names of ours."""
    cfg = SMALL[name]
    format, shapes = family_of(cfg).weights, shapes_of(build_model(cfg).state_dict())
    published = stated != "linear"
    block = "blocks.1" if published or name != "latte" else "temporal_blocks.0"
    outputs = shapes["final_layer.linear.weight"][0]
    layers = {f"{block}.attn.qkv": (24, 72), "final_layer.linear": (24, outputs)}
    metadata = {"patches": stated} if stated else {}
    plan = plan_adapter(layers, shapes, format, format.layout(cfg), metadata)
    ours = "temporal_blocks.0" if name == "latte" else "blocks.1"
    assert set(plan.pieces) == {f"{ours}.attn.qkv", "final_layer.linear"}
    (last,) = plan.pieces["final_layer.linear"]
    order = torch.empty(outputs, dtype=torch.int64)
    order[last.places] = last.rows
    expected = channels_first(outputs, cfg.patch_size) if published else range(outputs)
    assert expected is not None and order.tolist() == list(expected)
    assert bool(plan.guess) == (not stated)
