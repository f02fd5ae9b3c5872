"""Adapters in turn: weights are those of a model that was built with them, to the bit, and the base's again after."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acceleration import lora
from acceleration.distributed.runtime import Runtime
from acceleration.sharding import fsdp, tensor_parallel
from acceleration.sharding.adapter_swap import AdapterFile, AdapterSwap
from opensora.assembly.components import Components
from opensora.assembly.initial_weights import AdapterSource
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.find import find_source, read_adapters
from opensora.inference.load import load_components
from tests.dist.harness import run_distributed

# Joined rows (qkv), rows, and columns under tensor parallelism, with different ranks; the two files share some layers.
FILES = {
    "first": {"double_blocks.0.img_attn.qkv": 4, "double_blocks.1.img_attn.proj": 3, "single_blocks.2.linear2": 5},
    "second": {"double_blocks.0.img_attn.qkv": 2, "single_blocks.0.linear1": 4, "double_blocks.0.txt_mlp.0": 1},
}
# Added to whole tensors: rows and columns that tensor parallelism cuts, a bias, and a scale that nothing cuts.
DIFFERENCES = {
    "first": ("double_blocks.0.img_attn.qkv.bias", "single_blocks.2.linear2.weight"),
    "second": (
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.1.norm.query_norm.scale",
        "final_layer.linear.bias",
    ),
}
ENDINGS = {"weight": "diff", "bias": "diff_b"}
MESHES = [(1, {}), (2, {"ulysses": 2}), (2, {"tensor": 2}), (2, {"shard": 2})]


def write_adapters(folder: Path, *, differences: bool = True) -> dict[str, Path]:
    """Files for the model of opensora/pretrained/shapes, with differences or of two matrices a layer alone."""
    from opensora.assembly.initial_weights import parameter_shapes

    shapes = parameter_shapes(find_source(SampleConfig(weights="opensora/pretrained/shapes")).model)
    paths = {}
    for seed, (name, layers) in enumerate(FILES.items()):
        draw, tensors = torch.Generator().manual_seed(seed), {}
        for layer, rank in layers.items():
            rows, columns = shapes[f"{layer}.weight"]
            tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) / 8
            tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=draw) / 8
        for parameter in DIFFERENCES[name] if differences else ():
            layer, _, kind = parameter.rpartition(".")
            difference = torch.randn(shapes[parameter], generator=draw)
            tensors[f"{layer}.{ENDINGS[kind]}" if kind in ENDINGS else f"{parameter}.diff"] = difference
        paths[name] = folder / f"{name}.safetensors"
        save_file(tensors, paths[name])
    return paths


def built(mesh: dict[str, int], precision: str, path: Path | None) -> Components:
    words = [f"parallel.mesh.{axis}={degree}" for axis, degree in ({"shard": 1} | mesh).items()]
    words += [f"precision={precision}", "parallel.zero=2", "lora_scale=0.7", *([f"lora={path}"] if path else [])]
    cfg = load_config(SampleConfig, {"weights": "opensora/pretrained/shapes"}, words)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return load_components(cfg, find_source(cfg), Runtime(rank, world, rank, torch.device("cpu")))


def weights(parts: Components) -> dict[str, Tensor]:
    found = parts.model.named_parameters()
    return {name: fsdp.local(value).clone() for name, value in found if not lora.is_adapter(name)}


def swapped(mesh: dict[str, int], precision: str, paths: dict[str, Path]) -> list[tuple[str | None, list[str]]]:
    """(adapters, weights that are not as they should be) of every turn, on this process."""
    parts = built(mesh, precision, None)
    swap, cfg = AdapterSwap(parts.model, parts.device), parts.cfg
    truth = {None: weights(parts)} | {name: weights(built(mesh, precision, path)) for name, path in paths.items()}
    files = {}
    for name, path in paths.items():
        exported = read_adapters(path, cfg, "lora").exported
        assert exported is not None
        assert {*exported.differences} == {*DIFFERENCES[name]}
        files[name] = AdapterFile(
            sizes=exported.sizes(), values=AdapterSource(exported), scale=0.7, differences=exported.differences
        )
        differing = {key for key, value in truth[name].items() if not torch.equal(value, truth[None][key])}
        changed = {*DIFFERENCES[name], *(f"{layer}.weight" for layer in FILES[name])}
        assert differing == changed or torch.distributed.get_world_size() > 1
    turns = []
    for name in ("first", "second", None, "second", "first", None):
        swap.use(name, files[name] if name else None)
        found = weights(parts)
        turns.append((name, [key for key, value in truth[name].items() if not torch.equal(value, found[key])]))
    return turns


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "mesh"), MESHES)
def test_weights_are_those_of_a_model_built_with_them(
    world: int, mesh: dict[str, int], precision: str, tmp_path: Path
) -> None:
    for turns in run_distributed(swapped, world, mesh, precision, write_adapters(tmp_path)):
        assert turns == [(name, []) for name in ("first", "second", None, "second", "first", None)]


def whole(mesh: dict[str, int], path: Path | None) -> dict[str, Tensor]:
    """Full values of what differences are added to, of every process the same."""
    parts = built(mesh, "fp32", path)
    axis, held = parts.mesh["tensor"], dict(parts.model.named_parameters())
    names = sorted({*DIFFERENCES["first"], *DIFFERENCES["second"]})
    return {name: tensor_parallel.full(name, fsdp.full(held[name]), parts.model, axis).clone() for name in names}


def compared(mesh: dict[str, int], paths: dict[str, Path]) -> list[str]:
    """What is not base + 0.7 difference (+ 0.7 B A) by the formula, in fp64."""
    base, wrong = whole(mesh, None), []
    for name, path in paths.items():
        file, found = load_file(path), whole(mesh, path)
        for parameter, value in base.items():
            wanted, (layer, _, kind) = value.double(), parameter.rpartition(".")
            if parameter in DIFFERENCES[name]:
                wanted += 0.7 * file[f"{layer}.{ENDINGS[kind]}" if kind in ENDINGS else f"{parameter}.diff"].double()
            if layer in FILES[name] and kind == "weight":
                wanted += 0.7 * (file[f"{layer}.lora_B.weight"].double() @ file[f"{layer}.lora_A.weight"].double())
            wrong += [] if (wanted - found[parameter]).abs().max() < 1e-6 else [f"{name} {parameter}"]
    return wrong


@pytest.mark.parametrize(("world", "mesh"), MESHES)
def test_differences_are_added_as_they_are(world: int, mesh: dict[str, int], tmp_path: Path) -> None:
    for wrong in run_distributed(compared, world, mesh, write_adapters(tmp_path)):
        assert wrong == []
