import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.families import FAMILIES, MODEL_SIZES, build_model, count_parameters, init_model_
from opensora.models.layers import attention
from opensora.models.layers.attention import SDPACore
from opensora.models.layers.embedding import sinusoid
from opensora.models.layers.rope import apply_rope, rope_table
from opensora.models.mmdit import FAMILY, MMDiTConfig, MMDiTModel
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import image_ids

torch.set_num_threads(1)

DEBUG = MODEL_SIZES["mmdit"]["debug"]


def random_model(cfg: MMDiTConfig, dtype: torch.dtype = torch.float32) -> MMDiTModel:
    """Every parameter random and nonzero, so that nothing hides behind a zero gate."""
    model = MMDiTModel(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=torch_generator(0, name))
            if name.endswith(".scale"):
                parameter.add_(1)
    return model.to(dtype)


def inputs(
    cfg: MMDiTConfig, batch: int = 2, grid: tuple[int, int, int] = (3, 4, 6), text: int = 5, dtype: Any = torch.float32
) -> dict[str, Any]:
    generator = torch_generator(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = image_ids(grid, cfg.patch_size).expand(batch, -1, -1)
    tokens = ids.shape[1]
    return {
        "img": randn(batch, tokens, cfg.in_channels),
        "img_ids": ids,
        "txt": randn(batch, text, cfg.context_in_dim),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.linspace(0.1, 0.9, batch),
        "y_vec": randn(batch, cfg.vec_in_dim),
        "cond": randn(batch, tokens, cfg.cond_channels) if cfg.cond_embed else None,
        "guidance": torch.full((batch,), 4.0) if cfg.guidance_embed else None,
    }


VARIANTS = {
    "debug": DEBUG,
    "unfused-half": replace(DEBUG, fused_qkv=False, rope_layout="half", qkv_bias=False),
    "guidance": replace(DEBUG, guidance_embed=True, cond_embed=False, out_channels=8),
    "double-only": replace(DEBUG, depth_single_blocks=0),
    "double-only-unfused": replace(DEBUG, depth_single_blocks=0, fused_qkv=False),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(cfg: MMDiTConfig) -> None:
    model = random_model(cfg)
    out = model(**inputs(cfg))
    assert out.shape == (2, 18, cfg.out_channels or cfg.in_channels)
    out.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_at_the_start_the_output_is_zero_and_every_gradient_exists(cfg: MMDiTConfig) -> None:
    model = build_model(cfg)
    init_model_(model, seed=0)
    given = inputs(cfg)
    if cfg.cond_embed:
        given["cond"] = torch.zeros_like(given["cond"])
    out = model(**given)
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_an_unknown_condition_still_trains_its_bias() -> None:
    model, given = random_model(DEBUG), inputs(DEBUG)
    model(**{**given, "cond": torch.zeros_like(given["cond"])}).sum().backward()
    assert model.cond_in is not None and model.cond_in.bias.grad is not None
    assert model.cond_in.bias.grad.abs().max() > 0


def test_init_is_keyed_by_name() -> None:
    first, second = build_model(DEBUG), build_model(replace(DEBUG, depth_single_blocks=1))
    init_model_(first, seed=3)
    init_model_(second, seed=3)
    shared = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, shared[name]), name
    init_model_(second, seed=4)
    assert not torch.equal(first.img_in.weight, second.img_in.weight)
    weight = first.double_blocks[0].img_mlp[2].weight
    assert weight.var().item() == pytest.approx(1 / weight.shape[1], rel=0.05)


def test_what_starts_at_zero_and_at_one() -> None:
    model = random_model(replace(DEBUG, guidance_embed=True))
    init_model_(model, seed=0)
    zero = ("cond_in.", "final_layer.", "_mod.lin.", ".modulation.lin.", ".bias")
    for name, parameter in model.named_parameters():
        if any(part in name for part in zero):
            assert parameter.abs().max() == 0, name
        elif name.endswith(".scale"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.std() > 0.01, name


def test_init_in_fp64_is_the_fp32_draw() -> None:
    single, double = build_model(DEBUG), build_model(DEBUG).double()
    init_model_(single, seed=0)
    init_model_(double, seed=0)
    for p, q in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(p.double(), q)


@pytest.mark.parametrize(("size", "millions"), [("demo", 5), ("1b", 1000), ("3b", 3000), ("11b", 11900)])
def test_sizes(size: str, millions: float) -> None:
    assert count_parameters(MODEL_SIZES["mmdit"][size]) / 1e6 == pytest.approx(millions, rel=0.05)


def test_built_on_meta() -> None:
    with torch.device("meta"):
        model = build_model(MODEL_SIZES["mmdit"]["11b"])
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert list(model.buffers()) == []  # nothing that materialising would have to restore


def test_state_dict_names_are_those_of_flux() -> None:
    names = set(MMDiTModel(replace(DEBUG, guidance_embed=True)).state_dict())
    bias = ("weight", "bias")
    wanted = {f"{layer}.{kind}" for layer in ("img_in", "cond_in", "txt_in", "final_layer.linear") for kind in bias}
    wanted |= {f"final_layer.adaLN_modulation.1.{kind}" for kind in bias}
    for embedder in ("time_in", "vector_in", "guidance_in"):
        wanted |= {f"{embedder}.{layer}.{kind}" for layer in ("in_layer", "out_layer") for kind in bias}
    for index in range(2):
        for stream in ("img", "txt"):
            layers = ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
            wanted |= {f"double_blocks.{index}.{stream}_{layer}.{kind}" for layer in layers for kind in bias}
            norms = ("query_norm", "key_norm")
            wanted |= {f"double_blocks.{index}.{stream}_attn.norm.{norm}.scale" for norm in norms}
        layers = ("modulation.lin", "linear1", "linear2")
        wanted |= {f"single_blocks.{index}.{layer}.{kind}" for layer in layers for kind in bias}
        wanted |= {f"single_blocks.{index}.norm.{norm}.scale" for norm in ("query_norm", "key_norm")}
    assert names == wanted


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SDPACore()
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Any = None, context: Any = None) -> Tensor:
        self.seen.append((q.shape, k.shape, v.shape, key_mask, context))
        return self.inner(q, k, v, key_mask=key_mask, context=context)


@pytest.mark.parametrize("cfg", [DEBUG, VARIANTS["double-only"]], ids=["debug", "double-only"])
def test_cores_are_slots_and_receive_mask_and_context(cfg: MMDiTConfig) -> None:
    model, given, context = random_model(cfg), inputs(cfg), object()
    plain = model(**given)
    slots = [f"{kind}.{i}" for kind in MMDiTModel.block_lists for i in range(len(model.get_submodule(kind)))]
    recorders = []
    for slot in slots:
        assert not list(model.get_submodule(f"{slot}.core").parameters())
        recorders.append(Recorder())
        model.get_submodule(slot).core = recorders[-1]  # type: ignore[assignment]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    model(**given, txt_mask=mask, context=context)
    for recorder in recorders:
        (q, k, v, key_mask, got) = recorder.seen[0]
        assert q == k == v == (2, 23, 4, 16) and got is context
        assert torch.equal(key_mask, torch.cat((mask, torch.ones(2, 18, dtype=torch.bool)), dim=1))
    recorded = model(**given)
    assert recorders[0].seen[1][3] is None and torch.equal(recorded, plain)


def test_masked_text_is_as_absent() -> None:
    model, given = random_model(DEBUG, torch.float64), inputs(DEBUG, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    short = {**given, "txt": given["txt"][:, :3], "txt_ids": given["txt_ids"][:, :3]}
    assert torch.allclose(model(**given, txt_mask=mask), model(**short), atol=1e-12)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A softmax over nothing is NaN here; whether it is in torch depends on the kernel."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["torch", "naive"])
def test_a_sample_without_keys_gives_zeros_and_finite_gradients(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "naive":
        monkeypatch.setattr(attention, "scaled_dot_product_attention", naive_attention)
    q, k, v = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = SDPACore()(q, k, v, key_mask=mask)
    assert out[1].abs().max() == 0
    alone = SDPACore()(q[:1], k[:1, ::2], v[:1, ::2])
    assert torch.allclose(out[:1], alone, atol=1e-6)
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all() and x.grad[1].abs().max() == 0


class Nothing(nn.Module):
    """A core in which no token meets another, so a share can be compared with the whole."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Any = None, context: Any = None) -> Tensor:
        return v + q + k


@pytest.mark.parametrize("variant", ["debug", "double-only", "unfused-half"])
@pytest.mark.parametrize(("text", "tokens"), [(0, 18), (5, 0), (0, 0), (2, 7)])
def test_a_share_of_the_tokens_may_be_empty(variant: str, text: int, tokens: int) -> None:
    cfg = VARIANTS[variant]
    model, given = random_model(cfg, torch.float64), inputs(cfg, dtype=torch.float64)
    for block in [*model.double_blocks, *model.single_blocks]:
        block.core = Nothing()
    share = {**given, "txt": given["txt"][:, :text], "txt_ids": given["txt_ids"][:, :text]}
    share.update({name: given[name][:, :tokens] for name in ("img", "img_ids", "cond")})
    out = model(**share, txt_mask=torch.ones(2, text, dtype=torch.bool))
    assert torch.allclose(out, model(**given)[:, :tokens], atol=1e-12)
    out.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("text", "tokens"), [(0, 18), (5, 0), (0, 0)])
def test_the_plain_core_also_takes_empty_streams(text: int, tokens: int) -> None:
    model, given = random_model(DEBUG), inputs(DEBUG)
    share = {**given, "txt": given["txt"][:, :text], "txt_ids": given["txt_ids"][:, :text]}
    share.update({name: given[name][:, :tokens] for name in ("img", "img_ids", "cond")})
    out = model(**share)
    out.sum().backward()
    assert out.shape == (2, tokens, 16) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_times_stay_exact_in_a_bf16_model() -> None:
    model = random_model(DEBUG, torch.bfloat16)
    seen: list[Tensor] = []
    model.time_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    given = {**inputs(DEBUG), "timesteps": torch.tensor([0.990, 0.991])}  # one number in bf16
    out = model(**given)
    assert out.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    assert not torch.equal(seen[0][0], seen[0][1])


def test_fp64_is_fp64_throughout() -> None:
    given = inputs(DEBUG, dtype=torch.float64)
    double, single = random_model(DEBUG, torch.float64), random_model(DEBUG)
    out = double(**given)
    assert out.dtype == torch.float64
    error = (single(**inputs(DEBUG)).double() - out).abs().max() / out.abs().max()
    assert 1e-9 < error < 1e-5


def test_output_is_not_a_view() -> None:
    for cfg in VARIANTS.values():
        assert not random_model(cfg)(**inputs(cfg))._is_view()


def test_inputs_that_the_model_does_not_read_are_refused() -> None:
    model, given = random_model(DEBUG), inputs(DEBUG)
    with pytest.raises(ValueError, match="cond is missing"):
        model(**{**given, "cond": None})
    with pytest.raises(ValueError, match="guidance was given"):
        model(**{**given, "guidance": torch.ones(2)})


def test_sinusoid_by_hand() -> None:
    t = torch.tensor([0.002], dtype=torch.float64)
    emb = sinusoid(t, 4)[0]  # angles 2 and 2 / 100
    assert torch.allclose(
        emb,
        torch.tensor([2.0, 0.02, 2.0, 0.02], dtype=torch.float64)
        .cos()
        .where(
            torch.tensor([True, True, False, False]), torch.tensor([2.0, 0.02, 2.0, 0.02], dtype=torch.float64).sin()
        ),
    )


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rope_depends_on_distances_only(layout: Any) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def logit(at_q: list[int], at_k: list[int]) -> float:
        tables = [
            rope_table(torch.tensor([[at]], dtype=torch.float64), (4, 6, 6), 10000, layout) for at in (at_q, at_k)
        ]
        return (apply_rope(q, tables[0], layout) * apply_rope(k, tables[1], layout)).sum().item()

    assert logit([1, 2, 3], [0, 5, 1]) == pytest.approx(logit([4, 12, 8], [3, 15, 6]))
    assert logit([1, 2, 3], [0, 5, 1]) != pytest.approx(logit([2, 2, 3], [0, 5, 1]))
    assert logit([0, 0, 0], [0, 0, 0]) == pytest.approx((q * k).sum().item())


def test_rope_pairs() -> None:
    x = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
    at = torch.tensor([[[0.0, math.pi / 2]]])  # a quarter turn about the second axis: (a, b) -> (-b, a)
    for layout, wanted in (("interleaved", [1, 2, -4, 3]), ("half", [1, -4, 3, 2])):
        turned = apply_rope(x, rope_table(at, (2, 2), 10000, layout), layout)
        assert torch.allclose(turned.flatten(), torch.tensor(wanted, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_heads": 5},
        {"axes_dim": (4, 6, 8)},
        {"axes_dim": (5, 5, 6)},
        {"depth": 0},
        {"depth_single_blocks": -1},
        {"in_channels": 6},
        {"rope_layout": "spiral"},
        {"mlp_ratio": 0.0},
        {"theta": 1},
        {"out_channels": 0},
    ],
)
def test_bad_shapes_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(DEBUG, **bad)


def test_config_says_its_kind_first() -> None:
    assert fields(MMDiTConfig)[0].name == "kind"
    assert FAMILIES[DEBUG.kind] == FAMILY and (FAMILY.config, FAMILY.model) == (MMDiTConfig, MMDiTModel)
