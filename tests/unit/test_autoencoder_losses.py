"""What autoencoders are trained by: every golden number, and the formulas written out one value at a time."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training import (
    LPIPS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    image_probability,
    kl_loss,
    reconstruction_loss,
    weight_from,
)
from tests.golden_autoencoder_losses import loss_results, recipe_results
from tests.golden_autoencoders import LIMIT, relative

EXACT = 1e-10
SMALL = ((2, 1), (3, 1), (4, 1), (5, 1), (6, 1))  # stages of a tiny VGG


def test_every_golden_loss_and_gradient(golden: Path) -> None:
    truths = load_file(golden / "vae_losses.safetensors")
    found = dict(loss_results(golden))
    assert set(found) == {name for name in truths if name.startswith(("out.", "g."))}
    for name, truth in truths.items():
        if name in found:
            assert relative(found[name], truth) <= LIMIT, name


def test_every_golden_number_of_the_recipe(golden: Path) -> None:
    for name, found, truth in recipe_results(golden):
        assert found == (pytest.approx(truth, rel=1e-12) if isinstance(truth, float) else truth), name


def clips(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lpips_by_hand(network: LPIPS, x: Tensor, y: Tensor) -> list[float]:
    """One number per frame, from functional operations."""
    weights = dict(network.named_parameters())
    convolutions = sorted({int(name.split(".")[1]) for name in weights if name.startswith("features.")})
    pooled = {before for before, after in itertools.pairwise(convolutions) if after - before == 3}

    def features(frame: Tensor) -> list[Tensor]:
        shift = torch.tensor((-0.030, -0.088, -0.188), dtype=torch.float64)[:, None, None]
        scale = torch.tensor((0.458, 0.448, 0.450), dtype=torch.float64)[:, None, None]
        h, taps = ((frame - shift) / scale)[None], []
        for number in convolutions:
            h = F.conv2d(h, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1)
            h = h.clamp(min=0)
            if number in pooled or number == convolutions[-1]:
                taps.append(h[0])
                h = F.max_pool2d(h, 2)
        return taps

    found = []
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            distance = 0.0
            for k, (one, other) in enumerate(zip(features(x[b, :, t]), features(y[b, :, t]), strict=True)):
                ratios = [f / (f.pow(2).sum(0).sqrt() + 1e-10) for f in (one, other)]
                places = torch.einsum(
                    "c,chw->hw", weights[f"lin{k}.model.1.weight"][0, :, 0, 0], (ratios[0] - ratios[1]) ** 2
                )
                distance += float(places.mean())
            found.append(distance)
    return found


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> LPIPS:
    monkeypatch.setattr("opensora.models.vae.training.lpips.STAGES", SMALL)
    torch.manual_seed(0)
    return LPIPS().double()


def test_lpips_by_hand(lpips: LPIPS) -> None:
    x, y = clips(1, 2, 3, 2, 33, 50), clips(2, 2, 3, 2, 33, 50)
    lpips.mean.copy_(torch.tensor((-0.030, -0.088, -0.188), dtype=torch.float64).view(-1, 1, 1))
    lpips.std.copy_(torch.tensor((0.458, 0.448, 0.450), dtype=torch.float64).view(-1, 1, 1))
    assert lpips(x, y).tolist() == pytest.approx(lpips_by_hand(lpips, x, y), rel=EXACT)
    assert not lpips(x, x).any() and not any(parameter.requires_grad for parameter in lpips.parameters())


def test_lpips_has_the_names_of_the_published_files() -> None:
    """torchvision's VGG16 has its convolutions at these places; vgg.pth of taming-transformers has five layers."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in LPIPS().named_parameters()}
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert {int(name.split(".")[1]) for name in shapes if name.startswith("features.")} == set(places)
    assert shapes["features.28.weight"] == (512, 512, 3, 3) and shapes["features.5.weight"] == (128, 64, 3, 3)
    widths = (64, 128, 256, 512, 512)
    assert [shapes[f"lin{k}.model.1.weight"] for k in range(5)] == [(1, width, 1, 1) for width in widths]
    assert len(shapes) == 2 * len(places) + 5


