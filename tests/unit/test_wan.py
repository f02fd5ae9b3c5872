"""Wan: what it is told and in which form, what stays exact, first values, step caches, compiled blocks, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acceleration.blocks import compile
from acceleration.config import CompileConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.step_caches import step_cache
from opensora.assembly.token_layout import forward_arguments, token_layout
from opensora.models.base import Width, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import build_model, describe, family_of, init_model_
from opensora.models.layers.norm import AllHeadsRMSNorm
from opensora.models.layers.stages import run_in_order
from opensora.models.wan import SIZES, WanConfig
from opensora.models.wan.layers import WanBlock
from opensora.sampling.caches import CacheConfig, Decision, FirstBlockCache, PyramidAttentionBroadcast, TeaCache
from opensora.sampling.evaluation import Evaluation
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid

_SMALL: dict[str, Any] = {
    **{"in_channels": 3, "hidden_size": 32, "num_heads": 2, "depth": 3, "ffn_dim": 48, "text_dim": 12}
}
MODELS = {
    "t2v": WanConfig(**_SMALL),
    "i2v": WanConfig(**_SMALL, references="clip"),
    "picture": WanConfig(**_SMALL, references="clip", image_dim=10),
    "in_place": WanConfig(**_SMALL, references="in_place"),
    "patches_of_two_frames": WanConfig(**_SMALL, patch_size=(2, 1, 2), references="clip"),
}
CLIP = (2, 4, 6)  # latents (t, h, w)
ONE = meshes.view({})


def random_model(cfg: WanConfig, dtype: torch.dtype = torch.float64) -> Any:
    model = build_model(cfg).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=torch_generator("wan", name), dtype=torch.float64)
            parameter.copy_(0.2 * draw)
    return model


class Clips:
    """Two clips, of which the first frame is known, in the second the last one as well."""

    def __init__(self, cfg: WanConfig, clip: tuple[int, int, int] = CLIP, samples: int = 2) -> None:
        generator = torch_generator("clips", samples)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.cfg, self.layout, self.grid = cfg, token_layout(cfg, SequenceParallel(ONE)), Grid(clip, cfg.patch_size)
        self.x, self.reference = draw(samples, 3, *clip), draw(samples, 3, *clip)
        self.known = torch.zeros(samples, *clip, dtype=torch.bool)
        self.known[:, 0], self.known[1:, -1] = True, True
        self.t = torch.rand(samples, generator=generator, dtype=torch.float64)
        self.text = draw(samples, 5, cfg.text_dim)
        self.image_tokens = draw(samples, 7, cfg.image_dim) if cfg.image_dim else None

    def conditions(self, **changes: Any) -> Conditions:
        given: dict[str, Any] = {"text": self.text, "image_tokens": self.image_tokens}
        if self.cfg.references != "none":
            given |= {"reference": self.reference, "known": self.known}
        return Conditions(**given | changes)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        told = self.layout.patchify_conditions(self.conditions(**changes))
        tokens = TokenBatch(
            x=self.layout.patchify(self.x), positions=self.layout.positions(self.grid, len(self.x), "cpu")
        )
        return forward_arguments(self.cfg, tokens, self.t, told)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name: str) -> None:
    model, clips = random_model(MODELS[name]), Clips(MODELS[name])
    out = model(**clips.arguments())
    assert out.shape == clips.layout.patchify(clips.x).shape
    out.square().sum().backward()
    assert not [n for n, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]


def test_times_go_up_to_a_thousand_and_text_has_zeros_for_a_mask() -> None:
    clips = Clips(MODELS["t2v"])
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    given = clips.arguments(text_mask=mask)
    assert torch.equal(given["timestep"], 1000 * clips.t) and given["row_of"] is None and given["cond"] is None
    assert torch.equal(given["text"][1], clips.text[1]) and torch.equal(given["text"][0, :2], clips.text[0, :2])
    assert not given["text"][0, 2:].any()
    assert torch.equal(clips.arguments()["text"], clips.text)


@pytest.mark.parametrize("name", ["i2v", "patches_of_two_frames"])
def test_known_frames_are_channels_beside_the_noise(name: str) -> None:
    """The channels of whole latents, mask first, are those of tokens: a linear layer of tokens is a convolution."""
    cfg, clips = MODELS[name], Clips(MODELS[name])
    frames = clips.known[:, None].double()
    if cfg.patch_size[0] == 2:  # a token is known where its first latent is
        frames = frames[:, :, ::2].repeat_interleave(2, dim=2)
    channels = torch.cat((frames.expand(-1, 4, -1, -1, -1), clips.reference), dim=1)
    assert torch.equal(clips.arguments()["cond"], clips.layout.patchify(channels))
    kernel = torch.randn(5, 3 + 7, *cfg.patch_size, dtype=torch.float64)
    wanted = F.conv3d(torch.cat((clips.x, channels), dim=1), kernel, stride=cfg.patch_size).flatten(2).transpose(1, 2)
    given = clips.arguments()
    found = F.linear(torch.cat((given["x"], given["cond"]), dim=-1), kernel.flatten(1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert not clips.arguments(reference=None, known=None)["cond"].any()


def test_known_tokens_are_at_time_zero() -> None:
    """Of the sample's own time all others: each as in a clip whose tokens all have its time, but for what attention
    mixes, which this model's does not."""
    clips = Clips(MODELS["in_place"])
    given = clips.arguments()
    known = clips.layout.patchify(clips.known[:, None])[..., 0]
    times = given["timestep"][given["row_of"]]
    assert torch.equal(times, torch.where(known, 0.0, 1000 * clips.t[:, None]))
    model = random_model(MODELS["in_place"])
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.o.weight.zero_()
        found, noisy = model(**given), model(**given | {"row_of": None, "timestep": 1000 * clips.t})
        clean = model(**given | {"row_of": None, "timestep": torch.zeros(2, dtype=torch.float64)})
    torch.testing.assert_close(found, torch.where(known[..., None], clean, noisy), rtol=0, atol=1e-12)
    assert not torch.allclose(clean, noisy)
    assert clips.arguments(known=None)["row_of"] is None


