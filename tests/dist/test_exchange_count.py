"""Exchanges that a process takes part in, counted where it waits for them, equal those of the formula."""

import re
from collections import Counter
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist

from acceleration.accounting.exchange_count import step_exchanges
from acceleration.accounting.profiling import profile_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.distributed.comm_timer import WAITING
from acceleration.engines import build_engine
from acceleration.parallelize import parallelize
from acceleration.sequence import SequenceParallel
from opensora.models.families import MODEL_SIZES, build_model
from opensora.planner.meta_model import denoiser_inputs, run_denoiser
from tests import factored_family
from tests.dist.harness import run_distributed
from tests.dist.layouts import FP64, RECOMPUTE
from tests.dist.problem import MODEL
from tests.dist.test_parity import fill

BATCHES = (
    MicroBatch(samples=2, txt=5, img=45, frames=5, has_mask=True),
    MicroBatch(samples=1, txt=5, img=12, frames=1, has_mask=True),
)


def counted(model_cfg: Any, cfg: ParallelConfig) -> tuple[Counter[str], Counter[str]]:
    """Runs in every process: (counted, predicted), of the axes on which every exchange is waited for by name."""
    device = torch.device("cpu")
    mesh = meshes.build(cfg.mesh, dist.get_world_size(), device)
    place = RankLayout(meshes.view({name: mesh[name].degree for name in meshes.AXES}, dist.get_rank()), cfg)
    with torch.device("meta"):
        model, profile = build_model(model_cfg), profile_of(build_model(model_cfg), run_denoiser)
    parallelize(model, cfg, mesh, device, fill)
    engine = build_engine(model, cfg, OptimConfig(kind="sgd", lr=0.01, clip_norm=0.0), mesh)
    found: Counter[str] = Counter()

    def note(text: str) -> None:
        if match := re.search(r"(?:over|along) (\w+)$", text):
            found[match[1]] += 1

    WAITING.note = note
    for index, batch in enumerate(BATCHES):
        inputs = denoiser_inputs(model_cfg, batch, SequenceParallel(mesh), device=device)
        inputs = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
        engine.backward(engine.model(**inputs).square().sum(), last_microbatch=index == len(BATCHES) - 1)
    WAITING.note = lambda text: None
    predicted = Counter(step_exchanges(profile, place, BATCHES))
    predicted.pop("replicas", None)  # FSDP2's own, in the background
    return found, predicted


CASES = [
    ("joint", {"ulysses": 2}, 3, "none"),
    ("joint", {"ring": 2, "ulysses": 2}, 3, "selective"),
    ("factored", {"ulysses": 2}, 2, "full"),
    ("factored", {"ring": 2, "ulysses": 2}, 1, "full"),
    ("joint", {"ring": 3}, 2, "full"),
    ("joint", {"tensor": 2}, 0, "full"),
    ("joint", {"tensor": 2, "shard": 2}, 3, "none"),
    ("factored", {"shard": 2, "ulysses": 2}, 3, "selective"),
    ("windows", {"ulysses": 2}, 2, "full"),
    ("windows", {"ring": 2, "ulysses": 2}, 1, "selective"),
]
WINDOWS = MODEL_SIZES["stdit3"]["debug_v1_3"]


@pytest.mark.parametrize(
    ("kind", "mesh", "zero", "recompute"), [*CASES[:2], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[2:])]
)
def test_counted_is_predicted(kind: str, mesh: dict[str, int], zero: Any, recompute: str) -> None:
    model = {"joint": MODEL, "windows": WINDOWS}.get(kind, factored_family.ToyConfig())
    cfg = ParallelConfig(
        zero=zero, mesh=MeshConfig(**{"shard": 1} | mesh), recompute=RECOMPUTE[recompute], precision=FP64
    )
    world = prod(mesh.values())
    for found, predicted in run_distributed(counted, world, model, cfg, timeout=110):
        shared = Counter(tensor=int("tensor" in mesh))  # gradients that all hold but use for their own heads
        assert found == predicted + shared
