"""The exchange itself: what goes where, in how many bytes; and that a model only needs to state its structure."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.config import MeshConfig
from acceleration.distributed import collectives
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import Mesh
from acceleration.sequence import SequenceParallel, UlyssesAttention, fill_slots
from tests.dist.harness import run_distributed
from tests.dist.toy import Core, Toy

BATCH, HEADS, DIM = 2, 4, 6


def ulysses_mesh() -> Mesh:
    return meshes.build(MeshConfig(ulysses=-1, shard=1), dist.get_world_size(), torch.device("cpu"))


def qkv(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(3, BATCH, tokens, HEADS, DIM, generator=generator, dtype=torch.float64)


def attend(tokens: int) -> tuple[Tensor, Tensor, int]:
    """Output and gradient of q, k, v for the whole sequence, and the bytes that this process sent in forward."""
    mesh = ulysses_mesh()
    axis, sequence = mesh["ulysses"], SequenceParallel(mesh)
    whole = qkv(tokens)
    local = sequence.shard(whole, dim=2).requires_grad_()
    out = UlyssesAttention(Core(), axis)(*local, context=sequence.context(0, tokens))
    sent = axis.bytes_sent
    (out**3).sum().backward()
    assert local.grad is not None
    return sequence.gather(out, tokens), sequence.gather(local.grad, tokens, dim=2), sent


@pytest.mark.parametrize(("world", "tokens"), [(2, 8), (2, 7), (4, 12), (4, 9), (4, 3)])
def test_attention_equals_one_process(world: int, tokens: int) -> None:
    """Also where some processes hold no token at all."""
    whole = qkv(tokens).requires_grad_()
    out = Core()(*whole)
    (out**3).sum().backward()
    assert whole.grad is not None
    for found, gradient, _ in run_distributed(attend, world, tokens):
        assert torch.allclose(found, out, atol=1e-12, rtol=0)
        assert torch.allclose(gradient, whole.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_are_those_of_the_formula(world: int) -> None:
    """4 * B * L * D elements over p processes, of which 1/p stays at home."""
    tokens = 12
    predicted = 4 * BATCH * tokens * HEADS * DIM * 8 // world * (world - 1) // world
    for _, _, sent in run_distributed(attend, world, tokens):
        assert sent == predicted


def masked() -> float:
    mesh = ulysses_mesh()
    axis, sequence = mesh["ulysses"], SequenceParallel(mesh)
    whole = qkv(9)
    mask = torch.rand(BATCH, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[:, 0] = True
    out = UlyssesAttention(Core(), axis)(
        *sequence.shard(whole, dim=2), key_mask=sequence.shard(mask), context=sequence.context(0, 9)
    )
    return (sequence.gather(out, 9) - Core()(*whole, key_mask=mask)).abs().max().item()


def test_masks_travel_along() -> None:
    assert max(run_distributed(masked, 2)) < 1e-12


def too_few_heads() -> Any:
    mesh = ulysses_mesh()
    q = torch.zeros(1, 2, 1, 4)
    try:
        UlyssesAttention(Core(), mesh["ulysses"])(q, q, q, context=SequenceParallel(mesh).context(0, 4))
    except ValueError as error:
        return str(error)


def test_there_must_be_a_head_for_everyone() -> None:
    assert run_distributed(too_few_heads, 2) == ["1 attention heads cannot be split over ulysses=2"] * 2


def uneven_round_trip() -> bool:
    """An exchange there and back is the identity, for rows that nobody shares evenly."""
    axis = ulysses_mesh()["ulysses"]
    table = [[0, 2, 1], [3, 0, 0], [1, 1, 4]]  # rows from i to j
    send = table[axis.rank]
    receive = [row[axis.rank] for row in table]
    x = torch.randn(sum(send), 2, 3).transpose(1, 2)  # not contiguous
    there = collectives.all_to_all(x, send, receive, axis)
    return torch.equal(collectives.all_to_all(there, receive, send, axis), x)


def test_uneven_exchange() -> None:
    assert all(run_distributed(uneven_round_trip, 3))


def any_model() -> float:
    mesh = ulysses_mesh()
    sequence = SequenceParallel(mesh)
    torch.manual_seed(0)
    model, x, vec = Toy().double(), torch.randn(2, 7, 5).double(), torch.randn(2, 3).double()
    truth = model(x, vec)
    fill_slots(model, mesh)
    found = model(sequence.shard(x), vec, context=sequence.context(0, 7))
    return (sequence.gather(found, 7) - truth).abs().max().item()


def test_any_model_that_states_its_structure() -> None:
    assert max(run_distributed(any_model, 2)) < 1e-12
