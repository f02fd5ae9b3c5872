"""Several samples in one sequence compute what each computes by itself: outputs, loss and every gradient, in fp64."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from acceleration import sequence
from acceleration.attention.core import KernelCore
from acceleration.attention.kernels import KERNELS, Kernel, varlen
from acceleration.attention.kernels.varlen import Varlen
from acceleration.blocks import activation_checkpoint
from acceleration.config import RecomputeConfig
from acceleration.distributed.mesh import view
from acceleration.sequence import Segments, SequenceParallel
from opensora.datasets.loading.reader import PackedBatch
from opensora.models.families import build_model
from opensora.models.layers import modulation
from opensora.models.layers.attention import SDPACore
from opensora.train.preparation import Tokens, loss_share
from tests.dist.parity import fill, relative
from tests.dist.problem import MODEL, TEXT_TOKENS, batches, elements
from tests.dist.test_parity import preparation
from tests.unit.test_mmdit import DEBUG, VARIANTS, inputs, random_model

torch.set_num_threads(1)
EXACT = 1e-12
# Stills and clips: (grid, text tokens, of which attended), two of one size.
SAMPLES = [((1, 4, 6), 3, 3), ((3, 4, 4), 5, 2), ((1, 4, 6), 3, 3), ((2, 2, 2), 1, 0)]
ALONG_TOKENS = ("img", "img_ids", "txt", "txt_ids", "cond")
WHOLE = SequenceParallel(view({}))
Gradients = dict[str, Tensor]


def apart(cfg: Any) -> list[dict[str, Any]]:
    """The model's arguments for each of SAMPLES alone, no two alike."""
    found = []
    for index, (grid, words, attended) in enumerate(SAMPLES):
        given = inputs(cfg, 1, grid, words, torch.float64)
        given |= {name: given[name] * (1 + index) for name in ("img", "txt", "y_vec")}
        given["timesteps"] = torch.tensor([0.1 + 0.2 * index])
        if given["guidance"] is not None:
            given["guidance"] = torch.tensor([1.0 + index])
        found.append(given | {"txt_mask": (torch.arange(words) < attended)[None]})
    return found


def together(samples: list[dict[str, Any]], sequences: int) -> dict[str, Any]:
    """The same in ``sequences`` sequences that hold all of them, each in its own order."""
    count = len(samples)
    orders = [[(place + turn) % count for place in range(count)] for turn in range(sequences)]

    def laid(name: str) -> Tensor | None:
        if samples[0][name] is None:
            return None
        return torch.cat([torch.cat([samples[i][name] for i in order], dim=1) for order in orders])

    def numbers(name: str) -> Tensor:
        lengths = [[samples[i][name].shape[1] for i in order] for order in orders]
        rows = [
            torch.cat([torch.full((n,), turn * count + place) for place, n in enumerate(of_sequence)])
            for turn, of_sequence in enumerate(lengths)
        ]
        return torch.stack(rows)

    rows = numbers("txt"), numbers("img")
    given = {name: laid(name) for name in (*ALONG_TOKENS, "txt_mask")}
    for name in ("timesteps", "y_vec", "guidance"):
        missing = samples[0][name] is None
        given[name] = None if missing else torch.cat([samples[i][name] for order in orders for i in order])
    return given | {"sample_of": rows, "context": WHOLE.packed_context(*rows, "cpu")}


