"""IDDPM, and the solvers of its models: formulas written out one value at a time, distributions whose answer is known,
and the steps of diffusers where these mean the same."""

import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from opensora.schedulers import build_solver
from opensora.schedulers.base import EditingSolver, SolverOptions
from opensora.schedulers.dpm_solver import DPMSolver
from opensora.schedulers.iddpm import IDDPM, IDDPMConfig, speed_tables
from opensora.schedulers.noise_schedule import noise_schedule
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1Config
from opensora.utils.respacing import spaced_steps
from opensora.utils.tokens import Grid

GRID = Grid((2, 2, 2), (1, 1, 1))
CHAIN = 1000


def solver_of(kind: str, cfg: IDDPMConfig | None = None, **options: Any) -> Any:
    return build_solver(kind, cfg or IDDPMConfig(), SolverOptions(**{"num_steps": 0} | options), GRID)


def betas() -> list[float]:
    return [1e-4 + (0.02 - 1e-4) * step / (CHAIN - 1) for step in range(CHAIN)]


# The chain.
def test_respacing_chooses_by_sections_and_by_distance() -> None:
    assert spaced_steps("", 5) == (0, 1, 2, 3, 4)
    assert spaced_steps("4", 10) == (0, 3, 6, 9)
    assert spaced_steps("1", 10) == (0,)
    assert spaced_steps("2,3", 10) == (0, 4, 5, 7, 9)
    assert spaced_steps("1,1,1", 11) == (0, 4, 8)  # sections of 4, 4 and 3
    assert spaced_steps("ddim5", 1000) == (0, 200, 400, 600, 800)
    assert spaced_steps("ddim3", 10) == (0, 4, 8)
    for count in (2, 37, 250, 999, 1000):
        chosen = spaced_steps(str(count), 1000)
        assert len(set(chosen)) == count and chosen[0] == 0 and chosen[-1] == 999 and list(chosen) == sorted(chosen)


@pytest.mark.parametrize(
    "spec", ["x", "10,", "-3", "0", "3,0", "ddim", "ddim0", "ddim5,5", "1.5", "10;20", "٣", "9" * 9]
)
def test_respacing_that_cannot_be_read(spec: str) -> None:
    with pytest.raises(ValueError, match="timestep_respacing="):
        IDDPMConfig(timestep_respacing=spec)


@pytest.mark.parametrize("spec", ["1001", "400,600", "ddim999", "ddim1001"])
def test_respacing_that_asks_for_too_much(spec: str) -> None:
    with pytest.raises(ValueError, match=r"timestep_respacing=.*1000|timestep_respacing=.*section"):
        IDDPMConfig(timestep_respacing=spec)


def test_a_chain_of_some_steps_has_the_noise_of_the_whole_one_there() -> None:
    whole, product = [], 1.0
    for beta in betas():
        product *= 1 - beta
        whole.append(product)
    found = noise_schedule("linear", CHAIN, "7,11", "fp64")
    assert found.alphas_cumprod.tolist() == pytest.approx([whole[step] for step in found.timesteps.tolist()], rel=1e-12)
    before = [1.0, *found.alphas_cumprod.tolist()[:-1]]
    assert found.betas.tolist() == pytest.approx(
        [1 - now / last for now, last in zip(found.alphas_cumprod.tolist(), before, strict=True)], rel=1e-9
    )
    assert found.index(torch.tensor([0.0, 84.9, 999.0])).tolist() == [0, 1, 17]  # the last step used up to each


def test_betas_are_those_of_diffusers() -> None:
    for ours, theirs in (("linear", "linear"), ("squaredcos_cap_v2", "squaredcos_cap_v2")):
        wanted = DDPMScheduler(beta_schedule=theirs).betas.double()
        found = noise_schedule(ours, CHAIN, "", "fp64").betas  # type: ignore[arg-type]
        assert torch.allclose(found, wanted, rtol=1e-5)