@pytest.mark.parametrize("log_variance", [0.0, -0.7, 1.3])
def test_reconstruction_by_hand(log_variance: float) -> None:
    """As published: the perceptual distance is added to every value of its frame, then all is summed over frames."""
    x, y = clips(3, 2, 3, 4, 5, 6), clips(4, 2, 3, 4, 5, 6)
    distances = clips(5, 8).abs()
    total = recon = 0.0
    for b in range(2):
        for t in range(4):
            for one, other in zip(x[b, :, t].flatten().tolist(), y[b, :, t].flatten().tolist(), strict=True):
                recon += abs(one - other) / 8
                error = abs(one - other) + 0.5 * float(distances[b * 4 + t])
                total += (error / math.exp(log_variance) + log_variance) / 8
    found = reconstruction_loss(x, y, distances, perceptual_weight=0.5, log_variance=log_variance)
    assert float(found.nll) == pytest.approx(total, rel=EXACT) and float(found.recon) == pytest.approx(recon, rel=EXACT)
    assert float(found.perceptual) == pytest.approx(float(distances.mean()) * 90, rel=EXACT)


def test_gradients_are_those_of_differences(lpips: LPIPS) -> None:
    x, y = clips(6, 1, 3, 2, 16, 16), clips(7, 1, 3, 2, 16, 16).requires_grad_()

    def loss(made: Tensor) -> Tensor:
        return reconstruction_loss(x, made, lpips(x, made), perceptual_weight=0.5, log_variance=0.2).nll

    (gradient,) = torch.autograd.grad(loss(y), y)
    direction, step = clips(8, 1, 3, 2, 16, 16), 1e-7
    with torch.no_grad():
        slope = (loss(y + step * direction) - loss(y - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_kl_is_a_mean_over_what_has_a_posterior() -> None:
    mean, logvar = clips(9, 2, 3, 2, 2, 2), clips(10, 2, 3, 2, 2, 2)
    terms = [
        0.5 * (m * m + math.exp(v) - 1 - v)
        for m, v in zip(mean.flatten().tolist(), logvar.flatten().tolist(), strict=True)
    ]
    for per_frame, count in ((False, 2), (True, 4)):
        found = kl_loss(Posterior(mean=mean, logvar=logvar, per_frame=per_frame), 5e-4)
        assert float(found) == pytest.approx(5e-4 * sum(terms) / count, rel=EXACT)
    assert float(kl_loss(None, 1.0)) == 0


def test_discriminator_losses_by_hand() -> None:
    real, fake = clips(11, 2, 1, 2, 3, 3) * 2, clips(12, 2, 1, 2, 3, 3) * 2
    pairs = list(zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True))
    count = len(pairs)
    wanted = {
        "hinge": sum(max(0.0, 1 - r) + max(0.0, 1 + f) for r, f in pairs) / 2 / count,
        "vanilla": sum(math.log(1 + math.exp(-r)) + math.log(1 + math.exp(f)) for r, f in pairs) / 2 / count,
        "wgan-gp": sum(f - r for r, f in pairs) / 2 / count,
    }
    for kind, value in wanted.items():
        kind_of: Any = kind
        assert float(discriminator_loss(kind_of, real, fake)) == pytest.approx(value, rel=EXACT)
    unknown: Any = "hing"
    with pytest.raises(ValueError, match="kind=hing: must be one of hinge, vanilla, wgan-gp"):
        discriminator_loss(unknown, real, fake)
    assert float(generator_loss(fake)) == pytest.approx(-sum(f for _, f in pairs) / count, rel=EXACT)


def test_adaptive_weight_balances_gradients_and_is_bounded() -> None:
    last = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    nll, g = (last**2).sum(), last.sum() * 0.5  # |gradients| 10 and 0.5 sqrt 2
    found = adaptive_weight(nll, g, last, 0.05)
    assert float(found) == pytest.approx(0.05 * 10 / (0.5 * math.sqrt(2) + 1e-4), rel=EXACT)
    assert not found.requires_grad
    assert float(adaptive_weight(nll * 1e9, g, last, 0.05)) == pytest.approx(0.05 * 1e4)
    assert [weight_from(0.5, step, 3) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(("devices", "ratio"), [(2, 0.3), (5, 0.4), (16, 0.25)])
def test_share_of_images(devices: int, ratio: float) -> None:
    """Devices but the first draw with the probability: the share of all is the ratio."""
    assert (devices - 1) * image_probability(ratio, devices) / devices == pytest.approx(ratio, rel=EXACT)


def test_discriminator_starts_as_published() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=16)
    named = critic.state_dict()
    assert named["main.6.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert named["main.11.weight"].mean() == pytest.approx(1, abs=0.02) and not named["main.0.bias"].any()
    assert [layer.p for layer in critic.main if isinstance(layer, torch.nn.Dropout)] == [0.3] * 5
    with pytest.raises(ValueError, match="layers=0: must be an integer >= 1"):
        PatchDiscriminator(layers=0)