def gradients_of(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst(found: Gradients, truth: Gradients) -> float:
    assert found.keys() == truth.keys()
    return max(relative(found[name], value) for name, value in truth.items())


def packed_and_apart(cfg: Any, sequences: int) -> tuple[float, float]:
    """Largest relative differences of outputs and of gradients."""
    model, samples = random_model(cfg, torch.float64), apart(cfg)
    count = len(samples)
    outs = [model(**given) for given in samples]
    truth = torch.stack([
        torch.cat([outs[(place + turn) % count] for place in range(count)], dim=1)[0] for turn in range(sequences)
    ])  # fmt: skip
    true_gradients = gradients_of(model, (truth**3).sum())
    found = model(**together(samples, sequences))
    return relative(found, truth.detach()), worst(gradients_of(model, (found**3).sum()), true_gradients)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_a_pack_equals_its_samples(cfg: Any, sequences: int) -> None:
    """Masks, two sequences that hold samples in different places, samples without any text to attend to."""
    out, gradients = packed_and_apart(cfg, sequences)
    assert out <= EXACT and gradients <= EXACT


def one_segment_for_two() -> Any:
    right = Segments.of

    def wrong(samples: Tensor, device: Any) -> Segments:
        return right(samples.where(samples != 1, 0), device)

    return mock.patch.object(Segments, "of", staticmethod(wrong))


def modulated_by_the_neighbour() -> Any:
    right = modulation.over_tokens

    def wrong(joined: Tensor, parts: int, rows: Tensor | None) -> tuple[Tensor, ...]:
        if rows is not None:
            rows = rows.where(rows != 2, 1)
        return right(joined, parts, rows)

    return mock.patch("opensora.models.layers.joint_blocks.over_tokens", wrong)  # of the last layer alone


def gradient_of_the_neighbour() -> Any:
    right = modulation._Spread.backward

    def wrong(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        table, _ = right(ctx, grad)
        return table.roll(1, dims=0), None

    return mock.patch.object(modulation._Spread, "backward", staticmethod(wrong))


@pytest.mark.parametrize("mistake", [one_segment_for_two, modulated_by_the_neighbour, gradient_of_the_neighbour])
def test_a_mistake_would_be_found(mistake: Any) -> None:
    with mistake():
        assert max(packed_and_apart(DEBUG, 1)) > 1e-6


def test_samples_and_segments_come_together() -> None:
    model, given = random_model(DEBUG, torch.float64), together(apart(DEBUG), 1)
    for lacking in ({"context": None}, {"sample_of": None}, {"context": SimpleNamespace(segments=None)}):
        with pytest.raises(ValueError, match="belong together"):
            model(**{**given, **lacking})


def packed(step: int) -> list[PackedBatch]:
    """The micro-batches of a step as two packs: clips, stills and another shape; and what is left."""
    every = batches(step)
    return [PackedBatch(tuple(every[:3])), PackedBatch(tuple(every[3:]))]  # type: ignore[arg-type]


def model_of_the_problem(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = build_model(MODEL).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = torch.empty(parameter.shape, dtype=torch.float64)
            fill(name, full)
            parameter.copy_(full)
    return model


def step_of(model: nn.Module, micro_batches: list[Any]) -> tuple[float, Gradients, list[Tokens]]:
    prepare = preparation(view({}))
    tokens = [prepare(batch, 0) for batch in micro_batches]
    loss = torch.stack([loss_share(model, t, elements(0)) for t in tokens]).sum()
    return loss.item(), gradients_of(model, loss), tokens


def test_a_step_of_packs_is_the_step_of_its_micro_batches() -> None:
    """From pixels on: noise, times shifted by every sample's own size, dropped prompts, text masks, weights."""
    model = model_of_the_problem()
    loss, gradients, apart_tokens = step_of(model, batches(0))
    found_loss, found, tokens = step_of(model, packed(0))
    assert relative(found_loss, loss) <= EXACT and worst(found, gradients) <= EXACT
    words = sum(int(t.inputs["txt_mask"].sum()) for t in apart_tokens)
    assert sum(t.inputs["txt"].shape[1] for t in tokens) == words < TEXT_TOKENS * len(batches(0)) * 2
    assert tokens[0].inputs["timesteps"].shape == (6,) and tokens[0].inputs["txt_mask"] is None
    assert all(t.inputs["img"].shape[0] == 1 for t in tokens)


def test_segments_bring_every_token_back() -> None:
    samples = torch.tensor([[3, 0, 0, 1, 3], [5, 1, 5, 5, 1]])
    segments = Segments.of(samples, "cpu")
    assert segments.lengths == (2, 2, 3, 3)
    x = torch.randn(2, 5, 4)
    laid = segments.gather(x)
    assert torch.equal(segments.scatter(laid, 2), x)
    of = segments.gather(samples[..., None])[:, 0].tolist()
    assert of == [0, 0, 3, 3, 1, 1, 1, 5, 5, 5]
    assert segments.ends.tolist() == [0, 2, 4, 7, 10] and segments.ends.dtype == torch.int32
    seen: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(tuple(q.shape[:2]))
        return q

    segments.apply(attend, x[..., None], x[..., None], x[..., None], None)
    assert seen == [(2, 2), (2, 3)]  # samples of one length at once


def loop(q: Tensor, ends: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    assert longest == int(ends.diff().max())
    parts = [KERNELS["math"].forward(q[s][None], k[s][None], v[s][None], None) for s in loop(q, ends)]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, ...]:
    parts = [
        KERNELS["math"].backward(*(x[s][None] for x in (grad, q, k, v, out)), lse[None, :, s], None)
        for s in loop(q, ends)
    ]
    return tuple(torch.cat([part[i][0] for part in parts]) for i in range(3))


KINDS: dict[str, Kernel] = {
    "math": KERNELS["math"],
    "cpu": KERNELS["cpu"],
    "varlen": Kernel(None, None, Varlen(varlen_forward, varlen_backward)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", KINDS)
def test_kernels_attend_within_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64,))  # half types would hide an error
    samples = torch.tensor([[0, 1, 1, 0, 2, 2, 2], [3, 3, 4, 4, 4, 3, 4]])
    context = SimpleNamespace(segments=Segments.of(samples, "cpu"))
    qkv = torch.randn(3, 2, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for core in (SDPACore(), KernelCore(KINDS[name])):
        out = core(*qkv, context=context)
        (gradient,) = torch.autograd.grad((out**3).sum(), qkv)
        results.append((out, gradient))
    alone = SDPACore()(*(x[:1, samples[0] == 1] for x in qkv))
    assert torch.allclose(results[0][0][:1, samples[0] == 1], alone, atol=1e-14)
    for found, truth in zip(*results, strict=True):
        assert relative(found, truth) <= EXACT


@pytest.mark.parametrize("kind", ["full", "selective", "full-offload", "selective-offload"])
def test_recomputed_packs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, truth, _ = step_of(model_of_the_problem(), packed(0))
    model, name = model_of_the_problem(), kind.split("-")[0]
    cfg = RecomputeConfig(kind=name, offload=kind.endswith("offload"))  # type: ignore[arg-type]
    sequence.fill_slots(model, view({}), keeps=name == "selective")
    activation_checkpoint.apply(model, cfg)
    calls: list[int] = []
    right = KERNELS["cpu"].forward
    counting = replace_forward(KERNELS["cpu"], lambda *given: calls.append(1) or right(*given))
    for block in (*model.double_blocks, *model.single_blocks):  # type: ignore[union-attr]
        if isinstance(block.core, KernelCore):
            block.core.kernel = counting
    _, found, _ = step_of(model, packed(0))
    assert worst(found, truth) <= EXACT
    if name == "selective":  # once for every length of a pack and block, and not again in backward
        lengths = [len(set(prepared_lengths(batch))) for batch in packed(0)]
        assert len(calls) == sum(lengths) * 4


def replace_forward(kernel: Kernel, forward: Any) -> Kernel:
    return kernel._replace(forward=forward)


def prepared_lengths(batch: PackedBatch) -> tuple[int, ...]:
    return preparation(view({}))(batch, 0).inputs["context"].segments.lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs_in_working_precision(dtype: torch.dtype) -> None:
    """As far from fp64 as the samples by themselves are, sums over tokens of one sample included."""
    _, truth, _ = step_of(model_of_the_problem(), batches(0))
    _, by_itself, _ = step_of(model_of_the_problem(dtype), batches(0))
    _, in_packs, _ = step_of(model_of_the_problem(dtype), packed(0))
    errors = [[relative(found[name], truth[name]) for name in truth] for found in (by_itself, in_packs)]
    assert max(errors[1]) <= 2 * max(errors[0])


def test_no_conditions_no_masks() -> None:
    cfg = replace(DEBUG, cond_embed=False)
    model, samples = random_model(cfg, torch.float64), [{**given, "txt_mask": None} for given in apart(cfg)]
    given = together([{**sample, "txt_mask": torch.ones(sample["txt"].shape[:2])} for sample in samples], 1)
    truth = torch.cat([model(**sample) for sample in samples], dim=1)
    assert relative(model(**{**given, "txt_mask": None}), truth) <= EXACT
