"""Models of the 1.x family against tensors that its published code has computed: output, loss, gradients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.dit import DiTConfig
from opensora.models.families import build_model, describe, family_of
from opensora.models.latte import LatteConfig
from opensora.models.pixart import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.models.weights.patches import PUBLISHED
from opensora.models.weights.writer import convert_state_dict
from opensora.utils.tokens import image_ids, pack, unpack

LIMIT = 1e-5


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - truth).abs().max() / truth.abs().max())


class Golden:
    """One file."""

    def __init__(self, folder: Path, name: str) -> None:
        with safe_open(folder / "v1" / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.args: dict[str, Any] = json.loads((folder / "v1" / "models.json").read_text())[name]["args"]

    def part(self, prefix: str) -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}
        return {key: x.float() if x.is_floating_point() else x for key, x in found.items()}


def shared_args(args: dict[str, Any], *names: str) -> dict[str, Any]:
    """Arguments of the published constructor under the same names as ours."""
    names = ("in_channels", "patch_size", "hidden_size", "depth", "num_heads", *names)
    return {name: tuple(args[name]) if isinstance(args[name], list) else args[name] for name in names if name in args}


def dit(args: dict[str, Any]) -> DiTConfig:
    return DiTConfig(**shared_args(args, "condition", "caption_channels", "no_temporal_pos_emb", "learn_sigma"))


def latte(args: dict[str, Any]) -> LatteConfig:
    return LatteConfig(**shared_args(args, "condition", "caption_channels", "no_temporal_pos_emb", "learn_sigma"))


def conditions(inputs: dict[str, Tensor]) -> Conditions:
    y, mask = inputs["y"], inputs.get("mask")
    if y.ndim == 1:
        return Conditions(label=y)
    size, text = inputs.get("data_info.hw"), y[:, 0]
    return Conditions(text=text, text_mask=None if mask is None else mask.bool(), pooled=text[:, 0], size=size)


def pixart(kind: type[PixArtConfig]) -> Callable[[dict[str, Any]], PixArtConfig]:
    def config(args: dict[str, Any]) -> PixArtConfig:
        names = ("caption_channels", "model_max_length", "space_scale", "time_scale", "no_temporal_pos_emb", "qk_norm")
        compress = {f"kv_compress_{name.removeprefix('kv_compress_')}": x for name, x in args.get(KV, {}).items()}
        lists = {name: tuple(x) if isinstance(x, list) else x for name, x in compress.items()}
        return kind(**shared_args(args, *names, "input_size", "base_size"), **lists)

    return config


KV = "kv_compress_config"
CASES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dit_v1_0_text": dit,
    "dit_v1_0_class": dit,
    "latte_v1_0_text": latte,
    "latte_v1_0_class": latte,
    "pixart_v1_0": pixart(PixArtConfig),
    "pixart_v1_2_base_size": pixart(PixArtConfig),
    "pixart_ms_v1_0": pixart(PixArtMSConfig),
    "pixart_sigma_v1_2": pixart(PixArtSigmaConfig),
}


def loaded(file: Golden, cfg: Any) -> nn.Module:
    """The model with the weights of the file, through the family's format."""
    format = family_of(cfg).weights
    weights = {n: x for n, x in file.part("w.").items() if not n.startswith("pos_embed")}
    ours = convert_state_dict(weights, format, source=PUBLISHED, to=format.layout(cfg))
    model = build_model(cfg)
    model.load_state_dict(ours)
    return model


@pytest.mark.parametrize("name", CASES)
def test_output_loss_and_gradients(golden: Path, name: str) -> None:
    file = Golden(golden, name)
    cfg = CASES[name](file.args)
    model, denoising, inputs = loaded(file, cfg), describe(cfg), file.part("in.")
    latents = inputs["x"].requires_grad_()
    grid = denoising.grid(tuple(latents.shape[2:]))
    x, positions = pack(latents, grid.patch), image_ids(grid.latents, grid.patch).expand(len(latents), -1, -1)
    if denoising.token_axes == "factored":
        x, positions = (tokens.unflatten(1, (grid.frames, -1)) for tokens in (x, positions))
    tokens = TokenBatch(x=x, positions=positions, grid=grid.sides)
    t = inputs["t"] if "t" in inputs else inputs["timestep"]
    arguments = family_of(cfg).arguments(cfg, tokens, t, conditions(inputs))
    if "data_info" in arguments:  # the files' ratio is not that of their size
        arguments["data_info"] = {"hw": inputs["data_info.hw"], "ar": inputs["data_info.ar"]}
    out = model(**arguments)
    out = unpack(out.flatten(1, -2), grid.latents, grid.patch)
    target = file.part("target")[""]
    loss = (out - target).square().mean()
    loss.backward()
    assert relative(out.detach(), file.part("out")[""]) <= LIMIT
    assert relative(loss.detach(), file.part("loss")[""]) <= LIMIT
    assert latents.grad is not None
    assert relative(latents.grad, file.part("g_in.")["x"]) <= LIMIT
    format = family_of(cfg).weights
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = convert_state_dict(gradients, format, source=format.layout(cfg), to=PUBLISHED)
    listed = file.part("g.")
    assert listed and listed.keys() <= theirs.keys()
    for parameter, gradient in listed.items():
        assert relative(theirs[parameter], gradient) <= LIMIT, parameter
