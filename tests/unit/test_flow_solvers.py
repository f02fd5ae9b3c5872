"""DPM-Solver++ and UniPC for flows: formulas written out, data whose flow is known, and the schedulers of diffusers."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from opensora.schedulers import build_solver
from opensora.schedulers.base import EditingSolver, SolverOptions
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.tokens import Grid

GRID = Grid((4, 64, 64), (1, 2, 2))
KINDS = ("unipc", "dpm++")
MEAN, SPREAD = 0.4, 0.3  # of the data
Predict = Callable[[Any, float], Any]


def solver_of(kind: str, steps: int, shift: float = 5.0, **options: Any) -> Any:
    return build_solver(kind, RectifiedFlowConfig(flow_shift=shift), SolverOptions(steps, **options), GRID)


def run(solver: Any, x: Tensor, predict: Predict) -> Tensor:
    for index, time in enumerate(list(solver.times)[:-1]):
        x = solver.step(x, predict(x, time), index, torch.Tensor)
    return x


def velocity(x: Any, t: float, spread: float = SPREAD) -> Any:
    """The best prediction for normal data: E[noise - x0 | x]."""
    variance = (1 - t) ** 2 * spread**2 + t**2
    off = x - (1 - t) * MEAN
    return (t - (1 - t) * spread**2) / variance * off - MEAN


def curved(x: Any, t: float) -> Any:
    """Any other one."""
    return np.sin(3 * np.asarray(x)) * (1 + t) - t**2


def by_formula(kind: str, times: list[float], x: np.ndarray, predict: Predict) -> np.ndarray:
    """All of a clip's steps at once, with every phi as the integral that it is, and the weights by solving for them."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    nodes, weights = (nodes + 1) / 2, weights / 2

    def phi(k: int, z: float) -> float:
        return float((weights * np.exp((1 - nodes) * z) * nodes ** (k - 1)).sum()) / math.factorial(k - 1)

    lam = [math.log((1 - t) / t) if t else math.inf for t in times]
    steps, kept, found = len(times) - 1, [], []
    for i in range(steps):
        arrived = x - times[i] * predict(x, times[i])
        if i and kind == "unipc":
            x = moved(kind, times, lam, i - 1, kept, [*found, arrived], phi)
        kept.append(x)
        found.append(arrived)
        x = arrived if i == steps - 1 else moved(kind, times, lam, i, kept, found, phi)
    return x


def moved(
    kind: str, times: list[float], lam: list[float], i: int, kept: list[Any], found: list[Any], phi: Callable[..., Any]
) -> Any:
    """From times[i] to the next one, with all that is found: one more than that at times[i] is the corrector's."""
    h, points = lam[i + 1] - lam[i], [i - 1] * (i > 0) + [i + 1] * (len(found) > i + 1)
    r = [(lam[j] - lam[i]) / h for j in points]
    slopes = [(found[j] - found[i]) / at for j, at in zip(points, r, strict=True)]
    if len(points) == 1:
        rho = [0.5]
    else:
        powers = np.array([[1.0] * len(r), r][: len(r)])
        wanted = [math.factorial(k) * phi(k + 1, -h) / phi(1, -h) for k in range(1, len(r) + 1)]
        rho = list(np.linalg.solve(powers, wanted)) if points else []
    if kind == "dpm++":
        # x0 is a line through the last two points of exp(lambda); its rise is reckoned with half a step
        rho = [0.5] if points else []
    total = found[i] + sum((weight * slope for weight, slope in zip(rho, slopes, strict=True)), np.zeros_like(found[i]))
    return times[i + 1] / times[i] * kept[i] + (1 - times[i + 1]) * h * phi(1, -h) * total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_steps_by_formula(kind: str, steps: int) -> None:
    x = np.linspace(-2, 2, 7)
    found = run(solver_of(kind, steps), torch.tensor(x)[None, :, None], lambda x, t: torch.tensor(curved(x, t)))
    wanted = by_formula(kind, list(solver_of(kind, steps).times), x, curved)
    assert np.abs(found.flatten().numpy() - wanted).max() < 1e-12


