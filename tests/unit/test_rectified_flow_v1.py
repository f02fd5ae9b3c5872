"""Rectified flow of Open-Sora 1.2 and 1.3: its formulas by hand, times, given frames, and steps whose end is known."""

import math
from typing import Any

import pytest
import torch

from opensora.schedulers import build_objective, build_solver
from opensora.schedulers.base import EditingSolver, SolverOptions
from opensora.schedulers.rectified_flow_v1 import RectifiedFlowV1, RectifiedFlowV1Config, sampling_times
from opensora.utils.rng import torch_generator
from opensora.utils.tokens import Grid

IDS = tuple(range(3000))


def grid(frames: int = 51, height: int = 256, width: int = 512) -> Grid:
    return Grid((5, 4, 4), (1, 2, 2), (frames, height, width))


def flow(**options: Any) -> RectifiedFlowV1:
    return RectifiedFlowV1(RectifiedFlowV1Config(**options))


def test_path_and_target_by_hand() -> None:
    x0, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[10.0], [10.0]])
    x, targets = flow().noised(x0, noise, torch.tensor([250.0, 1000.0]))
    assert torch.allclose(x, torch.tensor([[4.0], [10.0]]))  # .75 * 2 + .25 * 10
    assert torch.equal(targets["velocity"], torch.tensor([[-8.0], [-8.0]]))
    with_variance = torch.tensor([[1.0, 99.0]])
    assert flow().loss(with_variance, {"velocity": torch.tensor([[-8.0]])}, torch.tensor([[5.0]])).tolist() == [[81.0]]


def test_known_latents_are_clean() -> None:
    x0, noise = torch.randn(1, 3, 4, 2, 2), torch.randn(1, 3, 4, 2, 2)
    known = torch.tensor([True, False, False, True])[None, :, None, None].expand(1, 4, 2, 2)
    found = flow().noised(x0, noise, torch.tensor([900.0]), known).x
    assert torch.equal(found[:, :, [0, 3]], x0[:, :, [0, 3]])
    assert torch.allclose(found[:, :, [1, 2]], (0.1 * x0 + 0.9 * noise)[:, :, [1, 2]])


def test_times_are_uniform_logit_normal_or_whole() -> None:
    uniform = flow().times(1, 2, IDS, grid())
    again = torch.stack([torch.rand((), generator=torch_generator(1, 2, i, "timestep")) for i in (4, 9)])
    assert torch.equal(uniform[[4, 9]], again * 1000)
    quarters = torch.bincount((uniform / 250).long()) / len(IDS)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    normal = (flow(sample_method="logit-normal", loc=0.5, scale=2.0).times(1, 2, IDS, grid()) / 1000).logit()
    assert normal.mean().item() == pytest.approx(0.5, abs=0.12) and normal.std().item() == pytest.approx(2.0, abs=0.1)
    whole = flow(use_discrete_timesteps=True, sample_method="logit-normal").times(1, 2, IDS, grid())
    assert torch.equal(whole, uniform.floor())


@pytest.mark.parametrize(
    ("version", "options", "pixels", "sampling", "ratio"),
    [
        ("1.2", {}, (51, 256, 512), False, math.sqrt(0.5) * math.sqrt(15)),
        ("1.2", {}, (50, 256, 512), False, math.sqrt(0.5) * math.sqrt(10)),  # 50 // 17 = 2 groups
        ("1.2", {"transform_scale": 3.0}, (1, 1024, 1024), False, 6.0),
        ("1.2", {"transform_scale": 3.0}, (1, 1024, 1024), True, 2.0),  # not in sampling
        ("1.3", {"transform_scale": 3.0}, (49, 512, 512), False, math.sqrt(12)),  # not in training
        ("1.3", {"transform_scale": 3.0}, (49, 512, 512), True, 3 * math.sqrt(12)),
        ("1.3", {"transform_scale": 3.0}, (1, 512, 512), True, 1.0),  # not of images
        ("1.3", {"transform_scale": 3.0, "scale_temporal": False}, (49, 1024, 512), True, math.sqrt(2)),
    ],
    ids=("groups", "whole groups", "scaled", "not in sampling", "not in training", "videos", "images", "no time"),
)
def test_transform_by_hand(
    version: Any, options: dict[str, Any], pixels: tuple[int, int, int], sampling: bool, ratio: float
) -> None:
    objective = flow(version=version, use_timestep_transform=True, **options)
    if sampling:
        times = sampling_times(objective.cfg, 4, grid(*pixels))
        u = [1.0, 0.75, 0.5, 0.25, 0.0]
        assert times == pytest.approx([1000 * ratio * t / (1 + (ratio - 1) * t) for t in u]) and times[0] == 1000
    else:
        u = torch.tensor([0.2, 0.9])
        assert torch.allclose(objective.at(u, grid(*pixels)), 1000 * ratio * u / (1 + (ratio - 1) * u))


