import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.conditioning import DropoutConfig
from opensora.conditioning.dropout import drop_text
from opensora.schedulers import build_objective, build_solver
from opensora.schedulers.base import SolverOptions
from opensora.schedulers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from opensora.schedulers.timesteps import draw_per_sample, logit_normal
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid

FLOW = RectifiedFlow(RectifiedFlowConfig())


def sample_timesteps(
    seed: int, step: int, ids: tuple[int, ...], latents: tuple[int, int, int], patch: int, flow: RectifiedFlow = FLOW
) -> Tensor:
    return flow.times(seed, step, ids, Grid(latents, (1, patch, patch)))


def sample_noise(seed: int, step: int, ids: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return draw_per_sample(seed, step, ids, "noise", shape)


def test_noised_and_target_by_hand() -> None:
    flow = RectifiedFlow(RectifiedFlowConfig(sigma_min=0.1))
    x0, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[10.0], [10.0]])
    x_t, targets = flow.noised(x0, noise, torch.tensor([0.25, 1.0]))
    # .75 * 2 + (1 - .9 * .75) * 10 = 1.5 + 3.25; at t=1 only noise
    assert torch.allclose(x_t, torch.tensor([[4.75], [10.0]]))
    assert torch.allclose(targets["velocity"], torch.tensor([[7.0], [7.0]]))  # .9 * 10 - 2


def test_target_is_the_derivative_of_the_path() -> None:
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    slope = (FLOW.noised(x0, noise, t + 1e-3).x - FLOW.noised(x0, noise, t - 1e-3).x) / 2e-3
    assert torch.allclose(slope, FLOW.noised(x0, noise, t).targets["velocity"], atol=1e-10)


def test_known_latents_stand_as_they_are() -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    known = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    known[1, 2] = True
    t = torch.tensor([0.5, 0.9])
    given, free = FLOW.noised(x0, noise, t, known).x, FLOW.noised(x0, noise, t).x
    assert torch.equal(given[1, :, 2], x0[1, :, 2])
    assert torch.equal(given[0], free[0]) and torch.equal(given[1, :, :2], free[1, :, :2])


def test_bf16_latents_are_mixed_in_fp32() -> None:
    x0 = torch.randn(2, 4).bfloat16()
    x_t, targets = FLOW.noised(x0, torch.randn(2, 4), torch.rand(2))
    assert x_t.dtype == targets["velocity"].dtype == torch.float32
    assert FLOW.loss(x0, {"velocity": x0}, torch.rand(2, 1)).dtype == torch.float32
    assert FLOW.loss(x0, {"velocity": x0.double()}, torch.rand(2, 1)).dtype == torch.float64


def test_loss_is_of_every_value_and_reads_the_first_outputs() -> None:
    prediction, zeros = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    found = FLOW.loss(prediction, {"velocity": zeros}, torch.rand(2, 1))
    assert torch.equal(found, torch.tensor([[1.0, 4.0], [9.0, 16.0]]))
    with_variance = torch.cat((prediction, torch.full((2, 2), 7.0)), dim=-1)
    assert torch.equal(FLOW.loss(with_variance, {"velocity": zeros}, torch.rand(2, 1)), found)


def test_euler_follows_the_shift_of_training_unless_the_job_says_another() -> None:
    grid, u = Grid((4, 64, 64), (1, 2, 2)), torch.linspace(1, 0, 6, dtype=torch.float64)

    def times(flow_shift: float | None, **options: float) -> list[float]:
        cfg = RectifiedFlowConfig(flow_shift=flow_shift)
        return list(build_solver("euler", cfg, SolverOptions(5, **options), grid).times)  # type: ignore[arg-type]

    def shifted(alpha: float) -> list[float]:
        return (alpha * u / (1 + (alpha - 1) * u)).tolist()

    by_formula = (1 + 2 * (1024 - 256) / (4096 - 256)) * 2  # 1024 tokens a frame, four latent frames
    assert times(None) == pytest.approx(shifted(by_formula))
    assert times(5.0) == pytest.approx(shifted(5.0)) and times(5.0, alpha=2.0) == pytest.approx(shifted(2.0))
    assert times(5.0, shift=False) == pytest.approx(u.tolist())
    assert build_objective(RectifiedFlowConfig()).solvers[0] == "euler"


def test_times_are_shifted_by_tokens_and_frames() -> None:
    ids = tuple(range(50))
    u = logit_normal(7, 3, ids)
    same = sample_timesteps(7, 3, ids, (1, 32, 32), 2)  # 256 tokens, one frame: alpha 1
    assert torch.allclose(same, u)
    longer = sample_timesteps(7, 3, ids, (4, 128, 128), 2)  # 4096 tokens: 3, four frames: times 2
    assert torch.allclose(longer, 6 * u / (1 + 5 * u))
    fixed = sample_timesteps(7, 3, ids, (4, 128, 128), 2, RectifiedFlow(RectifiedFlowConfig(flow_shift=1.0)))
    assert torch.allclose(fixed, u)


