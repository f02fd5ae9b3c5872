"""Axis switches: what every process gets, for any sizes, types and trailing dims; gradients; and bytes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import AxisExchange, SequenceContext, SequenceParallel
from acceleration.sequence.layout import even_sizes
from opensora.utils.rng import torch_generator
from tests.dist.harness import run_distributed

CPU = torch.device("cpu")
SIZES = [(5, 7), (4, 4), (8, 2), (3, 1), (13, 6), (7, 30), (1, 9), (2, 0)]  # frames, places
TRAILING: list[tuple[int, ...]] = [(), (3,), (2, 5)]
TYPES = [torch.float64, torch.bfloat16, torch.bool, torch.int64]
HEADS = 1  # fewer than processes: few frames are exchanged too, and some processes have none


def whole(frames: int, places: int, trailing: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    drawn = torch.randint(0, 100, (2, frames, places, *trailing), generator=torch_generator(frames, places))
    return drawn.remainder(2).bool() if dtype == torch.bool else drawn.to(dtype)


def check_switches(mesh_cfg: MeshConfig) -> None:
    """Runs in every process: what each switch gives is the part of the whole that it should."""
    mesh = meshes.build(mesh_cfg, dist.get_world_size(), CPU)
    for part in [None, *[d for d in mesh.subgroups if mesh_cfg.dynamic]]:
        narrow = mesh.submesh(part)
        sequence = SequenceParallel(narrow)
        for frames, places in SIZES:
            context = sequence.factored_context(frames, places, HEADS)
            assert context is not None and context.switches == (narrow["ulysses"].degree > 1)
            for trailing in TRAILING:
                for dtype in TYPES:
                    check_one(mesh, narrow, context, whole(frames, places, trailing, dtype))


def check_one(mesh: meshes.Mesh, narrow: meshes.Mesh, context: SequenceContext, x: Tensor) -> None:
    ring, ulysses, sequence = narrow["ring"], narrow["ulysses"], SequenceParallel(narrow)
    to_space, to_time = (AxisExchange(axis, mesh["ulysses"], ring.rank) for axis in ("space", "time"))  # type: ignore[arg-type]
    first = ring.rank * ulysses.degree
    start, stop = sum(context.lengths[:first]), sum(context.lengths[: first + ulysses.degree])
    wanted = x.tensor_split(ulysses.degree, dim=1)[ulysses.rank][:, :, start:stop]  # first ones take the surplus
    assert wanted.shape[1] == even_sizes(x.shape[1], ulysses.degree)[ulysses.rank]
    here = sequence.shard(x, 2)
    assert torch.equal(to_space(here, context), wanted)
    assert torch.equal(to_time(wanted, context), here)
    if x.dtype == torch.float64:
        leaf = here.clone().requires_grad_()
        (to_space(leaf, context) * wanted.square()).sum().backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, here.square())  # each gradient came back to its place


@pytest.mark.parametrize(
    ("world", "mesh"),
    [
        (2, {"ulysses": 2, "dynamic": True}),
        (3, {"ulysses": 3}),
        (4, {"ring": 2, "ulysses": 2}),
        pytest.param(4, {"ulysses": 4, "dynamic": True}, marks=pytest.mark.slow),
        pytest.param(6, {"ring": 2, "ulysses": 3}, marks=pytest.mark.slow),
    ],
)
def test_every_process_gets_its_part(world: int, mesh: dict[str, int]) -> None:
    run_distributed(check_switches, world, MeshConfig(**{"shard": 1} | mesh), timeout=100)


@pytest.mark.parametrize(("frames", "places"), SIZES)
@pytest.mark.parametrize("degree", [2, 3, 8])
def test_bytes_are_half_of_ulysses(frames: int, places: int, degree: int) -> None:
    """On meta: both directions together send 2 T S D (p-1)/p over all processes; Ulysses sends 4."""
    sent = 0
    for rank in range(degree):
        mesh = meshes.view({"ulysses": degree}, rank)
        sequence = SequenceParallel(mesh)
        context = sequence.factored_context(frames, places, HEADS)
        x = torch.empty(2, frames, sequence.sizes(places)[rank], 6, device="meta")
        inside = AxisExchange("space", mesh["ulysses"])(x, context)
        assert inside.shape == (2, even_sizes(frames, degree)[rank], places, 6)
        assert AxisExchange("time", mesh["ulysses"])(inside, context).shape == x.shape
        sent += mesh["ulysses"].bytes_sent
    stays = sum(even_sizes(frames, degree)[rank] * even_sizes(places, degree)[rank] for rank in range(degree))
    assert sent == 2 * 2 * 6 * 4 * (frames * places - stays)


def test_a_wrong_shape_is_refused() -> None:
    mesh = meshes.view({"ulysses": 2})
    context = SequenceParallel(mesh).factored_context(4, 6, 2)
    for whole, shape in (("space", (1, 4, 4, 2)), ("space", (1, 3, 3, 2)), ("time", (1, 2, 5, 2))):
        with pytest.raises(AssertionError):
            AxisExchange(whole, mesh["ulysses"])(torch.empty(shape, device="meta"), context)  # type: ignore[arg-type]