def test_norm_over_all_heads() -> None:
    norm = AllHeadsRMSNorm(6).double()
    x, weight = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    wanted = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(norm(x), wanted, rtol=1e-12, atol=1e-12)
    assert norm.gain is norm.weight


def test_what_it_does_not_read_is_refused() -> None:
    for name, given, said in (
        ("picture", {"image_tokens": None}, "image_tokens is missing, but a model of this configuration reads it"),
        ("i2v", {"image_tokens": torch.zeros(2, 3, 10)}, "image_tokens was given"),
        ("i2v", {"cond": None}, "cond is missing"),
        ("t2v", {"cond": torch.zeros(2, 12, 28)}, "cond was given"),
    ):
        clips = Clips(MODELS[name])
        with pytest.raises(ValueError, match=said):
            random_model(MODELS[name])(**clips.arguments() | given)


def test_a_picture_is_read_beside_the_text() -> None:
    """With the same queries: written out for one block's attention to both."""
    model = random_model(MODELS["picture"])
    layer, heads = model.blocks[0].cross_attn, MODELS["picture"].num_heads
    x, text, image = (torch.randn(2, n, 32, dtype=torch.float64) for n in (6, 5, 7))

    def split(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    with torch.no_grad():
        q = split(layer.norm_q(layer.q(x)))
        of_text = F.scaled_dot_product_attention(q, split(layer.norm_k(layer.k(text))), split(layer.v(text)))
        key = split(layer.norm_k_img(layer.k_img(image)))
        of_image = F.scaled_dot_product_attention(q, key, split(layer.v_img(image)))
        wanted = layer.o((of_text + of_image).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, text, image), wanted, rtol=1e-12, atol=1e-12)


def test_the_norm_before_the_text_reads_tokens_as_they_are_in_bf16() -> None:
    """What is normalised is not what bf16 leaves of the tokens between layers."""
    cfg, seen = MODELS["t2v"], list[Any]()
    model = random_model(cfg, torch.bfloat16)
    for block in model.blocks:
        block.norm3.register_forward_hook(lambda norm, args, out: seen.append((norm, args[0], out)))
    with torch.no_grad():
        model(**Clips(cfg).arguments())
    for norm, x, out in seen:
        assert x.dtype == out.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
        deviation = (x - x.mean(-1, keepdim=True)).double()
        truth = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(out.double(), truth * norm.weight + norm.bias, rtol=1e-5, atol=1e-5)
    assert len(seen) == len(model.blocks)


