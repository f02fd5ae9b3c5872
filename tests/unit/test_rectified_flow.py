import math

import pytest
import torch

from opensora.schedulers.rectified_flow import (
    RectifiedFlowConfig,
    corrupt,
    drop_text,
    sample_noise,
    sample_timesteps,
    squared_error,
    target,
)
from opensora.schedulers.timesteps import logit_normal

CFG = RectifiedFlowConfig()


def test_corrupt_and_target_by_hand() -> None:
    cfg = RectifiedFlowConfig(sigma_min=0.1)
    x0, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[10.0], [10.0]])
    x_t = corrupt(x0, noise, torch.tensor([0.25, 1.0]), cfg)
    # .75 * 2 + (1 - .9 * .75) * 10 = 1.5 + 3.25; at t=1 only noise
    assert torch.allclose(x_t, torch.tensor([[4.75], [10.0]]))
    assert torch.allclose(target(x0, noise, cfg), torch.tensor([[7.0], [7.0]]))  # .9 * 10 - 2


def test_target_is_the_derivative_of_the_path() -> None:
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    slope = (corrupt(x0, noise, t + 1e-3, CFG) - corrupt(x0, noise, t - 1e-3, CFG)) / 2e-3
    assert torch.allclose(slope, target(x0, noise, CFG), atol=1e-10)


def test_bf16_latents_are_mixed_in_fp32() -> None:
    x0 = torch.randn(2, 4).bfloat16()
    assert corrupt(x0, torch.randn(2, 4), torch.rand(2), CFG).dtype == torch.float32
    assert target(x0, torch.randn(2, 4), CFG).dtype == torch.float32
    assert squared_error(x0, x0).dtype == torch.float32
    assert squared_error(x0, x0.double()).dtype == torch.float64


def test_squared_error_is_a_sum() -> None:
    assert squared_error(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)).item() == 30


def test_times_are_shifted_by_tokens_and_frames() -> None:
    ids = tuple(range(50))
    u = logit_normal(7, 3, ids)
    same = sample_timesteps(7, 3, ids, (1, 32, 32), 2, CFG)  # 256 tokens, one frame: alpha 1
    assert torch.allclose(same, u)
    longer = sample_timesteps(7, 3, ids, (4, 128, 128), 2, CFG)  # 4096 tokens: 3, four frames: times 2
    assert torch.allclose(longer, 6 * u / (1 + 5 * u))
    fixed = sample_timesteps(7, 3, ids, (4, 128, 128), 2, RectifiedFlowConfig(flow_shift=1.0))
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
    times = sample_timesteps(1, 2, (5, 9), (1, 8, 8), 2, CFG)
    assert torch.equal(times[1:], sample_timesteps(1, 2, (9,), (1, 8, 8), 2, CFG))


def test_text_dropout_is_independent_for_tokens_and_pooled() -> None:
    ids = tuple(range(5000))
    txt, vec = drop_text(0, 0, ids, CFG.text_dropout)
    assert abs(txt.float().mean().item() - 0.316) < 0.02
    assert abs(vec.float().mean().item() - 0.316) < 0.02
    assert abs((txt & vec).float().mean().item() - 0.1) < 0.015
    assert torch.equal(drop_text(0, 0, ids[9:10], CFG.text_dropout)[0], txt[9:10])
    assert not drop_text(0, 0, ids, 0.0)[0].any() and drop_text(0, 0, ids, 1.0)[1].all()


@pytest.mark.parametrize("bad", [{"sigma_min": 1.0}, {"flow_shift": 0.0}, {"text_dropout": 1.5}])
def test_bad_values_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        RectifiedFlowConfig(**bad)  # type: ignore[arg-type]
