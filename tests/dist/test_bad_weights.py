"""Weights that hold NaN: every process says so, whichever of them has read the value."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.parallelize import parallelize
from opensora.assembly.initial_weights import FileSource
from opensora.models.families import MODEL_SIZES, build_model, init_model_
from opensora.models.mmdit.convert import FLUX, WEIGHTS
from opensora.models.weights.reader import load_state_dict_for
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed

MODEL = replace(MODEL_SIZES["mmdit"]["debug"], cond_embed=False)


def load(path: Path) -> str:
    with torch.device("meta"):
        model = build_model(MODEL)
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=-1))
    mesh = meshes.build(parallel.mesh, torch.distributed.get_world_size(), torch.device("cpu"))
    file = FileSource(load_state_dict_for(model, path, WEIGHTS, to=FLUX)[0], path)
    parallelize(model, parallel, mesh, torch.device("cpu"), file)
    try:
        file.check_values()
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 1.0])
def test_a_value_that_one_process_reads(value: float, tmp_path: Path) -> None:
    """In the last row, which is the last process's; and one that becomes infinite in the type of the model."""
    model = build_model(MODEL).double()
    init_model_(model, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["single_blocks.1.linear2.weight"][-1, -1] = value
    save_file(state, tmp_path / "m.safetensors")
    first, second = run_distributed(load, 2, tmp_path / "m.safetensors", timeout=60)
    if value == 1.0:
        assert first == second == "accepted"
    else:
        assert (
            first
            == second
            == (
                f"{tmp_path}/m.safetensors: single_blocks.1.linear2.weight (as float32) holds NaN or infinite values; "
                "give weights without"
            )
        )
