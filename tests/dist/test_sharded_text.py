"""Text encoders cut over processes: the same bits, memory that falls with every process, and nobody left waiting."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from acceleration.config import MeshConfig
from acceleration.diagnostics.memory_usage import Allocations, held
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.sharded_text import image_encoder_of, text_encoder_of
from opensora.assembly.token_layout import token_layout
from opensora.models.base import TextFeatures
from opensora.models.conditions import Conditions
from opensora.models.image import ClipVisionConfig, build_image_encoder
from opensora.models.text import ClipConfig, LlavaClipConfig, T5ClipConfig, T5Config, UMT5Config, build_text_encoder
from opensora.models.text.llava_clip import TEMPLATE
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed
from tests.text_models import write_clip_vision, write_llama, write_text_models, write_umt5
from tests.wan_clips import CLIP

CPU = torch.device("cpu")
LAYOUTS: dict[int, tuple[dict[str, int], ...]] = {
    1: ({},),
    2: ({}, {"ulysses": 2}),
    4: ({}, {"replicate": 2}, {"tensor": 2, "ulysses": 2}, {"ring": 2, "cfg": 2}),
}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> T5ClipConfig:
    """Blocks outweigh the rest, as they do in the published ones; rows that do not divide by two."""
    folder = tmp_path_factory.mktemp("text")
    write_text_models(folder, width=36, layers=6, vocabulary=385)
    return T5ClipConfig(t5_path=str(folder / "t5"), clip_path=str(folder / "clip"), max_tokens=10, shard=True)


def prompts_of(rank: int) -> list[list[str]]:
    """Calls with no prompt that is new, some, or many; other processes have other ones at the same time."""
    mine = [f"{rank} {'ab'[number % 2] * number}" for number in range(5 * rank)]
    return [["", *mine, *mine[:2]], ["", "the same for all"], mine[::-1] or [""], [""]]


def alone(cfg: T5ClipConfig, dtype: torch.dtype) -> list[TextFeatures]:
    """What this process's calls give in one process."""
    encoder = build_text_encoder(replace(cfg, shard=False, offload=False), CPU, dtype)
    return [encoder.encode(prompts) for prompts in prompts_of(dist.get_rank())]