def test_tokens_times_and_angles_stay_exact_in_bf16() -> None:
    """Between layers tokens are fp32; times that bf16 cannot tell apart give other outputs."""
    cfg = MODELS["in_place"]
    model, clips, seen = random_model(cfg, torch.bfloat16), Clips(cfg), list[Any]()
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    given = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in clips.arguments().items()
    }
    with torch.no_grad():
        out = model(**given)
        times = given["timestep"].clone()
        times[:2] = torch.tensor([996.0, 997.0])  # both 996 in bf16
        first = model(**given | {"timestep": times, "row_of": given["row_of"] * 0})
        second = model(**given | {"timestep": times, "row_of": given["row_of"] * 0 + 1})
    assert out.dtype == torch.bfloat16 and len(seen) == 3 * len(model.blocks)
    assert all(found.dtype == torch.float32 for _, found in seen)
    assert all(args[1].dtype == args[4][0].dtype == torch.float32 for args, _ in seen)
    assert not torch.equal(first, second)


def test_positions_are_those_of_every_axis() -> None:
    """The head of 16 channels has 8 for time, 4 for rows, 4 for columns; the published one 44, 42, 42."""
    assert SIZES["t2v_14b"].axes_dim == (44, 42, 42) and SIZES["ti2v_5b"].head_dim == 128
    assert MODELS["t2v"].axes_dim == (8, 4, 4)
    (table,) = random_model(MODELS["t2v"])._rope(torch.tensor([[[3.0, 5.0, 7.0]]]))
    angles = [3 * 10000.0 ** (-i / 4) for i in range(4)] + [n * 10000.0 ** (-i / 2) for n in (5, 7) for i in range(2)]
    wanted = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(table[0, 0, 0], torch.stack((wanted.cos(), wanted.sin()), dim=-1))


def test_first_values() -> None:
    """An untrained model gives zeros; what is not zero has the family's deviation."""
    cfg = replace(SIZES["debug"], references="clip", image_dim=40)
    model = build_model(cfg)
    init_model_(model, 5)
    for name, parameter in model.named_parameters():
        fan = parameter.shape[-1] + parameter.shape[0]
        if name.endswith("modulation"):
            assert parameter.std().item() * cfg.hidden_size**0.5 == pytest.approx(1, rel=0.2), name
        elif "norm" in name or name.startswith(("img_emb.proj.0", "img_emb.proj.4")):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") or name.startswith("head.head"):
            assert not parameter.any(), name
        elif name.startswith(("text_embedding", "time_embedding")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert parameter.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1), name


