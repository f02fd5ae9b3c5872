"""Compiled DiT, Latte, PixArt and STDiT compute what they do as written, and clips of other sizes compile nothing.

An axis of length 1 has graphs of its own; all others share theirs, also where two axes happen to be of one length.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from acceleration.blocks import compile
from acceleration.config import CompileConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import token_layout
from opensora.train.preparation import loss_share
from tests.dist import chapters, stdit
from tests.dist.harness import run_distributed
from tests.dist.layouts import RECOMPUTE
from tests.dist.parity import TOLERANCE, relative, worst_error
from tests.dist.problem import TEXT_TOKENS

# (samples, T', H', W'), patches of 2x2: each of samples and frames is one, or several
FIRST = ((2, 3, 4, 14), (2, 1, 6, 4), (1, 3, 4, 6), (1, 1, 4, 6))
# Frames as many as places, as samples, as words; more and fewer of each than before.
LATER = ((2, 4, 4, 4), (3, 3, 6, 4), (2, TEXT_TOKENS, 4, 10), (4, 2, 8, 10), (5, 1, 4, 10), (1, 7, 6, 8), (1, 1, 8, 8))
# name -> graphs: one for each of four shapes and kind of block (STDiT: the first, and those that know no frame); with
# windows also before and behind attention, which is left out of them
STDIT = {"stdit": 8, "stdit2": 4, "stdit3": 8, "windows": 20}
CHAPTERS = {"dit": 4, "latte": 8, "pixart": 4, "pixart_ms": 4, "pixart_qk": 4}

Losses = Callable[[nn.Module], list[Callable[[], Tensor]]]


def stdit_losses(name: str, sizes: Any) -> Losses:
    cfg = stdit.MODELS[name]
    prepare = stdit.preparation(cfg, meshes.view({}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdit, "ODD", sizes)
        patch.setattr(stdit, "WHOLE", sizes)
        every = [prepare(batch, 0) for batch in stdit.batches(cfg, 0)]  # type: ignore[arg-type]
    return lambda model: [lambda tokens=tokens: loss_share(model, tokens, 100) for tokens in every]  # type: ignore[misc]


def chapter_losses(name: str, sizes: Any) -> Losses:
    cfg, layout = chapters.MODELS[name], token_layout(chapters.MODELS[name], SequenceParallel(meshes.view({})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapters, "BUCKETS", sizes)
        every = chapters.batches(cfg, 0)
    return lambda model: [  # type: ignore[misc]
        lambda sample=sample: chapters.squares(model, cfg, layout, sample) / 100 for sample in every
    ]


def compiled(name: str, backend: str) -> tuple[nn.Module, nn.Module]:
    """A model as it is written, and compiled."""
    torch._dynamo.reset()
    counters.clear()
    module: Any = stdit if name in STDIT else chapters
    plain, found = (module.plain_model(module.MODELS[name]) for _ in range(2))
    compile.apply(found, CompileConfig(enabled=True, backend=backend))  # type: ignore[arg-type]
    return plain, found


def check(name: str, backend: str, sizes: Any, later: Any = ()) -> None:
    """Losses and gradients alike for every size, and no more graphs than are allowed; none for later sizes."""
    losses = stdit_losses if name in STDIT else chapter_losses
    plain, found = compiled(name, backend)
    for index, (truth, loss) in enumerate(
        zip(losses(name, (*sizes, *later))(plain), losses(name, (*sizes, *later))(found), strict=True)
    ):
        expected, value = truth(), loss()
        assert relative(value.detach(), expected.detach()) <= TOLERANCE
        expected.backward()
        value.backward()
        if index == len(sizes) - 1:
            made = counters["stats"]["unique_graphs"]
    assert not counters["unimplemented"], counters["unimplemented"]
    assert 0 < made <= (STDIT | CHAPTERS)[name], f"{made} graphs"
    assert counters["stats"]["unique_graphs"] == made, "later sizes compiled again"
    gradients = [(a.grad, b.grad) for a, b in zip(plain.parameters(), found.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in gradients)
    assert max(relative(b, a) for a, b in gradients if a is not None) <= TOLERANCE


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in (*STDIT, *CHAPTERS)])
@pytest.mark.timeout(600)
def test_clips_of_all_sizes_share_graphs(name: str) -> None:
    check(name, "eager", FIRST, LATER)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*STDIT, *CHAPTERS])
def test_compiled_forward_and_backward(name: str) -> None:
    check(name, "aot_eager", FIRST[:1], LATER[:2])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STDIT)
def test_compiled_on_two_processes(name: str) -> None:
    """Ulysses, with recomputation of whole blocks."""
    options = {"compile": CompileConfig(enabled=True, backend="aot_eager"), "recompute": RECOMPUTE["full"]}
    run = stdit.Run(name, 2, {"ulysses": 2}, 3, options)
    truth = stdit.on_one_process(stdit.MODELS[name])
    for (found,) in run_distributed(stdit.on_these_layouts, 2, [run], timeout=800):
        assert worst_error(found, truth) <= TOLERANCE