def test_the_job_says_another_shift_or_none() -> None:
    cfg = RectifiedFlowV1Config(use_timestep_transform=True)
    assert sampling_times(cfg, 2, grid(), shift=False) == [1000.0, 500.0, 0.0]
    assert sampling_times(cfg, 2, grid(), alpha=3.0) == pytest.approx([1000.0, 750.0, 0.0])
    assert sampling_times(RectifiedFlowV1Config(), 2, grid()) == [1000.0, 500.0, 0.0]
    assert sampling_times(RectifiedFlowV1Config(use_discrete_timesteps=True), 3, grid()) == [1000.0, 667.0, 333.0, 0.0]


def test_videos_above_the_threshold_are_drawn_anew() -> None:
    options: dict[str, Any] = {"version": "1.3", "use_timestep_transform": True}
    plain, anew = (flow(**options, **more).times(1, 2, IDS, grid()) for more in ({}, {"uniform_over_threshold": 0.6}))
    above = plain > 600
    assert torch.equal(plain[~above], anew[~above]) and (anew[above] >= 600).all() and (anew < 1000).all()
    assert anew[above].mean().item() == pytest.approx(800, abs=10) and plain[above].mean() > 815
    still = Grid((1, 4, 4), (1, 2, 2), (1, 256, 512))
    assert torch.equal(
        flow(**options, uniform_over_threshold=0.6).times(1, 2, IDS, still), flow(**options).times(1, 2, IDS, still)
    )


def test_clips_without_times_are_refused() -> None:
    for frames in (2, 16):
        with pytest.raises(ValueError, match=rf"{frames} frames are {frames}//17\*5 = 0 latent ones"):
            RectifiedFlowV1Config(use_timestep_transform=True).check_frames(frames)
        RectifiedFlowV1Config().check_frames(frames)
        RectifiedFlowV1Config(version="1.3", use_timestep_transform=True).check_frames(5)
    for frames in (1, 17, 51):
        RectifiedFlowV1Config(use_timestep_transform=True).check_frames(frames)
    with pytest.raises(ValueError, match="2 frames are"):
        RectifiedFlowV1Config(version="1.3", use_timestep_transform=True).check_frames(2)


def test_one_point_is_found_in_any_number_of_steps() -> None:
    point = torch.randn(1, 3, 2)
    for steps in (1, 2, 7):
        solver = build_solver("euler", RectifiedFlowV1Config(), SolverOptions(steps), grid())
        x = torch.randn(1, 3, 2)
        for index, time in enumerate(list(solver.times)[:-1]):
            velocity = (point - x) / (time / 1000)  # x0 - noise, of this x
            x = solver.step(x, torch.cat((velocity, x), dim=-1), index, torch.Tensor)
        assert torch.allclose(x, point, atol=1e-5)


def test_given_frames_of_a_flow() -> None:
    solver = build_solver("euler", RectifiedFlowV1Config(), SolverOptions(10), grid())
    assert isinstance(solver, EditingSolver)
    ratios = torch.tensor([[0.0, 0.3, 0.35, 1.0]])
    reached = {0: [False, False, False, True], 7: [False, True, True, True], 9: [False, True, True, True]}
    for index, wanted in reached.items():  # times 1000, 300 and 100
        edits = solver.edits(ratios, index)
        assert edits.noisy.tolist() == [wanted] and edits.kept.tolist() == [[not one for one in wanted]]
        fresh = [False, index == 7, index == 7, False]
        assert edits.renoised.tolist() == [fresh]
    x0, noise = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    assert torch.allclose(solver.noised(x0, noise, 7), 0.7 * x0 + 0.3 * noise)


def test_it_is_an_objective_by_its_kind() -> None:
    objective = build_objective(RectifiedFlowV1Config())
    assert isinstance(objective, RectifiedFlowV1) and objective.solvers == ("euler",) and objective.outputs == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"version": "1.1"}, "version=1.1: must be 1.2 or 1.3"),
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"sample_method": "normal"}, "sample_method=normal"),
        ({"loc": -51.0}, "loc=-51.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"transform_scale": -1.0}, "transform_scale=-1.0"),
        ({"scale_temporal": False}, "scale_temporal=false: is for version=1.3"),
        ({"version": "1.3", "uniform_over_threshold": 1.0}, "uniform_over_threshold=1.0"),
        ({"uniform_over_threshold": 0.5}, "uniform_over_threshold=0.5: is for version=1.3"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RectifiedFlowV1Config(**values)
