"""HunyuanVideo by itself: where it starts, what it does not see, and samples that share a sequence."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration.distributed.mesh import view
from acceleration.sequence import SequenceParallel
from opensora.models.base import Width, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import MODEL_SIZES, build_model, describe, family_of, init_model_
from opensora.models.hunyuan_video import HunyuanVideoConfig, HunyuanVideoModel, refiner
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids

torch.set_num_threads(1)

EXACT = 1e-12
DEBUG: HunyuanVideoConfig = MODEL_SIZES["hunyuan_video"]["debug"]
# Stills and clips: (tokens along t, h, w; text tokens; of which attended), two of one size, one without any text.
SAMPLES = [((1, 2, 3), 3, 3), ((3, 2, 2), 5, 2), ((1, 2, 3), 3, 3), ((2, 1, 1), 1, 0)]


def random_model(cfg: HunyuanVideoConfig = DEBUG) -> HunyuanVideoModel:
    model: Any = build_model(cfg).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=torch_generator("hunyuan", name))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def inputs(index: int, samples: int = 1) -> dict[str, Any]:
    """Arguments of the forward for one of SAMPLES, no two alike."""
    sides, words, attended = SAMPLES[index]
    generator = torch_generator("inputs", index)

    def randn(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)

    positions = image_ids((sides[0], 2 * sides[1], 2 * sides[2]), DEBUG.patch_size).expand(samples, -1, -1)
    return {
        "x": randn(positions.shape[1], DEBUG.in_channels * 4),
        "t": torch.linspace(100 + 200 * index, 150 + 200 * index, samples, dtype=torch.float64),
        "text_states": randn(words, DEBUG.context_in_dim),
        "text_mask": (torch.arange(words) < attended).expand(samples, -1),
        "text_states_2": randn(DEBUG.vec_in_dim),
        "guidance": torch.full((samples,), 1000.0 + index, dtype=torch.float64),
        "positions": positions,
    }


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (out**3).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert found.keys() == truth.keys()
    return max(relative(found[name], truth[name]) for name in truth)


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max().clamp(min=1e-9)).item()


def test_every_parameter_gets_a_gradient() -> None:
    model = random_model()
    found = gradients(model, model(**inputs(1, 2)))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == []
    assert [name for name, _ in model.named_parameters() if name not in found or not found[name].abs().max() > 0] == []


def test_at_the_start_every_block_is_the_identity_and_the_output_is_zero() -> None:
    model: Any = build_model(DEBUG)
    init_model_(model, seed=0)
    given = {name: x if x.dtype == torch.bool else x.float() for name, x in inputs(1, 2).items()}
    out = model(**given)
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or any(part in name for part in ("mod.", "modulation.", "adaLN", "final_layer.")):
            assert parameter.abs().max() == 0, name
        else:
            assert parameter.var().item() == pytest.approx(1 / parameter.shape[1], rel=0.4), name


def test_padding_of_the_text_is_seen_by_nothing() -> None:
    """Whatever stands there, however much of it: neither the output nor a gradient changes."""
    model, given = random_model(), inputs(1, 2)
    out = model(**given)
    slopes = gradients(model, out)
    hidden = ~given["text_mask"][..., None]
    other = torch.where(hidden, 7.0, given["text_states"])
    longer = given | {
        "text_states": torch.cat((other, torch.full_like(other, -3.0)), dim=1),
        "text_mask": torch.cat((given["text_mask"], torch.zeros_like(given["text_mask"])), dim=1),
    }
    found = model(**longer)
    assert relative(found, out.detach()) <= EXACT and worst(gradients(model, found), slopes) <= EXACT
    short = given | {"text_states": given["text_states"][:, :2], "text_mask": None}
    found = model(**short)
    assert relative(found, out.detach()) <= EXACT and worst(gradients(model, found), slopes) <= EXACT


def test_what_it_is_told_matters() -> None:
    """Each input alone changes the output of its own sample, and of no other."""
    model, given = random_model(), inputs(1, 2)
    out = model(**given)
    for name in ("x", "t", "text_states", "text_states_2", "guidance", "positions"):
        changed = given[name].clone()
        changed[1] = changed[1] * 1.5 + (torch.arange(len(changed[1]))[:, None] if name == "positions" else 0)
        found = model(**given | {name: changed})
        assert relative(found[1], out[1]) > 1e-4, name
        assert relative(found[0], out[0]) <= EXACT, name


def test_guidance_is_read_by_models_that_embed_it() -> None:
    given = inputs(0)
    with pytest.raises(ValueError, match="guidance is missing, but guidance_embed says not"):
        random_model()(**given | {"guidance": None})
    with pytest.raises(ValueError, match="guidance was given, but guidance_embed says not"):
        random_model(replace(DEBUG, guidance_embed=False))(**given)


# --- samples that share a sequence -----------------------------------------------------------------------------------


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
        return torch.stack([
            torch.cat([torch.full((n,), turn * count + place) for place, n in enumerate(of_sequence)])
            for turn, of_sequence in enumerate(lengths)
        ])  # fmt: skip

    rows = numbers("text_states"), numbers("x")
    given: dict[str, Any] = {name: laid(name) for name in ("x", "positions", "text_states", "text_mask")}
    for name in ("t", "text_states_2", "guidance"):
        given[name] = torch.cat([samples[i][name] for order in orders for i in order])
    context = SequenceParallel(view({})).packed_context(*rows, "cpu")
    return {**given, "sample_of": rows, "context": context}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_pack_equals_its_samples(sequences: int, masked: bool) -> None:
    """Two sequences that hold samples in different places; with padding that is hidden, or without any."""
    model, samples = random_model(), [inputs(index) for index in range(len(SAMPLES))]
    if not masked:  # as packs are made: of text that is attended
        texts = [given["text_states"][given["text_mask"]][None] for given in samples]
        samples = [g | {"text_states": x, "text_mask": None} for g, x in zip(samples, texts, strict=True)]
    outs, count = [model(**given) for given in samples], len(samples)
    truth = torch.stack([
        torch.cat([outs[(place + turn) % count] for place in range(count)], dim=1)[0] for turn in range(sequences)
    ])  # fmt: skip
    slopes = gradients(model, truth)
    found = model(**together(samples, sequences))
    assert relative(found, truth.detach()) <= EXACT and worst(gradients(model, found), slopes) <= EXACT


def test_every_text_token_sees_one() -> None:
    """Of its own sample, also where all of that is padding: a softmax over nothing is NaN in some kernels."""
    samples = torch.tensor([[0, 0, 1, 2, 2, 2], [3, 4, 4, 4, 5, 5]])
    mask = torch.tensor([[True, False, False, False, False, True], [False, True, True, False, False, False]])
    padded, packed = refiner.visible(mask, None), refiner.visible(mask, samples)
    assert padded is not None and packed is not None and packed.any(dim=-1).all()
    assert padded.expand(2, 1, 6, 6).any(dim=-1).all() and packed[0, 0, 3].tolist() == [
        False,
        False,
        False,
        True,
        False,
        True,
    ]


def test_samples_of_a_sequence_must_be_told_apart_by_both() -> None:
    given = together([inputs(0), inputs(1)], 1)
    for gone in ("sample_of", "context"):
        with pytest.raises(ValueError, match="belong together"):
            random_model()(**given | {gone: None})


def test_a_process_goes_on_with_its_part_of_the_text() -> None:
    """The refiner has read all of it. What the blocks are given of it, and of its mask, is what the context says."""
    model, given = random_model(), inputs(1, 2)
    seen: list[tuple[Tensor, Tensor]] = []
    model.double_blocks[0].register_forward_pre_hook(lambda _, args: seen.append((args[1], args[4])))
    for text in ((0, 5), (1, 4), (5, 5)):
        model(**given, context=SimpleNamespace(text=text, segments=None))
    (whole, mask), *parts = seen
    for (first, end), (part, part_mask) in zip(((1, 4), (5, 5)), parts, strict=True):
        assert torch.equal(part, whole[:, first:end])
        assert torch.equal(part_mask, torch.cat((mask[:, first:end], mask[:, 5:]), dim=1))


# --- what others ask of the family -----------------------------------------------------------------------------------


def test_times_and_guidance_are_scaled_by_a_thousand() -> None:
    ids = image_ids((1, 2, 2), (1, 2, 2))
    tokens = TokenBatch(x=torch.zeros(1, 1, 16), positions=ids)
    told = Conditions(text=torch.zeros(1, 3, 20), pooled=torch.zeros(1, 24), guidance=torch.tensor([6.0]))
    given = family_of(DEBUG).arguments(DEBUG, tokens, torch.tensor([0.25]), told)
    assert given["t"].tolist() == [250.0] and given["guidance"].tolist() == [6000.0]
    plain = replace(DEBUG, guidance_embed=False)
    assert family_of(plain).arguments(plain, tokens, torch.tensor([0.25]), told)["guidance"] is None
    assert describe(DEBUG).wants == {"guidance"} and not describe(plain).wants
    assert describe(DEBUG).packs and describe(DEBUG).cuts_text


def test_widths_that_do_not_fit() -> None:
    family, latents = family_of(DEBUG), Width(4, "vae.kind=x")
    family.check(DEBUG, Widths(latents, Width(20, "text.kind=x"), Width(24, "text.kind=x")))
    for widths, said in (
        ((8, 20, 24), "in_channels=4: vae gives 8; set model.in_channels=8"),
        ((4, 12, 24), "context_in_dim=20: text gives 12; set model.context_in_dim=12"),
        ((4, 20, 12), "vec_in_dim=24: text gives 12; set model.vec_in_dim=12"),
    ):
        named = [Width(size, key) for size, key in zip(widths, ("vae", "text", "text"), strict=True)]
        with pytest.raises(ValueError, match=said):
            family.check(DEBUG, Widths(*named))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth_single_blocks": 0}, "depth_single_blocks=0: must be an integer >= 1"),
        ({"depth_refiner_blocks": 0}, "depth_refiner_blocks=0: must be an integer >= 1"),
        ({"num_heads": 5}, "num_heads=5: must be a divisor of hidden_size=64"),
        ({"axes_dim": (4, 6, 8)}, "must be dims whose sum is the head dim"),
        ({"axes_dim": (5, 5, 6)}, "must be three even numbers > 0"),
        ({"patch_size": (1, 0, 2)}, "patch_size=.*must be three integers from 1 to 64"),
        ({"theta": 1}, "theta=1: must be a number > 1"),
        ({"mlp_ratio": 0.001}, "mlp_ratio=0.001: must be a number > 0 that leaves hidden units"),
    ],
)
def test_shapes_that_make_no_model(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(DEBUG, **change)