def steps_by_hand(counts: list[int], steps: int) -> list[int] | None:
    """Sections one after the other, the first ones longer by one; None: one is too short."""
    found, ends = [], [steps * (i + 1) // len(counts) for i in range(len(counts))]
    lengths = sorted((end - start for start, end in zip([0, *ends], ends, strict=False)), reverse=True)
    for section, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        start, place = sum(lengths[:section]), 0.0
        if count > length:
            return None
        for _ in range(count):
            found.append(start + round(place))
            place += (length - 1) / (count - 1) if count > 1 else 0.0
    return found


def test_any_sections_are_chosen_as_by_hand_or_refused() -> None:
    rng, refused = random.Random(7), 0
    for _ in range(400):
        steps = rng.choice([21, 100, 999, 1000])
        counts = [rng.randint(1, rng.choice([3, 40, 400])) for _ in range(rng.randint(1, 6))]
        wanted, spec = steps_by_hand(counts, steps), ",".join(map(str, counts))
        if wanted is None:
            refused += 1
            with pytest.raises(ValueError, match="a section of"):
                spaced_steps(spec, steps)
            continue
        assert list(spaced_steps(spec, steps)) == wanted, (spec, steps)
        schedule = noise_schedule("linear", steps, spec, "fp64")
        assert len(schedule) == sum(counts) and (schedule.betas > 0).all() and (schedule.betas < 1).all()
    assert 20 < refused < 380


# The loss, one value at a time.
def loss_by_hand(cfg: IDDPMConfig, x0: float, noise: float, first: float, v: float, t: int) -> float:
    left = [1.0]
    for beta in betas():
        left.append(left[-1] * (1 - beta))
    before, now, beta = left[t], left[t + 1], betas()[t]
    x_t = math.sqrt(now) * x0 + math.sqrt(1 - now) * noise
    mse = (first - (x0 if cfg.predict_xstart else noise)) ** 2
    clean = first if cfg.predict_xstart else (x_t - math.sqrt(1 - now) * first) / math.sqrt(now)

    def mean(start: float) -> float:
        return (math.sqrt(before) * beta * start + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - now)

    place = max(t, 1)  # the first posterior variance is 0
    least = math.log(betas()[place] * (1 - left[place]) / (1 - left[place + 1]))
    log_variance = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * least
    if t == 0:

        def below(value: float) -> float:
            z = value * math.exp(-log_variance / 2)
            return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

        upper, lower = below(x0 - mean(clean) + 1 / 255), below(x0 - mean(clean) - 1 / 255)
        chance = upper if x0 < -0.999 else 1 - lower if x0 > 0.999 else upper - lower
        bits = -math.log(max(chance, 1e-12)) / math.log(2)
    else:
        ratio = math.exp(least - log_variance)
        apart = (mean(x0) - mean(clean)) ** 2 * math.exp(-log_variance)
        bits = (ratio + apart - 1 - least + log_variance) / 2 / math.log(2)
    if cfg.use_kl:
        return bits * CHAIN
    return mse + bits


@pytest.mark.parametrize("options", [{}, {"predict_xstart": True}, {"use_kl": True}])
@pytest.mark.parametrize("t", [0, 1, 400, 999])
def test_loss_by_hand(options: dict[str, Any], t: int) -> None:
    objective = IDDPM(IDDPMConfig(**options))
    generator = torch.Generator().manual_seed(t)
    x0, noise = (torch.randn(1, 3, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x0[0, 0, 0, 0] = torch.tensor([-1.5, 1.5])  # both outer bins
    output = torch.randn(1, 2, 2, 2, 6, generator=generator, dtype=torch.float64) * 0.5
    noised = objective.noised(x0, noise, torch.tensor([float(t)]))
    targets = {name: value.movedim(1, -1) for name, value in noised.targets.items()}
    found = objective.loss(output, targets, torch.tensor([float(t)]).view(1, 1, 1, 1))
    wanted = [
        loss_by_hand(objective.cfg, *values, t)
        for values in zip(
            *(x.movedim(1, -1).flatten().tolist() for x in (x0, noise)),
            *(part.flatten().tolist() for part in output.chunk(2, dim=-1)),
            strict=True,
        )
    ]
    assert found.flatten().tolist() == pytest.approx(wanted, rel=1e-9)


def test_the_bound_moves_the_variance_alone() -> None:
    objective, t = IDDPM(IDDPMConfig()), torch.tensor([300.0])
    x0, noise = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    targets = {name: value.movedim(1, -1) for name, value in objective.noised(x0, noise, t).targets.items()}
    output = torch.randn(1, 1, 2, 2, 4, requires_grad=True)
    terms = objective.terms(output, targets, t.view(1, 1, 1, 1))
    (of_bound,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (of_squares,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert not of_bound[..., :2].any() and of_bound[..., 2:].all()
    assert of_squares[..., :2].all() and not of_squares[..., 2:].any()


def test_a_fixed_variance_needs_one_output() -> None:
    objective = IDDPM(IDDPMConfig(learn_sigma=False))
    assert objective.outputs == 1 and IDDPM(IDDPMConfig()).outputs == 2
    prediction, noise = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    targets = {"x_start": noise, "noise": noise, "x_t": noise}
    assert objective.loss(prediction, targets, torch.tensor([[7.0]])).item() == pytest.approx(2.25)
    for small, index, wanted in ((False, 500, betas()[500]), (True, 0, None), (False, 0, None)):
        cfg = IDDPMConfig(learn_sigma=False, sigma_small=small)
        solver = solver_of("ddpm", cfg, num_steps=CHAIN)
        found = solver.predicted(noise, prediction, CHAIN - 1 - index).log_variance.exp().item()
        posterior = solver.schedule.posterior_variance[1].item()
        assert found == pytest.approx(posterior if wanted is None else wanted, rel=1e-5)


def test_known_latents_have_the_noise_of_the_first_step() -> None:
    objective, t = IDDPM(IDDPMConfig()), torch.tensor([700.0, 20.0])
    x0, noise = torch.randn(2, 3, 2, 2, 2).double(), torch.randn(2, 3, 2, 2, 2).double()
    known = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    known[0, 1] = True
    found, free = objective.noised(x0, noise, t, known).x, objective.noised(x0, noise, t).x
    first = math.sqrt(1 - 1e-4) * x0 + math.sqrt(1e-4) * noise
    assert torch.allclose(found[0, :, 1], first[0, :, 1], atol=1e-12)
    assert torch.equal(found[0, :, 0], free[0, :, 0]) and torch.equal(found[1], free[1])


# Times.
def test_times_belong_to_samples_and_are_steps_that_are_trained() -> None:
    objective = IDDPM(IDDPMConfig(timestep_respacing="ddim50"))
    ids = tuple(range(400))
    drawn = objective.times(3, 1, ids, GRID)
    assert torch.equal(objective.times(3, 1, ids[7:9], GRID), drawn[7:9])
    assert set(drawn.tolist()) <= set(map(float, range(0, 1000, 20))) and len(set(drawn.tolist())) > 40
    assert abs(drawn.mean().item() - 490) < 60


def test_speed_draws_by_its_table_and_its_mirror() -> None:
    cfg = IDDPMConfig(speed=True)
    tables = speed_tables(cfg)
    drawn = IDDPM(cfg).times(0, 0, tuple(range(6000)), GRID).long()
    chances = torch.from_numpy(tables.probabilities).double()
    mirrored = torch.zeros_like(chances).index_add(0, torch.from_numpy(tables.mirror), chances)
    wanted = (chances + mirrored) / 2
    found = torch.bincount(drawn, minlength=CHAIN) / len(drawn)
    parts = [slice(start, start + 100) for start in range(0, CHAIN, 100)]
    assert [found[part].sum().item() for part in parts] == pytest.approx(
        [wanted[part].sum().item() for part in parts], abs=4 * math.sqrt(0.1 / len(drawn)) + 0.002
    )
    assert tables.weights == pytest.approx((1 - IDDPMConfig().schedule().alphas_cumprod).numpy())


# Data that are normal: the best model, and what it makes, are known.
MEAN, SPREAD = 0.7, 0.4


@cache
def abar_of(time: float) -> float:
    """At a time that the model reads, between two steps as DPM-Solver has it."""
    logs = torch.tensor([math.log(1 - beta) for beta in betas()], dtype=torch.float64).cumsum(0).tolist()
    low = min(int(time), CHAIN - 2)
    return math.exp(logs[low] + (time - low) * (logs[low + 1] - logs[low]))


def best_noise(x: Tensor, time: float, spread: float = SPREAD) -> Tensor:
    """E[noise | x_t] for data N(MEAN, spread^2)."""
    abar = abar_of(time)
    return math.sqrt(1 - abar) * (x - math.sqrt(abar) * MEAN) / (abar * spread**2 + 1 - abar)


def run(solver: Any, x: Tensor, predict: Callable[[Tensor, float], Tensor]) -> Tensor:
    for index, time in enumerate(list(solver.times)[:-1]):
        x = solver.step(x, predict(x, time), index, lambda x=x: torch.zeros_like(x))
    return x


def flow_end(x: Tensor) -> Tensor:
    """Where the probability flow takes x_T: normal to normal."""
    abar = abar_of(CHAIN - 1)
    return MEAN + SPREAD * (x - math.sqrt(abar) * MEAN) / math.sqrt(abar * SPREAD**2 + 1 - abar)


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm_solver"])
@pytest.mark.parametrize("steps", [1, 2, 9, 20])
def test_one_point_is_found_in_any_number_of_steps(kind: str, steps: int) -> None:
    solver = solver_of(kind, IDDPMConfig(learn_sigma=False), num_steps=steps)
    found = run(solver, torch.randn(1, 5, 2, dtype=torch.float64), lambda x, t: best_noise(x, t, 0.0))
    last = math.sqrt(abar_of(0)) if kind == "dpm_solver" else 1.0  # which ends at the first step, with its noise
    noise = math.sqrt(1e-4) if kind == "dpm_solver" else 0.0
    assert (found - last * MEAN).abs().max() <= 5 * noise + 1e-9


def test_ddim_and_dpm_solver_follow_the_flow_by_their_orders() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 9, 1)

    def error(kind: str, steps: int) -> float:
        found = run(solver_of(kind, num_steps=steps), x, lambda x, t: torch.cat((best_noise(x, t), x), dim=-1))
        last = abar_of(0) if kind == "dpm_solver" else 1.0  # DPM-Solver ends at the first step
        scale = math.sqrt(last * SPREAD**2 + 1 - last) / SPREAD
        return (found - math.sqrt(last) * MEAN - scale * (flow_end(x) - MEAN)).abs().max().item()

    first = [error("ddim", steps) for steps in (50, 100, 200)]
    second = [error("dpm_solver", steps) for steps in (40, 80, 160)]
    assert 1.7 < first[0] / first[1] < 2.4 and 1.7 < first[1] / first[2] < 2.4
    assert 3.2 < second[0] / second[1] < 5 and 3.2 < second[1] / second[2] < 5
    assert second[2] < first[2] / 2


@pytest.mark.parametrize("respacing", ["50", "ddim20", "10,20"])
def test_ddpm_keeps_the_distribution_in_every_step(respacing: str) -> None:
    """With the variance that the step before really has, by the law of an affine map of a normal variable."""
    solver = solver_of("ddpm", timestep_respacing=respacing)
    chain = solver.schedule
    mean = math.sqrt(chain.alphas_cumprod[-1].item()) * MEAN
    variance = chain.alphas_cumprod[-1].item() * (SPREAD**2 - 1) + 1
    for index, time in enumerate(solver.times[:-1]):
        level = len(chain) - 1 - index
        now, before, beta = (
            getattr(chain, name)[level].item() for name in ("alphas_cumprod", "alphas_cumprod_prev", "betas")
        )
        unsure = SPREAD**2 * (1 - now) / (now * SPREAD**2 + 1 - now)  # variance of x0, given x_t
        true = beta * (1 - before) / (1 - now) + before * beta**2 / (1 - now) ** 2 * unsure
        least = chain.posterior_log_variance_clipped[level].item()
        v = 2 * (math.log(true) - least) / (math.log(beta) - least) - 1 if level else 0.0

        def step(x: float, noise: float, time: float = time, index: int = index, v: float = v) -> float:
            at = torch.tensor([[x]], dtype=torch.float64)
            said = torch.cat((best_noise(at, time), torch.full_like(at, v)), dim=-1)
            return solver.step(at, said, index, lambda: torch.full_like(at, noise)).item()

        offset = step(0, 0)
        slope, sigma = step(1, 0) - offset, step(0, 1) - offset
        mean, variance = slope * mean + offset, slope**2 * variance + sigma**2
        assert mean == pytest.approx(math.sqrt(before) * MEAN, abs=1e-9)
        last = 0 if level else unsure  # the last step draws nothing
        assert variance == pytest.approx(before * SPREAD**2 + 1 - before - last, abs=1e-9)
    assert mean == pytest.approx(MEAN, abs=1e-9)


# The steps of diffusers, where they mean the same: a whole chain, and steps that are equally far apart.
def test_a_step_of_ddpm_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)
    theirs.set_timesteps(CHAIN)
    ours = solver_of("ddpm", num_steps=CHAIN)
    x, output = torch.randn(2, 3, 2, 2), torch.randn(2, 6, 2, 2)
    for time in (999, 500, 1, 0):
        generator = torch.Generator().manual_seed(time)
        wanted = theirs.step(output, time, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(time))
        found = ours.step(x.movedim(1, -1), output.movedim(1, -1), CHAIN - 1 - time, lambda n=noise: n.movedim(1, -1))
        assert ((found.movedim(-1, 1) - wanted).abs().max() / wanted.abs().max()).item() < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_step_of_ddim_is_that_of_diffusers(eta: float) -> None:
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs.set_timesteps(50)
    ours = solver_of("ddim", timestep_respacing="ddim50", eta=eta)
    assert list(ours.times[:-1]) == theirs.timesteps.tolist()
    x, output = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    for index, time in enumerate(theirs.timesteps.tolist()[:-1]):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        wanted = theirs.step(output, time, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        found = ours.step(x.movedim(1, -1), output.movedim(1, -1), index, lambda n=noise: n.movedim(1, -1))
        assert ((found.movedim(-1, 1) - wanted).abs().max() / wanted.abs().max()).item() < 1e-4


# Frames that are given.
def test_given_frames_of_a_chain() -> None:
    solver = solver_of("ddpm", num_steps=10)
    assert isinstance(solver, EditingSolver)
    ratios = torch.tensor([[0.0, 0.3, 0.35, 1.0]])
    for index in range(10):
        level, edits = 9 - index, solver.edits(ratios, index)
        firsts = [0, 3, 3, 10]
        assert edits.renoised.tolist() == [[first == level for first in firsts]]
        assert edits.noisy.tolist() == [[first > level for first in firsts]]
        assert edits.kept.tolist() == [[first < level for first in firsts]]


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_a_given_frame_is_kept_then_noised_once_then_made(kind: str) -> None:
    """Whatever its ratio, and however many steps there are; and the model is told so."""
    rng = random.Random(3)
    for _ in range(60):
        steps = rng.randint(1, 40)
        ratios = torch.tensor([[0.0, 1.0, *(rng.random() for _ in range(6))]])
        cfg: Any = RectifiedFlowV1Config() if kind == "euler" else IDDPMConfig()
        solver: Any = build_solver(kind, cfg, SolverOptions(steps), GRID)
        edits = [solver.edits(ratios, index) for index in range(steps)]
        for frame in range(8):
            seen = [[bool(part[0, frame]) for part in edit] for edit in edits]
            renoised, noisy, kept = zip(*seen, strict=True)
            assert sum(renoised) <= 1 and list(noisy) == sorted(noisy) and list(kept) == sorted(kept, reverse=True)
            assert not any(a and b for a, b in zip(noisy, kept, strict=True))  # never both
            assert not any(a and b for a, b in zip(renoised, kept, strict=True))
            if frame == 1:
                assert all(noisy) and not any(renoised)
            if frame == 0 and kind == "euler":
                assert all(kept)


def test_dpm_solver_keeps_no_frames_and_takes_steps_in_order() -> None:
    solver = solver_of("dpm_solver", num_steps=4)
    assert isinstance(solver, DPMSolver) and not isinstance(solver, EditingSolver)
    x = torch.randn(1, 2, 2)
    solver.step(x, x, 0, torch.Tensor)
    with pytest.raises(AssertionError, match="follow one another"):
        solver.step(x, x, 2, torch.Tensor)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"diffusion_steps": 20}, "diffusion_steps=20"),
        ({"noise_schedule": "cosine"}, "noise_schedule=cosine"),
        ({"tables": "fp16"}, "tables=fp16"),
        ({"use_kl": True, "learn_sigma": False}, "use_kl=true"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "rescale_learned_sigmas=true"),
        ({"use_kl": True, "speed": True}, "speed=true"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IDDPMConfig(**values)