# --- step caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2v", "in_place"])
def test_step_caches_see_what_attention_reads(name: str) -> None:
    model, seen = random_model(MODELS[name]), dict[str, Any]()

    def look(stages: Any, streams: Any) -> Tensor:
        seen["stated"] = stages[0].modulated(next(iter(stages[0].blocks)), streams)
        return run_in_order(stages, streams)

    model.run_stages = look
    model.blocks[0].self_attn.q.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))
    model(**Clips(MODELS[name]).arguments())
    assert torch.equal(seen["stated"], seen["read"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("cfg", "reused"),
    [
        (FirstBlockCache(threshold=1e6), {"blocks": 3}),
        (TeaCache(threshold=1e6, coefficients=(1.0, 0.0)), {"blocks": 2}),  # the last step of all computes
        (
            PyramidAttentionBroadcast(spatial=2, cross=4, time_range=(0.0, 1000.0)),
            {"self_attn.core": 6, "cross_attn.core": 9, "cross_attn.core_img": 9},
        ),
    ],
)
def test_step_caches_reuse_blocks_and_each_attention(cfg: CacheConfig, reused: dict[str, int]) -> None:
    """Over 4 steps of one input: what is reused gives what it gave."""
    model, given, log = random_model(MODELS["picture"]), Clips(MODELS["picture"]).arguments(), list[Decision]()
    truth, cache = model(**given), step_cache(cfg, model, ONE, log.append)
    with cache.during(model):
        for step in range(4):
            with cache.watch(Evaluation(0, step, 4, 0.9 - 0.1 * step)):
                torch.testing.assert_close(model(**given), truth, rtol=1e-10, atol=1e-12)
    counted: dict[str, int] = {}
    for decision in log:
        part = decision.part.partition(".")[2].partition(".")[2] or decision.part
        counted[part] = counted.get(part, 0) + (not decision.computed)
    assert {part: count for part, count in counted.items() if count} == reused


def test_reused_attention_asks_nothing_of_its_layers() -> None:
    """Neither queries nor keys are made where both attentions give again what they gave before."""
    model, given, called = random_model(MODELS["picture"]), Clips(MODELS["picture"]).arguments(), list[str]()
    for name in ("q", "k", "v", "k_img", "v_img"):
        getattr(model.blocks[1].cross_attn, name).register_forward_hook(lambda *_, name=name: called.append(name))
    every = PyramidAttentionBroadcast(spatial=1, cross=2, time_range=(0.0, 1000.0))
    cache = step_cache(every, model, ONE, lambda decision: None)
    with torch.no_grad(), cache.during(model):
        for step in range(2):
            with cache.watch(Evaluation(0, step, 2, 0.5)):
                model(**given)
    assert sorted(called) == ["k", "k_img", "q", "v", "v_img"]


# --- compiled blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2v", "picture", "in_place"])
def test_compiled_blocks(name: str) -> None:
    """Outputs and every gradient, for clips of several sizes, which share one graph."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = random_model(MODELS[name]), random_model(MODELS[name])
    compile.apply(compiled, CompileConfig(enabled=True, backend="aot_eager"))
    for index, clip in enumerate([(2, 4, 6), (3, 6, 4), (4, 4, 4), (5, 2, 8)]):
        given = Clips(MODELS[name], clip, samples=2 + index).arguments()
        wanted, found = plain(**given), compiled(**given)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        for out in (wanted, found):
            out.square().sum().backward()
    slopes = {n: parameter.grad for n, parameter in compiled.named_parameters()}
    for n, parameter in plain.named_parameters():
        torch.testing.assert_close(slopes[n], parameter.grad, rtol=1e-9, atol=1e-9)
    assert not counters["unimplemented"], counters["unimplemented"]
    assert counters["stats"]["unique_graphs"] == 1


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_heads": 3}, "num_heads=3: must be a divisor of hidden_size=32"),
        ({"num_heads": 8}, "num_heads=8: must leave an even head dim >= 6"),
        ({"depth": 0}, "depth=0: must be an integer >= 1"),
        ({"image_dim": -1}, "image_dim=-1: must be an integer >= 0"),
        ({"patch_size": (1, 2)}, r"patch_size=\(1, 2\): must be three integers from 1 to 64"),
        ({"references": "channels"}, "references=channels: must be one of none, clip, in_place"),
    ],
)
def test_shapes_that_cannot_be(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(MODELS["t2v"], **keys)


def test_widths_that_do_not_fit() -> None:
    cfg = SIZES["ti2v_5b"]
    given = Widths(Width(48, "vae.kind=wan22"), Width(4096, "text.kind=umt5"), Width(None, ""))
    family_of(cfg).check(cfg, given)
    with pytest.raises(ValueError, match=r"in_channels=48: vae.kind=wan gives 16; set model.in_channels=16"):
        family_of(cfg).check(cfg, given._replace(latents=Width(16, "vae.kind=wan")))
    with pytest.raises(ValueError, match=r"text_dim=4096: text.kind=t5 gives 24; set model.text_dim=24"):
        family_of(cfg).check(cfg, given._replace(text=Width(24, "text.kind=t5")))


def test_what_others_are_told() -> None:
    told = {name: describe(cfg) for name, cfg in SIZES.items()}
    assert [told[name].references for name in ("t2v_14b", "i2v_a14b", "ti2v_5b")] == ["none", "clip", "in_place"]
    assert told["i2v_14b"].image_dim == 1280 and told["i2v_a14b"].image_dim == 0
    assert told["ti2v_5b"].latent_channels == 48 and told["t2v_1_3b"].heads == 12
    slots = [set(build(name).attention_cores) for name in ("t2v", "picture")]
    assert slots[1] - slots[0] == {"blocks.*.cross_attn.core_img"}
    assert isinstance(build("t2v").blocks[0], WanBlock)


def build(name: str) -> Any:
    with torch.device("meta"):
        model: nn.Module = build_model(MODELS[name])
    return model
