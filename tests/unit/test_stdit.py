"""STDiT, STDiT2 and STDiT3 by themselves: how they start, what is trained, what they are told and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration import protocol
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.token_layout import token_layout
from opensora.models.base import Width, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import MODEL_SIZES, build_model, describe, family_of, init_model_
from opensora.models.stdit import STDiT2Config, STDiT3Config, STDiTConfig
from opensora.utils.rng import torch_generator

CONFIGS: dict[str, Any] = {
    f"{kind} {size}": cfg
    for kind in ("stdit", "stdit2", "stdit3")
    for size, cfg in MODEL_SIZES[kind].items()
    if size.startswith("debug")
}


def told(cfg: Any, latents: tuple[int, int, int] = (3, 4, 6), samples: int = 2, **changed: Any) -> dict[str, Any]:
    """Arguments of the forward for random clips."""
    layout = token_layout(cfg, SequenceParallel(meshes.view({})))
    draw = torch.Generator().manual_seed(5)
    x = layout.patchify(torch.randn(samples, cfg.in_channels, *latents, generator=draw))
    grid = layout.denoising.grid(latents)
    conditions = {
        "text": torch.randn(samples, 5, layout.denoising.text_dim, generator=draw),
        "text_mask": torch.arange(5) < torch.tensor([[3], [5]] * (samples // 2)),
        "fps": torch.full((samples,), 24.0),
        "size": torch.tensor([[240.0, 426.0]] * samples),
        "num_frames": torch.full((samples,), 51.0),
    } | changed
    tokens = TokenBatch(x=x, positions=layout.positions(grid, samples, "cpu"), grid=grid.sides)
    t = torch.linspace(100, 900, samples)
    return family_of(cfg).arguments(cfg, tokens, t, Conditions(**conditions))


def alive(cfg: Any) -> Any:
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.copy_(torch.randn(parameter.shape, generator=torch_generator("alive", name)) * 0.1)
            else:
                model.init_parameter_(name, parameter, torch_generator(0))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_new_model_starts_as(name: str) -> None:
    """Attention along time adds nothing: a frame is what it is without the others. STDiT and STDiT2 return zeros."""
    cfg, latents = CONFIGS[name], (3, 4, 6)
    model = build_model(cfg)
    init_model_(model, 0)
    given = told(cfg, latents)
    out = model(**given)
    if "stdit3" not in name:
        assert not out.any()
        model.final_layer.linear.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        out = model(**given)
    other = given | {"x": given["x"].clone()}
    other["x"][:, 1] += 1
    changed = (model(**other) - out).abs().amax(dim=(0, 2, 3))
    assert changed[1] > 0.01 and changed[0] == changed[2] == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    cfg = CONFIGS[name]
    model, changed = alive(cfg), {}
    if getattr(cfg, "cond_embed", False):
        known = torch.zeros(2, 3, 6, dtype=torch.bool)
        known[0, 0] = True
        changed = {"known": known, "reference": torch.randn(2, 3, 6, 4 * cfg.in_channels)}
    model(**told(cfg, **changed)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), parameter_name
        else:
            assert parameter_name in ("rope.freqs", "y_embedder.y_embedding") and parameter.grad is None


@pytest.mark.parametrize(
    ("cfg", "trained", "frozen"),
    [
        (replace(CONFIGS["stdit debug"], freeze="not_temporal"), "blocks.0.attn_temp.qkv.weight", "t_block.1.weight"),
        (replace(CONFIGS["stdit debug"], freeze="text"), "t_block.1.weight", "blocks.1.cross_attn.proj.bias"),
        (replace(CONFIGS["stdit2 debug"], freeze="not_temporal"), "blocks.1.attn_temp.proj.bias", "x_embedder.weight"),
        (
            replace(CONFIGS["stdit3 debug"], freeze_y_embedder=True),
            "spatial_blocks.0.attn.qkv.weight",
            "y_embedder.y_proj.fc1.weight",
        ),
        (
            replace(CONFIGS["stdit3 debug"], only_train_temporal=True),
            "temporal_blocks.1.mlp.fc1.bias",
            "spatial_blocks.1.mlp.fc1.bias",
        ),
    ],
)
def test_what_is_frozen(cfg: Any, trained: str, frozen: str) -> None:
    parameters = dict(build_model(cfg).named_parameters())
    assert parameters[trained].requires_grad and not parameters[frozen].requires_grad
    assert not any(parameters[name].requires_grad for name in parameters if name.endswith(("y_embedding", "freqs")))


def test_temporal_blocks_that_are_skipped() -> None:
    """As if they added nothing; they are kept, and not trained."""
    cfg = CONFIGS["stdit3 debug"]
    model, skips = alive(cfg), alive(replace(cfg, skip_temporal=True))
    for block in model.temporal_blocks:
        for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    torch.testing.assert_close(skips(**told(cfg)), model(**told(cfg)), rtol=1e-4, atol=1e-5)
    frozen = {name for name, p in skips.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if "blocks" in name} == {n for n in skips.state_dict() if "temporal_blocks" in n}


def test_a_sample_does_not_see_the_others() -> None:
    for cfg in CONFIGS.values():
        model, given = alive(cfg), told(cfg, samples=2)
        both = model(**given)
        one = told(cfg, samples=2) | {name: x[:1] for name, x in given.items() if isinstance(x, Tensor)}
        torch.testing.assert_close(model(**one), both[:1], rtol=1e-4, atol=1e-5)


def test_text_that_the_mask_hides_is_not_read() -> None:
    for cfg in CONFIGS.values():
        model, given = alive(cfg), told(cfg)
        other = given | {"y": torch.where(given["mask"][..., None], given["y"], 7.0)}
        torch.testing.assert_close(model(**other), model(**given), rtol=1e-5, atol=1e-6)


def test_dropped_samples_read_the_null_text_by_their_own_mask() -> None:
    for cfg in CONFIGS.values():
        model, given = alive(cfg), told(cfg, dropped=torch.tensor([True, False]))
        null = model.y_embedder.y_embedding.detach()[:5]
        by_hand = given | {"y": torch.stack((null, given["y"][1])), "dropped": None}
        torch.testing.assert_close(model(**given), model(**by_hand))


def test_text_that_was_projected_before() -> None:
    cfg = CONFIGS["stdit3 debug"]
    model, given = alive(cfg), told(cfg, dropped=torch.tensor([False, True]))
    cached = alive(replace(cfg, skip_y_embedder=True))
    assert describe(cached.cfg).text_dim == cfg.hidden_size
    torch.testing.assert_close(cached(**given | {"y": model.y_embedder(given["y"])}), model(**given))
    lengths = given["mask"].sum(dim=1).tolist()
    rows = torch.cat([row[:n] for row, n in zip(model.y_embedder(given["y"]), lengths, strict=True)])[None]
    found = cached(**given | {"y": rows, "mask": lengths, "dropped": None})
    torch.testing.assert_close(found, model(**given | {"dropped": None}), rtol=1e-4, atol=1e-5)


def test_stills_are_told_120_frames_a_second() -> None:
    """So are clips whose rate is not known."""
    cfg = CONFIGS["stdit3 debug"]
    for changed, wanted in (
        ({"num_frames": torch.ones(2)}, 120.0),
        ({"fps": torch.zeros(2)}, 120.0),
        ({"num_frames": None}, 24.0),
        ({}, 24.0),
    ):
        assert told(cfg, **changed)["fps"].tolist() == [wanted] * 2


@pytest.mark.parametrize("name", ["stdit debug", "stdit2 debug", "stdit3 debug"])
def test_known_frames_in_the_place_of_noisy_ones(name: str) -> None:
    """``x_mask`` is False where a frame is known, and a known frame is not told the time of the noisy ones."""
    cfg = CONFIGS[name]
    known = torch.zeros(2, 3, 6, dtype=torch.bool)
    known[1, 0] = True
    given = told(cfg, known=known)
    assert given["x_mask"].tolist() == [[True, True, True], [False, True, True]]
    assert told(cfg)["x_mask"] is None
    nothing = told(cfg, known=torch.zeros_like(known))
    model = alive(cfg)
    torch.testing.assert_close(model(**nothing), model(**told(cfg)), rtol=1e-4, atol=1e-5)


def test_known_frames_beside_the_noise() -> None:
    """What is known is given to the model, and whether anything may be: with nothing known biases are added."""
    cfg = CONFIGS["stdit3 debug_v1_3"]
    model, nothing = alive(cfg), told(cfg)
    assert "mask_index" not in nothing
    none = told(cfg, known=torch.zeros(2, 3, 6, dtype=torch.bool))
    assert not torch.equal(model(**nothing), model(**none))
    biases = model.x_embedder_cond.bias, model.x_embedder_cond_mask.bias
    for bias in biases:
        bias.data.zero_()
    torch.testing.assert_close(model(**nothing), model(**none), rtol=1e-4, atol=1e-5)
    listed = none | {"mask_index": []}
    torch.testing.assert_close(model(**listed), model(**none), rtol=1e-4, atol=1e-5)
    by_sample = none | {"mask_index": torch.tensor([[True, False, True]] * 2)}
    torch.testing.assert_close(model(**none | {"mask_index": [0, 2]}), model(**by_sample))


def test_structure_is_what_layouts_ask() -> None:
    for cfg in CONFIGS.values():
        model = build_model(cfg)
        assert isinstance(model, protocol.Parallelizable)
        names = protocol.block_names(model)
        if cfg.kind == "stdit3":
            assert names[:2] == ["spatial_blocks.0", "temporal_blocks.0"]
        for pattern in (*model.attention_cores, *model.axis_switches):
            assert list(protocol.slots(model, [pattern]))
    alone = build_model(replace(CONFIGS["stdit3 debug"], skip_temporal=True))
    assert len(alone.temporal_blocks) == 2 and alone.block_lists == ("spatial_blocks",)


@pytest.mark.parametrize(
    ("config", "wrong", "named"),
    [
        (STDiTConfig, {"space_scale": 0.0}, "space_scale=0.0"),
        (STDiTConfig, {"freeze": "temporal"}, "freeze=temporal"),
        (STDiTConfig, {"hidden_size": 60, "num_heads": 4}, "num_heads=4"),
        (STDiT2Config, {"hidden_size": 64, "num_heads": 4}, "hidden_size=64"),
        (STDiT2Config, {"input_sq_size": 0}, "input_sq_size=0"),
        (STDiT3Config, {"use_spatial_rope": True}, "use_spatial_rope"),
        (STDiT3Config, {"kernel_size": (8, -1, -1)}, "kernel_size=(8, -1, -1)"),
        (STDiT3Config, {"kernel_size": (8, 8)}, "kernel_size=(8, 8)"),
        (STDiT3Config, {"kernel_size": (8, 8, 0)}, "kernel_size=(8, 8, 0)"),
        (STDiT3Config, {"kernel_size": (8, 8, -1), "hidden_size": 64, "num_heads": 4}, "num_heads=4"),
    ],
)
def test_shapes_that_make_no_model(config: Any, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        config(**wrong)
    assert str(error.value).startswith(named) and "\n" not in str(error.value)


def test_widths_that_do_not_fit_are_named_with_those_that_do() -> None:
    given = Widths(Width(16, "vae.kind=opensora_v1_3"), Width(4096, "text.kind=t5"), Width(None, "text.kind=t5"))
    for kind in ("stdit", "stdit2", "stdit3"):
        cfg = MODEL_SIZES[kind]["xl2"]
        with pytest.raises(ValueError, match=r"set model\.in_channels=16"):
            family_of(cfg).check(cfg, given)
    family_of(MODEL_SIZES["stdit3"]["xl2_v1_3"]).check(MODEL_SIZES["stdit3"]["xl2_v1_3"], given)