def encoded(cfg: T5ClipConfig, axes: dict[str, int], dtype: torch.dtype, wanted: list[TextFeatures]) -> dict[str, Any]:
    """Whether all features are those of one process, bit for bit, and bytes of tensors on this one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = meshes.build(MeshConfig(shard=-1, **axes), world, CPU)
    with Allocations() as loading:
        encoder: Any = text_encoder_of(cfg, mesh, CPU, dtype)
    with Allocations() as encoding:
        calls = [encoder.encode(prompts) for prompts in prompts_of(rank)]
    equal = all(
        torch.equal(one.txt, other.txt) and torch.equal(one.y_vec, other.y_vec)
        for one, other in zip(calls, wanted, strict=True)
    )
    kept = held([p for part in encoder._modules for p in part.parameters()])
    return {"equal": equal, "kept": kept, "load peak": loading.peak, "left": loading.now, "encode": encoding.peak}


def all_layouts(cfg: T5ClipConfig, choices: tuple[dict[str, int], ...]) -> list[dict[str, Any]]:
    wanted = alone(cfg, torch.float32)
    return [encoded(cfg, axes, torch.float32, wanted) for axes in choices]


@pytest.fixture(scope="module")
def usages(cfg: T5ClipConfig) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """(processes, axes) -> what each process found."""
    found = {}
    for world, choices in LAYOUTS.items():
        by_rank = run_distributed(all_layouts, world, cfg, choices, timeout=110)
        for axes, usage in zip(choices, zip(*by_rank, strict=True), strict=True):
            found[world, " ".join(axes)] = list(usage)
    return found


def sizes(cfg: T5ClipConfig) -> tuple[int, int]:
    """Bytes of both encoders, and of their largest parameter."""
    tensors = [
        tensor.nbytes
        for path, part in ((cfg.t5_path, ("encoder.", "shared.")), (cfg.clip_path, ("text_model.",)))
        for name, tensor in load_file(Path(path) / "model.safetensors").items()
        if name.startswith(part) and not name.endswith("embed_tokens.weight")
    ]
    return sum(tensors), max(tensors)


Usages = dict[tuple[int, str], list[dict[str, Any]]]


def test_features_are_those_of_one_process(usages: Usages) -> None:
    assert all(one["equal"] for by_rank in usages.values() for one in by_rank)


def test_no_process_holds_the_whole(cfg: T5ClipConfig, usages: Usages) -> None:
    """Also while files are read; and copies over replicate are cut within."""
    total, largest = sizes(cfg)
    for (world, axes), by_rank in usages.items():
        pieces = world // 2 if axes == "replicate" else world
        for one in by_rank:
            assert one["kept"] <= 1.1 * total / pieces + 64, (world, axes)  # rows are dealt out by the largest piece
            assert one["load peak"] <= one["kept"] + largest + 4096, (world, axes)
        assert sum(one["kept"] for one in by_rank) >= total, (world, axes)  # nothing is held by nobody


def test_memory_falls_with_every_process(usages: Usages) -> None:
    one, two, four = (max(u["kept"] + u["encode"] for u in usages[world, ""]) for world in (1, 2, 4))
    assert four < two < one


def offloaded(cfg: T5ClipConfig) -> bool:
    found = encoded(replace(cfg, offload=True), {}, torch.float64, alone(cfg, torch.float64))
    return bool(found["equal"])


def test_pieces_in_cpu_memory(cfg: T5ClipConfig) -> None:
    assert run_distributed(offloaded, 2, cfg, timeout=60) == [True, True]


def refusal(cfg: T5ClipConfig) -> str:
    try:
        text_encoder_of(cfg, meshes.build(MeshConfig(shard=-1), dist.get_world_size(), CPU), CPU, torch.float32)
    except UserError as error:
        return str(error)
    return "accepted"


def test_a_value_that_one_process_reads(cfg: T5ClipConfig, tmp_path: Path) -> None:
    file = Path(cfg.t5_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.block.3.layer.1.DenseReluDense.wo.weight"][-1, -1] = math.nan
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (file.parent / name).is_file():
            (tmp_path / name).write_bytes((file.parent / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    first, second = run_distributed(refusal, 2, replace(cfg, t5_path=str(tmp_path)), timeout=60)
    wanted = f"text.t5_path={tmp_path}: block.3.layer.1.DenseReluDense.wo.weight (as float32) holds NaN or infinite"
    assert first == second and first.startswith(wanted)


def cut_alone(folder: str) -> list[bool]:
    """The others, each cut over all processes: whether features, masks and vectors are those of one."""
    mesh = meshes.build(MeshConfig(shard=-1), dist.get_world_size(), CPU)
    found = []
    for cfg in (
        T5Config(t5_path=f"{folder}/t5", max_tokens=10, shard=True),
        ClipConfig(clip_path=f"{folder}/clip", shard=True),
        UMT5Config(umt5_path=f"{folder}/umt5", max_tokens=10, shard=True),
        LlavaClipConfig(llava_path=f"{folder}/llama", clip_path=f"{folder}/clip", max_tokens=10, shard=True),
    ):
        encoder = text_encoder_of(cfg, mesh, CPU, torch.float32)
        whole = build_text_encoder(replace(cfg, shard=False), CPU, torch.float32)
        for prompts in prompts_of(dist.get_rank()):
            own, truth = vars(encoder.encode(prompts)), vars(whole.encode(prompts))
            found.append(all(x is None or torch.equal(own[name], x) for name, x in truth.items()))
    return found


def test_every_kind_by_itself(cfg: T5ClipConfig) -> None:
    folder = Path(cfg.t5_path).parent
    write_umt5(folder / "umt5", width=36, layers=3)
    write_llama(folder / "llama", "a b " + TEMPLATE.replace("{}", " "), width=24)
    for rank in run_distributed(cut_alone, 2, str(Path(cfg.t5_path).parent), timeout=110):
        assert len(rank) == 16 and all(rank)


def pictures_cut(folder: str) -> list[Any]:
    """An image encoder cut over processes, each with pictures of its own, and tokens of a clip that is cut."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = meshes.build(MeshConfig(shard=-1, ulysses=2), world, CPU)
    found = []
    choices: tuple[dict[str, Any], ...] = ({}, {"offload": True})
    for options in choices:
        cfg = ClipVisionConfig(path=folder, shard=True, **options)
        own, whole = (
            image_encoder_of(one, mesh, CPU, torch.float32) for one in (cfg, replace(cfg, shard=False, offload=False))
        )
        assert own is not None and whole is not None
        pictures = torch.rand(1 + rank, 3, 20, 30, generator=torch.Generator().manual_seed(rank)) * 2 - 1
        found.append(torch.equal(own.encode(pictures), whole.encode(pictures)))
        found.append(sum(p.to_local().numel() for p in own._modules[0].parameters()))  # type: ignore[attr-defined]
    layout = token_layout(CLIP, SequenceParallel(mesh))
    told = Conditions(text=torch.ones(2, 3, 12), image_tokens=torch.arange(12.0).view(2, 2, 3))
    mine = layout.shard_conditions(told, torch.zeros(2, 18, 16))
    assert mine.image_tokens is not None
    found.append(torch.equal(mine.image_tokens, told.image_tokens))  # type: ignore[arg-type]
    return found


def test_an_image_encoder_and_its_tokens_over_processes(tmp_path: Path) -> None:
    """Bits of one process, half the weights on each of two; tokens whole on every process."""
    write_clip_vision(tmp_path)
    alone: Any = build_image_encoder(ClipVisionConfig(path=str(tmp_path)), CPU, torch.float32)
    weights = sum(p.numel() for p in alone._clip.parameters())
    for found in run_distributed(pictures_cut, 2, str(tmp_path), timeout=110):
        equal, kept, equal_offloaded, kept_offloaded, whole = found
        assert equal and equal_offloaded and whole and kept == kept_offloaded
        assert 0.4 * weights <= kept <= 0.6 * weights
