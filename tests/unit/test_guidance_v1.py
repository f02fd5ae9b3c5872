"""Guidance, given frames and the loss's reduction of Open-Sora 1.x, by hand."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from opensora.assembly.encoders import Encoders
from opensora.assembly.token_layout import token_layout
from opensora.conditioning import ConditioningConfig, DropoutConfig
from opensora.conditioning.condition_dropout import DROPS, draw_drops, known_weights
from opensora.config.run import SampleConfig
from opensora.datasets import DataConfig
from opensora.datasets.buckets.bucket import Bucket
from opensora.inference.check import solver_of
from opensora.inference.steps import guided_channels, keeps_known, ratios_of_tokens
from opensora.models.base import AutoencoderShape
from opensora.models.conditions import Conditions
from opensora.sampling.given_frames import EditedFrames, SDEdit
from opensora.sampling.guidance import TextGuidance, TextImageGuidance, build_guidance, image_scale
from opensora.sampling.options import SamplingOption
from opensora.schedulers import build_solver
from opensora.schedulers.base import SolverOptions
from opensora.schedulers.iddpm import IDDPM, IDDPMConfig
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.train import step_data
from opensora.train.loss_weights import loss_weights
from opensora.train.preparation import Preparation, loss_share
from opensora.utils.errors import UserError
from opensora.utils.tokens import Grid
from tests.dist.factored import BUCKETS, CPU, MASKS, MODEL, Latents, ToyBatch, batches, plain_model
from tests.dist.problem import FakeText
from tests.factored_family import GaussianFlow, GaussianFlowConfig

POSITIONS = torch.arange(4.0).view(1, 4, 1, 1).expand(2, 4, 3, 3)


def predictions(passes: int, channels: int = 8) -> list[Tensor]:
    return [torch.randn(2, 4, 3, channels, generator=torch.Generator().manual_seed(i)).double() for i in range(passes)]


# Guidance.
@pytest.mark.parametrize("guided", [3, 4, 8, None])
def test_channels_beyond_the_guided_ones_stay_those_of_the_prompt(guided: int | None) -> None:
    cond, uncond = predictions(2)
    found = TextGuidance(SamplingOption(guidance=4.0), guided).combine([cond, uncond], 0)
    split = 8 if guided is None else guided
    assert torch.allclose(found[..., :split], (4 * cond - 3 * uncond)[..., :split])
    assert torch.equal(found[..., split:], cond[..., split:])


def test_latent_channels_are_those_of_tokens_and_outputs() -> None:
    denoising = token_layout(MODEL, SequenceParallel(meshes.view({}))).denoising  # 4 channels, 2x2 patches, 2 outputs
    assert guided_channels(denoising, SamplingOption()) == 16
    assert guided_channels(denoising, SamplingOption(cfg_channel=3)) == 12
    assert guided_channels(replace(denoising, outputs=1), SamplingOption()) is None
    assert keeps_known(RectifiedFlowV1Config(version="1.3"))
    assert not keeps_known(RectifiedFlowV1Config()) and not keeps_known(RectifiedFlowConfig())


def test_the_flaw_fix_is_of_whole_samples() -> None:
    cond, uncond = predictions(2)
    option = SamplingOption(guidance=4.0, use_flaw_fix=True)
    plain = (4 * cond - 3 * uncond)[..., :4]
    contrast = cond[..., :4].flatten(1).std(1) / plain.flatten(1).std(1)
    wanted = plain * (0.7 * contrast + 0.3).view(2, 1, 1, 1)
    found = TextGuidance(option, 4).combine([cond, uncond], 0)
    assert torch.allclose(found[..., :4], wanted, atol=1e-12) and torch.equal(found[..., 4:], cond[..., 4:])


def test_the_flaw_fix_sums_over_the_processes_of_a_sample() -> None:
    """Two processes in turn: what the one adds to a sum is noted for the other, until none changes any more."""
    cond, uncond = predictions(2)
    option = SamplingOption(guidance=4.0, use_flaw_fix=True)
    whole = TextGuidance(option, 4).combine([cond, uncond], 0)
    parts = [[x[:, :, :1] for x in (cond, uncond)], [x[:, :, 1:] for x in (cond, uncond)]]
    notes: list[dict[int, Tensor]] = [{}, {}]
    found: list[Tensor] = []
    for _ in range(3):
        found = []
        for rank, part in enumerate(parts):
            calls = iter(range(2))

            def total(x: Tensor, rank: int = rank, calls: Any = calls) -> Tensor:
                call = next(calls)
                notes[rank][call] = x.clone()
                return x + notes[1 - rank].get(call, torch.zeros_like(x))

            found.append(TextGuidance(option, 4, total).combine(part, 0))
    assert torch.allclose(torch.cat(found, dim=2), whole, atol=1e-12)


def test_the_pass_without_references_is_told_where_they_would_be() -> None:
    known = Conditions(text=torch.ones(1), reference=torch.ones(1, 4, 3, 8), known=torch.ones(1, 4, 3).bool())
    null, option = Conditions(text=torch.zeros(1)), SamplingOption()
    passes = TextImageGuidance(option, 5, 4, POSITIONS, None, True).passes(known, null, 0)
    assert [one.text is null.text for one in passes] == [False, True, True]
    assert passes[2].known is known.known and passes[2].reference is not None and not passes[2].reference.any()
    blind = TextImageGuidance(option, 5, 4, POSITIONS).passes(known, null, 0)[2]
    assert blind.known is None and blind.reference is None


def test_three_passes_by_hand() -> None:
    c, u, u0 = predictions(3)
    option = SamplingOption(guidance=7.0, guidance_img=None, text_osci=True, force_num=2)
    guidance = build_guidance(option, references=True, steps=5, latent_frames=4, positions=POSITIONS, guided=4)
    for index, scale in ((0, 7.0), (2, 7.0), (3, 1.0), (4, 7.0)):
        found = guidance.combine([c, u, u0], index)
        assert torch.allclose(found[..., :4], (u0 + 7.0 * (u - u0) + scale * (c - u))[..., :4])
        assert torch.equal(found[..., 4:], c[..., 4:])


def test_the_image_scale_grows_along_the_clip_and_falls_over_the_steps() -> None:
    option = SamplingOption(guidance_img=5.0, scale_image_weight=True, initial_image_scale=2.0)
    for step, limit in enumerate(torch.linspace(5, 2, 7).tolist()):
        found = image_scale(option, step, 7, 4, POSITIONS)
        assert isinstance(found, Tensor)
        assert found[0, :, 0, 0].tolist() == pytest.approx(torch.linspace(2, limit, 4).tolist(), abs=1e-6)
    oscillating = replace(option, image_osci=True, force_num=2)
    assert image_scale(oscillating, 3, 7, 4, POSITIONS) == 1.0  # not above the least: as it is
    assert image_scale(replace(option, guidance_img=1.5), 0, 7, 4, POSITIONS) == 1.5


# Frames that are given.
def test_edited_frames_are_noised_told_and_put_back() -> None:
    solver: Any = build_solver("euler", RectifiedFlowV1Config(), SolverOptions(4), Grid((4, 1, 3), (1, 1, 1)))
    ratios = torch.tensor([[0.0, 0.5, 1.0, 1.0]])[..., None].expand(2, -1, 3)
    noise = {step: torch.full((2, 4, 3, 2), float(step + 1)) for step in range(4)}
    frames, x = EditedFrames(ratios, solver, noise.__getitem__), torch.randn(2, 4, 3, 2)
    begun, told = frames.before(x, Conditions(text=torch.ones(1)), 1)  # at 750
    assert (
        torch.equal(begun, x) and told.known is not None and told.known[0, :, 0].tolist() == [True, True, False, False]
    )
    made = torch.zeros_like(x)
    assert torch.equal(frames.after(x, made, 1)[:, :2], x[:, :2]) and not frames.after(x, made, 1)[:, 2:].any()
    begun, told = frames.before(x, Conditions(), 2)  # at 500
    assert torch.allclose(begun[:, 1], 0.5 * x[:, 1] + 0.5 * 3) and torch.equal(begun[:, 2:], x[:, 2:])
    assert told.known is not None and told.known[0, :, 0].tolist() == [True, False, False, False]
    begun, _ = frames.before(x, Conditions(), 3)
    assert torch.equal(begun, x)


def test_sdedit_puts_references_into_the_noise() -> None:
    solver: Any = build_solver("euler", RectifiedFlowV1Config(), SolverOptions(4), Grid((4, 1, 3), (1, 1, 1)))
    known = torch.zeros(1, 4, 3, dtype=torch.bool)
    known[:, 0] = True
    told = Conditions(reference=torch.full((1, 4, 3, 2), 8.0), known=known)
    frames, x = SDEdit(solver, lambda step: torch.full((1, 4, 3, 2), 4.0)), torch.randn(1, 4, 3, 2)
    begun, same = frames.before(x, told, 3)  # at 250
    assert (begun[:, 0] == 7.0).all() and torch.equal(begun[:, 1:], x[:, 1:]) and same is told
    assert torch.equal(frames.after(x, begun, 3), begun)
    assert torch.equal(frames.before(x, Conditions(), 3)[0], x)


def test_ratios_of_tokens() -> None:
    layout = token_layout(MODEL, SequenceParallel(meshes.view({})))
    found = ratios_of_tokens(layout, torch.tensor([[0.0, 0.25, 1.0]]), Grid((3, 2, 6), (1, 2, 2)))
    assert found.shape == (1, 3, 3) and found[0, :, 1].tolist() == [0.0, 0.25, 1.0]


# What tokens weigh in the loss.
def preparation(mesh: meshes.Mesh, **changes: Any) -> Preparation:
    return Preparation(
        encoders=Encoders(autoencoder=Latents(), text_encoder=FakeText(), device=CPU),
        objective=changes.pop("objective", GaussianFlow(GaussianFlowConfig())),
        conditioning=ConditioningConfig(dropout=DropoutConfig(text=0.0), masks=MASKS),
        model=MODEL,
        layout=token_layout(MODEL, SequenceParallel(mesh)),
        seed=7,
        **changes,
    )


@pytest.mark.parametrize("objective", [GaussianFlow(GaussianFlowConfig()), IDDPM(IDDPMConfig())])
def test_the_mean_over_samples_is_that_of_the_means_of_samples(objective: Any) -> None:
    model, found, wanted = plain_model(), torch.zeros((), dtype=torch.float64), []
    samples = sum(batch for batch, *_ in BUCKETS)
    for batch in batches(0):
        tokens = preparation(meshes.view({}), objective=objective, reduction="samples")(batch, 0)  # type: ignore[arg-type]
        assert tokens.learned is not None
        found = found + loss_share(model, tokens, samples)
        every = objective.loss(model(**tokens.inputs), tokens.targets, tokens.times)
        wanted += [one[learned].mean() for one, learned in zip(every, tokens.learned, strict=True)]
    assert len(wanted) == samples and not all(torch.cat([t.flatten() for t in [tokens.learned]]))
    assert torch.allclose(found, torch.stack(wanted).mean(), rtol=1e-7)


def test_shares_of_the_mean_over_samples_add_up_over_processes() -> None:
    """The weights of a sample are of the whole of it, however it is cut."""
    for batch in batches(0):
        whole = preparation(meshes.view({}), reduction="samples")(batch, 0)  # type: ignore[arg-type]
        parts = [
            preparation(meshes.view({"ulysses": 3}, rank), reduction="samples")(batch, 0)  # type: ignore[arg-type]
            for rank in range(3)
        ]
        assert whole.weights is not None
        assert torch.equal(torch.cat([part.weights for part in parts], dim=2), whole.weights)  # type: ignore[misc]


def test_all_elements_alike_stays_the_rule() -> None:
    batch: ToyBatch = batches(0)[0]
    assert preparation(meshes.view({}))(batch, 0).weights is None  # type: ignore[arg-type]
    assert loss_weights(torch.zeros(2, 3, 5, 4), None, left_out=False) is None


def test_known_frames_weigh_as_they_are_told_and_the_mean_is_one() -> None:
    known = torch.zeros(3, 5, 2, dtype=torch.bool)
    known[0, 0], known[1, [0, 4]] = True, True
    found = known_weights(known, 0.1)
    assert torch.allclose(found.flatten(1).mean(1), torch.ones(3, dtype=torch.float64))
    assert found[0, 0].tolist() == pytest.approx([0.1, 0.1]) and found[0, 1, 0].item() == pytest.approx((5 - 0.1) / 4)
    assert found[1, 1, 0].item() == pytest.approx((5 - 2 * 0.1) / 3) and (found[2] == 1).all()
    assert torch.isfinite(known_weights(torch.ones(1, 4, 2, dtype=torch.bool), 0.5)).all()


def test_conditions_are_dropped_by_their_weights() -> None:
    weights = {"keep": 2, "cond": 1, "text": 0, "null": 1}
    drawn = draw_drops(5, 1, tuple(range(4000)), weights)
    assert drawn[7:9] == draw_drops(5, 1, (7, 8), weights)
    shares = {name: drawn.count(drop) / len(drawn) for name, drop in DROPS.items()}
    assert shares == pytest.approx({"keep": 0.5, "cond": 0.25, "text": 0.0, "null": 0.25}, abs=0.03)
    assert DROPS["cond"].text and DROPS["text"].reference and all(DROPS["null"]) and not any(DROPS["keep"])


# What does not fit.
@pytest.mark.parametrize(
    ("objective", "options", "said"),
    [
        (IDDPMConfig(), {"solver": "euler"}, "sampling.solver=euler: must be one of ddpm, ddim, dpm_solver"),
        (RectifiedFlowV1Config(), {"solver": "ddpm"}, "sampling.solver=ddpm: must be one of euler"),
        (RectifiedFlowConfig(), {"solver": "dpm_solver"}, "must be one of euler, unipc, dpm++"),
        (IDDPMConfig(), {"eta": 0.5}, "sampling.eta=0.5: is for solver=ddim, not ddpm"),
        (
            IDDPMConfig(),
            {"solver": "dpm_solver", "timestep_respacing": "10"},
            "is for solver=ddpm or ddim, not dpm_solver",
        ),
        (RectifiedFlowV1Config(), {"clip_denoised": True}, "sampling.clip_denoised=True: is for solver=ddpm or ddim"),
        (
            IDDPMConfig(),
            {"flow_shift": 3.0},
            "flow_shift=3.0: is for solver=euler or unipc or dpm++, not ddpm",
        ),
        (IDDPMConfig(diffusion_steps=500), {"num_steps": 501}, "sampling.num_steps=501: a section of 500"),
        (IDDPMConfig(), {"timestep_respacing": "ddim999"}, "sampling.timestep_respacing=ddim999: no whole distance"),
        (
            RectifiedFlowV1Config(use_timestep_transform=True),
            {"num_frames": 16},
            "sampling.num_frames=16: 16 frames are",
        ),
    ],
)
def test_solvers_and_options_that_do_not_fit(objective: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        solver_of("sampling", SamplingOption(**options), objective)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timestep_respacing": "ten"}, "timestep_respacing='ten': must be a number of steps as 100"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": 1.5}, "eta=1.5: must be at most 1"),
        ({"cfg_channel": 0}, "cfg_channel=0"),
        ({"force_num": -1}, "force_num=-1"),
        ({"initial_image_scale": -1.0}, "initial_image_scale=-1.0"),
        ({"scale_image_weight": True, "scale_temporal_osci": True}, "scale_image_weight=true"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingOption(**options)


def test_steps_that_are_chosen_are_counted() -> None:
    for spec, count in (("10,20,30", 60), ("ddim50", 50), ("", 1000), ("7", 7)):
        assert SamplingOption(timestep_respacing=spec).num_steps == count
        solver = build_solver(
            "ddim", IDDPMConfig(), SolverOptions(0, timestep_respacing=spec), Grid((1, 1, 1), (1, 1, 1))
        )
        assert len(solver.times) == count + 1
    assert (
        SampleConfig(weights="x", prompt="a", sampling=SamplingOption(timestep_respacing="5")).sampling.num_steps == 5
    )


@pytest.mark.parametrize(("reduction", "wanted"), [("elements", 3 * 16 * 2 * 4 * 6 + 16 * 4 * 4), ("samples", 4)])
def test_a_step_says_what_its_loss_is_the_mean_over(
    monkeypatch: pytest.MonkeyPatch, reduction: Any, wanted: int
) -> None:
    monkeypatch.setattr(step_data, "build_loader", lambda *args, **options: None)
    shapes = Counter({Bucket("32px", 5, 32, 48, 3): 3, Bucket("32px", 1, 32, 32, 1): 1})
    plan: Any = SimpleNamespace(shapes=lambda step: shapes)
    table: Any = SimpleNamespace(content=None)
    data = step_data.StepData(
        table,
        plan,
        DataConfig(),
        meshes.view({}),
        AutoencoderShape(16, (4, 8, 8), True),
        start_step=0,
        stop_step=1,
        seed=0,
        reduction=reduction,
    )
    assert data.loss_terms(0) == wanted
