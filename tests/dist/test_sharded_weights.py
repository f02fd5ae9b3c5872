"""Published files of another family into sharded models: every process reads its own pieces, and no others."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from acceleration.config import MeshConfig, ParallelConfig
from acceleration.distributed import mesh as meshes
from acceleration.parallelize import parallelize
from acceleration.sharding import fsdp
from opensora.assembly.initial_weights import FileSource
from opensora.models.weights.reader import load_state_dict_for
from tests.dist.harness import run_distributed
from tests.film_weights import FILM, OURS, Film
from tests.unit.test_weight_formats import count_values, published, random_state


def load(path: Path) -> tuple[dict[str, Tensor], int]:
    """(full weights, values that this process took from the file)."""
    with torch.device("meta"):
        model = Film()
    parallel = ParallelConfig(zero=3, mesh=MeshConfig(shard=-1))
    mesh = meshes.build(parallel.mesh, torch.distributed.get_world_size(), torch.device("cpu"))
    file, _ = load_state_dict_for(model, path, FILM, to=OURS)
    asked = count_values(file)
    source = FileSource(file, path)
    parallelize(model, parallel, mesh, torch.device("cpu"), source)
    source.check_values()
    return {name: fsdp.full(parameter.detach()) for name, parameter in model.named_parameters()}, sum(asked)


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_reads_its_pieces(processes: int, tmp_path: Path) -> None:
    state = random_state()
    save_file(published(state), tmp_path / "m.safetensors")
    total = sum(tensor.numel() for tensor in state.values())
    for found, asked in run_distributed(load, processes, tmp_path, timeout=60):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert asked < 0.8 * total  # no process read all