def test_u_is_logit_normal() -> None:
    u = logit_normal(0, 0, tuple(range(4000)))
    assert abs(u.logit().mean().item()) < 3 / math.sqrt(4000)
    assert abs(u.logit().std().item() - 1) < 0.05


def test_draws_belong_to_samples_not_to_batches() -> None:
    together = sample_noise(1, 2, (5, 9), (2, 1, 3, 3))
    alone = sample_noise(1, 2, (9,), (2, 1, 3, 3))
    assert together.shape == (2, 2, 1, 3, 3) and together.dtype == torch.float32
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, sample_noise(1, 3, (9,), (2, 1, 3, 3)))
    assert not torch.equal(alone, sample_noise(2, 2, (9,), (2, 1, 3, 3)))
    times = sample_timesteps(1, 2, (5, 9), (1, 8, 8), 2)
    assert torch.equal(times[1:], sample_timesteps(1, 2, (9,), (1, 8, 8), 2))


def test_text_dropout_is_independent_for_tokens_and_pooled() -> None:
    ids = tuple(range(5000))
    default = DropoutConfig()
    txt, vec = drop_text(0, 0, ids, default)
    assert abs(txt.float().mean().item() - 0.316) < 0.02
    assert abs(vec.float().mean().item() - 0.316) < 0.02
    assert abs((txt & vec).float().mean().item() - 0.1) < 0.015
    assert torch.equal(drop_text(0, 0, ids[9:10], default)[0], txt[9:10])
    never, always = drop_text(0, 0, ids, DropoutConfig(text=0.0, pooled=1.0))
    assert not never.any() and always.all()


def within(
    low: float, high: float, method: str, shift: float = 3.0, ids: tuple[int, ...] = tuple(range(3000))
) -> Tensor:
    cfg = RectifiedFlowConfig(flow_shift=shift, sample_method=method, t_min=low, t_max=high)  # type: ignore[arg-type]
    return sample_timesteps(7, 3, ids, (1, 32, 32), 2, RectifiedFlow(cfg))


def test_uniform_times_are_those_of_the_draws() -> None:
    found = within(0.0, 1.0, "uniform", ids=(5, 9))
    u = [torch.rand((), generator=torch_generator(7, 3, sample, "timestep")).item() for sample in (5, 9)]
    assert found.tolist() == pytest.approx([3 * one / (1 + 2 * one) for one in u])


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_an_expert_sees_the_times_of_its_range_as_often_as_one_model_would(method: str, shift: float) -> None:
    """By the share of draws below each of many places, of the whole and of the part."""
    low, high, whole = 0.4, 0.875, within(0.0, 1.0, method, shift)
    part = within(low, high, method, shift)
    assert part.dtype == torch.float32 and part.min() >= torch.tensor(low) and part.max() <= high
    wanted = whole[(whole >= low) & (whole <= high)]
    for place in torch.linspace(low, high, 9)[1:-1]:
        shares = [(times <= place).double().mean().item() for times in (part, wanted)]
        assert abs(shares[0] - shares[1]) < 3 * (0.25 / len(wanted) + 0.25 / len(part)) ** 0.5
    assert torch.equal(part[7:9], within(low, high, method, shift, ids=(7, 8)))  # of the sample, not of the batch


@pytest.mark.parametrize("method", ["uniform", "logit-normal"])
def test_times_of_a_range_by_formula(method: str) -> None:
    """The draw's share of all that is below it, put into the range's share."""
    normal = NormalDist()
    shift, low, high = 3.0, 0.5, 0.9
    for sample, found in zip((3, 4), within(low, high, method, shift, ids=(3, 4)).tolist(), strict=True):
        generator = torch_generator(7, 3, sample, "timestep")
        ends = [t / (shift - (shift - 1) * t) for t in (low, high)]
        if method == "uniform":
            u = ends[0] + (ends[1] - ends[0]) * torch.rand((), generator=generator).item()
        else:
            shares = [normal.cdf(math.log(u / (1 - u))) for u in ends]
            share = shares[0] + (shares[1] - shares[0]) * normal.cdf(torch.randn((), generator=generator).item())
            u = 1 / (1 + math.exp(-normal.inv_cdf(share)))
        assert found == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=1e-7)


def test_the_ends_of_all_times_belong_to_ranges() -> None:
    for method in ("uniform", "logit-normal"):
        assert 0.0 < within(0.0, 1e-3, method).max() <= 1e-3
        assert 0.999 <= within(0.999, 1.0, method).min() < 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"t_max": 0.0},
        {"t_min": 0.9, "t_max": 0.9},
        {"sample_method": "even"},
        {"t_min": 1.0},
        {"sigma_min": 1.0},
        {"flow_shift": 0.0},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(bad)[-1]):
        RectifiedFlowConfig(**bad)
    with pytest.raises(ValueError, match=r"pooled=1\.5"):
        DropoutConfig(pooled=1.5)