@pytest.mark.parametrize("steps", [2, 5, 20, 40])
def test_dpm_solver_is_that_of_diffusers(steps: int) -> None:
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(steps)
    compare("dpm++", steps, theirs)


@pytest.mark.parametrize("steps", [2, 5, 20, 40])
def test_unipc_is_that_of_diffusers(steps: int) -> None:
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    compare("unipc", steps, theirs)


def compare(kind: str, steps: int, theirs: Any) -> None:
    """Their tables are in fp32; the model is told the same times by both."""
    ours = solver_of(kind, steps)
    assert list(ours.times) == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, :, None]
    found, wanted = x, x
    for index, time in enumerate(ours.times[:-1]):
        found = ours.step(found, torch.tensor(curved(found, time)), index, torch.Tensor)
        said = torch.tensor(curved(wanted, time))
        wanted = theirs.step(said, theirs.timesteps[index], wanted).prev_sample
        assert (found - wanted).abs().max() < 2e-5, index


def test_the_flow_of_normal_data_is_followed_by_order() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None, :, None]

    def error(kind: str, steps: int) -> float:
        solver = solver_of(kind, steps, shift=1.0)
        start = solver.times[0]
        spread = math.sqrt((1 - start) ** 2 * SPREAD**2 + start**2)
        wanted = MEAN + SPREAD / spread * (x - (1 - start) * MEAN)
        return (run(solver, x, velocity) - wanted).abs().max().item()

    first, second, third = ([error(kind, steps) for steps in (160, 320, 640)] for kind in ("euler", *KINDS[::-1]))
    assert all(1.9 < a / b < 2.1 for a, b in itertools.pairwise(first))
    assert all(3.2 < a / b < 5 for a, b in itertools.pairwise(second))  # 4 is reached slowly: steps near
    assert all(3.8 < a / b < 5 for a, b in itertools.pairwise(third))  # both ends are long in lambda
    assert third[2] < second[2] / 3 < first[2] / 90


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 9, 20])
def test_one_point_is_found_in_any_number_of_steps(kind: str, steps: int) -> None:
    found = run(solver_of(kind, steps), torch.randn(1, 5, 2, dtype=torch.float64), lambda x, t: velocity(x, t, 0.0))
    assert (found - MEAN).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_times_have_the_shift_of_training_unless_the_job_says_another(kind: str) -> None:
    u = torch.linspace(0.999, 0, 6, dtype=torch.float64)

    def times(flow_shift: float | None, **options: Any) -> list[float]:
        cfg = RectifiedFlowConfig(flow_shift=flow_shift)
        return list(build_solver(kind, cfg, SolverOptions(5, **options), GRID).times)

    def shifted(alpha: float) -> list[float]:
        return (alpha * u / (1 + (alpha - 1) * u)).tolist()

    by_size = (1 + 2 * (1024 - 256) / (4096 - 256)) * 2  # 1024 tokens a frame, four latent frames
    assert times(None) == pytest.approx(shifted(by_size))
    assert times(5.0) == pytest.approx(shifted(5.0)) and times(5.0, alpha=2.0) == pytest.approx(shifted(2.0))
    assert times(5.0, shift=False) == pytest.approx(u.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_taken_in_order_value_by_value_and_in_fp32_at_least(kind: str) -> None:
    solver = solver_of(kind, 4)
    assert not isinstance(solver, EditingSolver)
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    whole, parts = (
        run(solver_of(kind, 6), x, velocity),
        [run(solver_of(kind, 6), one, velocity) for one in x.split(1, 1)],
    )
    assert torch.equal(whole, torch.cat(parts, dim=1))  # every process steps its own tokens
    assert solver.step(x.bfloat16(), x.bfloat16(), 0, torch.Tensor).dtype == torch.float32
    with pytest.raises(AssertionError, match="follow one another"):
        solver.step(x, x, 2, torch.Tensor)
