"""Heads that do not divide the processes, with texts of unequal length: Ulysses, ring and one around the other.

Twelve heads over eight processes are those of Wan 1.3B; of three no two processes have as many. Text and
image tokens are cut each by itself, and the mask of the text goes where keys go.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import KERNELS
from acceleration.config import MeshConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import RingAttention, SequenceParallel, UlyssesAttention
from acceleration.sequence.layout import even_sizes
from opensora.assembly.layout import check_layout
from opensora.models.wan import SIZES
from opensora.utils.errors import UserError
from tests.dist.harness import run_distributed
from tests.dist.toy import Core

DIM, TEXT, IMAGE = 4, 7, 13
LENGTHS = (7, 1, 0, 4)  # words of the texts of a batch
BATCH = len(LENGTHS)
MESHES = [
    (12, {"ulysses": 8}),
    (12, {"ring": 2, "ulysses": 4}),
    (3, {"ulysses": 2}),
    (3, {"ring": 2, "ulysses": 2}),
    (3, {"ring": 5}),
    (3, {"ring": 3, "ulysses": 2}),
    (3, {"ring": 2, "ulysses": 3}),
]


def given(heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of the text and of the image, and which words there are."""
    generator = torch.Generator().manual_seed(heads)
    text = torch.randn(3, BATCH, TEXT, heads, DIM, generator=generator, dtype=torch.float64)
    image = torch.randn(3, BATCH, IMAGE, heads, DIM, generator=generator, dtype=torch.float64)
    return text, image, torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]


def truth(heads: int) -> list[Tensor]:
    """Outputs and gradients of text and image. What becomes of words that are not there is nobody's."""
    text, image, words = given(heads)
    text, image = text.requires_grad_(), image.requires_grad_()
    mask = torch.cat((words, words.new_ones(BATCH, IMAGE)), dim=1)
    out = Core()(*torch.cat((text, image), dim=2), key_mask=mask)
    (out**3 * mask[..., None, None]).sum().backward()
    assert text.grad is not None and image.grad is not None
    return [out[:, :TEXT].detach() * words[..., None, None], out[:, TEXT:].detach(), text.grad, image.grad]


def attend(degrees: dict[str, int], heads: int) -> tuple[list[Tensor], dict[str, int]]:
    """The same, put together from this process's shares, and the bytes that it sent in forward."""
    mesh = meshes.build(MeshConfig(**degrees), dist.get_world_size(), torch.device("cpu"))
    ring, ulysses, sequence = mesh["ring"], mesh["ulysses"], SequenceParallel(mesh)
    core: torch.nn.Module = KernelCore(KERNELS["cpu"])
    if ring.degree > 1:
        core = RingAttention(KERNELS["cpu"], ring, ulysses.degree)
    if ulysses.degree > 1:
        core = UlyssesAttention(core, ulysses, ring.rank)
    whole_text, whole_image, words = given(heads)
    text = sequence.shard(whole_text, 2, extra_to_last=True).requires_grad_()
    image, words = sequence.shard(whole_image, 2).requires_grad_(), sequence.shard(words, extra_to_last=True)
    mask = torch.cat((words, words.new_ones(BATCH, image.shape[2])), dim=1)
    out = core(*torch.cat((text, image), dim=2), key_mask=mask, context=sequence.context(TEXT, IMAGE))
    sent = {axis.name: axis.bytes_sent for axis in (ring, ulysses)}
    (out**3 * mask[..., None, None]).sum().backward()
    assert text.grad is not None and image.grad is not None
    texts, images = out[:, : text.shape[2]] * words[..., None, None], out[:, text.shape[2] :]
    sizes = sequence.sizes(TEXT, extra_to_last=True)
    parts = ((texts, sizes, 1), (images, sequence.sizes(IMAGE), 1), (text.grad, sizes, 2))
    found = [joined(x, sizes, dim) for x, sizes, dim in (*parts, (image.grad, sequence.sizes(IMAGE), 2))]
    return found, sent


def joined(x: Tensor, sizes: tuple[int, ...], dim: int) -> Tensor:
    """The shares of all processes in rank order."""
    longest = x.new_zeros((*x.shape[:dim], max(sizes), *x.shape[dim + 1 :]))
    longest.narrow(dim, 0, x.shape[dim]).copy_(x.detach())
    every = [torch.empty_like(longest) for _ in sizes]
    dist.all_gather(every, longest)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(every, sizes, strict=True)], dim)


@pytest.mark.parametrize(("heads", "degrees"), MESHES, ids=lambda value: str(value).replace(" ", ""))
def test_attention_equals_one_process(heads: int, degrees: dict[str, int]) -> None:
    world = degrees.get("ring", 1) * degrees.get("ulysses", 1)
    expected = truth(heads)
    for rank, (found, sent) in enumerate(run_distributed(attend, world, degrees, heads, timeout=100)):
        for part, (mine, whole) in enumerate(zip(found, expected, strict=True)):
            assert torch.allclose(mine, whole, atol=1e-11, rtol=0), (rank, part)
        assert sent == by_hand(heads, degrees, rank), rank


def by_hand(heads: int, degrees: dict[str, int], rank: int) -> dict[str, int]:
    """q, k and v of other processes' heads go out, outputs of others' tokens come back from mine; masks are bytes."""
    ring, ulysses = degrees.get("ring", 1), degrees.get("ulysses", 1)
    texts, images = even_sizes(TEXT, ring * ulysses)[::-1], even_sizes(IMAGE, ring * ulysses)
    tokens = [text + image for text, image in zip(texts, images, strict=True)]
    groups = [tokens[i : i + ulysses] for i in range(0, len(tokens), ulysses)]
    place, index = divmod(rank, ulysses)
    group, mine = groups[place], even_sizes(heads, ulysses)[index]
    local, value = group[index], BATCH * DIM * 8
    exchanged = (3 * local * (heads - mine) + (sum(group) - local) * mine) * value
    passed = 2 * mine * value * sum(sum(groups[(place - hop) % ring]) for hop in range(ring - 1))
    return {
        "ring": (passed + max(map(sum, groups)) * BATCH * (ring - 1)) if ring > 1 else 0,
        "ulysses": (exchanged + max(group) * BATCH * (ulysses - 1)) if ulysses > 1 else 0,
    }


def test_what_a_user_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of Wan 1.3B on eight processes and on sixteen."""
    model = SIZES["t2v_1_3b"]
    check_layout(MeshConfig(shard=1, ulysses=8), 8, model)
    assert "parallel.mesh.ulysses=8 does not divide 12 heads" in "".join(capsys.readouterr())
    check_layout(MeshConfig(shard=1, ring=2, ulysses=4), 8, model)
    assert "does not divide" not in "".join(capsys.readouterr())
    with pytest.raises(UserError, match=r"ulysses=16: more than the 12 heads .* use ulysses=8 with ring=2"):
        check_layout(MeshConfig(shard=1, ulysses=16), 16, model)
    with pytest.raises(UserError, match=r"tensor=8: does not divide the 12 heads .* are 1, 2, 3, 4, 6, 12"):
        check_layout(MeshConfig(shard=1, tensor=8), 8, model)
