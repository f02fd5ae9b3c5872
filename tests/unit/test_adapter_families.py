"""LoRA files of every family in every form, by draws: what is read and what is written adds the same to the weights.

Files are written and read here once more, from the definitions of the forms, and the truth is computed in fp64 from the
release's weights (tests/adapter_families.py).
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.assembly.adapter_files import FORM_NAMES, fitted_adapters
from opensora.assembly.initial_weights import parameter_shapes
from opensora.models.families import family_of
from opensora.models.weights.adapter_export import export_adapter, trained_adapter
from opensora.models.weights.adapter_fit import FittedAdapter
from opensora.models.weights.adapter_names import CONFIG, WEIGHTS
from opensora.utils.rng import torch_generator
from tests.adapter_families import CASES, Case

TYPES = (torch.float32, torch.float16, torch.bfloat16)
PREFIXES = ("diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "")
ENDINGS = ((".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"))


@dataclass(frozen=True)
class Low:
    """One adapter of a file."""

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def delta(self) -> Tensor:
        rank = self.down.shape[0]
        return (rank if self.alpha is None else self.alpha) / rank * self.up.double() @ self.down.double()


def drawn(case: Case, names: str, draw: random.Random, *, has_alpha: bool) -> dict[str, Low]:
    """Adapters of some layers, at least one, each of a rank and an alpha of its own."""
    cuts, dtype, key = case.cuts(names), draw.choice(TYPES), draw.random()
    chosen = draw.sample(sorted(cuts), draw.choice([1, 3, 10, len(cuts)]))
    lows = {}
    for name in chosen:
        (height, width), rank = case.shape(cuts[name]), draw.choice([1, 2, 3, 5])
        generator = torch_generator("low", str(key), name)
        down = torch.randn(rank, width, generator=generator).to(dtype)
        up = (0.1 * torch.randn(height, rank, generator=generator)).to(dtype)
        lows[name] = Low(down, up, draw.choice([1.0, 0.7, 3.0, 8.0]) if has_alpha else None)
    return lows


def with_lows(case: Case, names: str, lows: Mapping[str, Low]) -> dict[str, Tensor]:
    """Weights of our model with these adapters, by the formula."""
    wanted, cuts = case.weights(), case.cuts(names)
    for name, low in lows.items():
        delta = low.delta
        for layer, start, stop in cuts[name]:
            wanted[layer][start:stop] += delta[: stop - start]
            delta = delta[stop - start :]
    return case.ours(wanted)


def with_fitted(case: Case, fitted: FittedAdapter) -> dict[str, Tensor]:
    found = case.ours(case.weights())
    for layer, (rank, scale) in fitted.sizes().items():
        a, b = (fitted.tensor(f"{layer}.lora_{part}.weight").double() for part in "AB")
        assert a.shape[0] == b.shape[1] == rank
        found[layer] = found[layer] + scale * b @ a
    return found


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], why: str) -> None:
    assert found.keys() == wanted.keys()
    for layer, weight in wanted.items():
        assert (found[layer] - weight).abs().max() <= 1e-12, f"{why}: {layer}"


# -- Reading --


def written(lows: Mapping[str, Low], folder: Path, form: str, draw: random.Random) -> Path:
    if form == "peft":
        return as_peft(lows, folder)
    flat, (down, up), prefix = form == "kohya", draw.choice(ENDINGS), draw.choice(PREFIXES)
    tensors = {}
    for layer, low in lows.items():
        name = f"lora_unet_{layer.replace('.', '_')}" if flat else prefix + layer
        tensors[f"{name}{'.lora_down.weight' if flat else down}"] = low.down
        tensors[f"{name}{'.lora_up.weight' if flat else up}"] = low.up
        if low.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(low.alpha, dtype=torch.float64)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def as_peft(lows: Mapping[str, Low], folder: Path) -> Path:
    tensors, ranks, alphas = {}, {}, {}
    for layer, low in lows.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = low.down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = low.up
        ranks[f"^{layer}"] = low.down.shape[0]
        alphas[f"^{layer}"] = low.down.shape[0] if low.alpha is None else low.alpha
    config = {"peft_type": "LORA", "r": 7, "lora_alpha": 7, "rank_pattern": ranks, "alpha_pattern": alphas}
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def check_reading(family: str, form: str, seed: int, folder: Path) -> None:
    case, draw = CASES[family], random.Random(f"{family} {form} {seed}")
    names = draw.choice(["original", "diffusers"]) if form != "kohya" else "original"
    lows = drawn(case, names, draw, has_alpha=draw.random() < 0.7)
    fitted = fitted_adapters(written(lows, folder, form, draw), case.model, "lora")
    assert_equal(with_fitted(case, fitted), with_lows(case, names, lows), f"{family} {form} {seed} {names}")


@pytest.mark.parametrize("form", ["dotted", "kohya", "peft"])
@pytest.mark.parametrize("family", CASES)
def test_drawn_files_are_read(family: str, form: str, tmp_path: Path) -> None:
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check_reading(family, form, seed, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["dotted", "kohya", "peft"])
@pytest.mark.parametrize("family", CASES)
def test_many_drawn_files_are_read(family: str, form: str, tmp_path: Path) -> None:
    for seed in range(6, 100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check_reading(family, form, seed, folder)


# -- Writing --


@pytest.mark.parametrize(("family", "layer"), [("wan", "patch_embedding"), ("hunyuan_video", "img_in.proj")])
def test_the_embedding_of_patches_is_a_convolution_in_files(family: str, layer: str, tmp_path: Path) -> None:
    cfg = CASES[family].model
    height, width = CASES[family].linears()[layer]
    values = {f"{layer}.lora_A.weight": torch.ones(3, width), f"{layer}.lora_B.weight": torch.ones(height, 3)}
    format, shapes = family_of(cfg).weights, parameter_shapes(cfg)
    file = tmp_path / "lora.safetensors"
    layout, made = format.layout(cfg), trained_adapter(values, 1.0)
    export_adapter(file, made, "comfyui", shapes=shapes, format=format, layout=layout, metadata={})
    found = {name.removeprefix(f"diffusion_model.{layer}."): tuple(x.shape) for name, x in load_file(file).items()}
    assert found == {"lora_A.weight": (3, width // 4, 1, 2, 2), "lora_B.weight": (height, 3, 1, 1, 1)}


def parsed(path: Path, form: str) -> dict[str, Low]:
    """A file that we wrote, by the definition of its form alone."""
    tensors = load_file(path / WEIGHTS if path.is_dir() else path)
    down, up = ENDINGS[form == "kohya"]
    config = json.loads((path / CONFIG).read_text()) if form == "peft" else {}
    start = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}.get(
        form, "base_model.model."
    )
    lows = {}
    for key in [key for key in tensors if key.endswith(down)]:
        name = key.removesuffix(down)
        a, b = tensors.pop(key), tensors.pop(f"{name}{up}")
        alpha = tensors.pop(f"{name}.alpha").item() if form == "kohya" else None
        layer = name.removeprefix(start)
        assert name == start + layer
        if config:
            assert a.shape[0] == config["rank_pattern"].get(f"^{layer}", config["r"])
            alpha = config["alpha_pattern"].get(f"^{layer}", config["lora_alpha"])
        lows[layer] = Low(a.flatten(1), b.flatten(1), alpha)
    assert not tensors
    return lows


def exact(low: Low, alpha: float) -> Low:
    """With so few digits in B that alpha/rank, a quarter of a small number, rounds none of them away."""
    return Low(low.down, low.up.bfloat16().float(), alpha * low.down.shape[0] / 4)


def check_writing(family: str, seed: int, folder: Path) -> None:
    """Adapters of our layers in every form: what the file says by its definition, and what we read back."""
    case, draw = CASES[family], random.Random(f"{family} {seed}")
    drawn_lows = drawn(case, "original", draw, has_alpha=True)
    lows = {layer: exact(low, draw.choice([1.0, 3.0, 6.0])) for layer, low in drawn_lows.items()}
    wanted, tensors = with_lows(case, "original", lows), {}
    for layer, low in lows.items():
        tensors |= {f"{layer}.lora_A.weight": low.down, f"{layer}.lora_B.weight": case.to_ours(layer, low.up)}
    scales = {layer: (low.alpha or 0) / low.down.shape[0] for layer, low in lows.items()}
    ours = replace(trained_adapter(tensors, 1.0), scales=scales)
    format, shapes = family_of(case.model).weights, parameter_shapes(case.model)
    for form in FORM_NAMES:
        place, why = folder / form if form == "peft" else folder / f"{form}.safetensors", f"{family} {form} {seed}"
        layout = format.layout(case.model)
        export_adapter(place, ours, form, shapes=shapes, format=format, layout=layout, metadata={"step": "1"})
        fitted = fitted_adapters(place, case.model, "lora")
        assert_equal(with_fitted(case, fitted), wanted, why)
        assert {layer: rank for layer, (rank, _) in fitted.sizes().items()} == {
            layer: low.down.shape[0] for layer, low in lows.items()
        }
        assert_equal(by_definition(case, form, parsed(place, form), lows), wanted, f"{why}, by its definition")


def by_definition(case: Case, form: str, file: Mapping[str, Low], lows: Mapping[str, Low]) -> dict[str, Tensor]:
    """Weights of our model with the adapters of a file that was read by ``parsed``; ``lows``: layers of the release."""
    if form == "kohya":
        flat = {layer.replace(".", "_"): layer for layer in lows}
        file = {flat[layer]: low for layer, low in file.items()}
    if form != "peft":
        return with_lows(case, "diffusers" if form == "diffusers" else "original", file)
    found = case.ours(case.weights())
    return found | {layer: found[layer] + low.delta for layer, low in file.items()}


@pytest.mark.parametrize("family", CASES)
def test_drawn_adapters_are_written(family: str, tmp_path: Path) -> None:
    for seed in range(4):
        check_writing(family, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", CASES)
def test_many_drawn_adapters_are_written(family: str, tmp_path: Path) -> None:
    for seed in range(4, 60):
        check_writing(family, seed, tmp_path / str(seed))
