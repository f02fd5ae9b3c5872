"""Training losses of autoencoders against golden tensors: every number of vae_losses and vae_training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from acceleration.config import OptimConfig
from acceleration.optim.ema import EMA
from acceleration.optim.optimizers import lr_at
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

Results = Iterator[tuple[str, Tensor]]


def drawn_lpips(seed: int) -> LPIPS:
    """LPIPS with the weights that README_v2.md describes."""
    lpips = LPIPS()
    convolutions = [layer for layer in lpips.features if isinstance(layer, nn.Conv2d)]
    heads = [layer for name, layer in lpips.named_modules() if name.endswith(".model.1") and name.startswith("lin")]

    def draw(kind: Any, seed: int, like: Tensor) -> Tensor:
        drawn: Tensor = kind(like.shape, generator=torch.Generator().manual_seed(seed))
        return drawn

    for i, layer in enumerate(convolutions):
        assert layer.bias is not None
        inputs = layer.weight.shape[1]
        layer.weight.data = draw(torch.randn, seed + i, layer.weight) * (2 / (9 * inputs)) ** 0.5
        layer.bias.data = draw(torch.randn, seed + 100 + i, layer.bias) * 0.1
    for k, head in enumerate(heads):
        assert isinstance(head, nn.Conv2d)
        head.weight.data = draw(torch.rand, seed + 200 + k, head.weight)
    assert len(convolutions) == 13 and len(heads) == 5
    return lpips


def loss_results(golden: Path) -> Results:
    """(name of a golden tensor, ours), for all of vae_losses.safetensors."""
    path = golden / "vae_losses.safetensors"
    with safe_open(path, "pt") as file:
        cfg = json.loads(file.metadata()["config"])
    t = {name: value.float() for name, value in load_file(path).items()}
    pixels, last = t["in.video.pixels8"] / 127, t["in.last_layer"].clone().requires_grad_()
    lpips, stated = drawn_lpips(cfg["lpips_seed"]), cfg["disc"]
    critic = PatchDiscriminator(stated["input_nc"], stated["ndf"], stated["n_layers"], stated["dropout"])
    weights = {key[7:]: value for key, value in t.items() if key.startswith("w.disc.")}
    missing, unknown = critic.load_state_dict(weights, strict=False)
    assert not unknown and all("running_" in key or "num_batches" in key for key in missing)
    made = torch.conv3d(t["in.features"], last)
    distances = lpips(pixels, made)
    yield "out.lpips_per_frame", distances

    def reconstruction(log_variance: float = 0.0) -> Any:
        weight = cfg["perceptual_loss_weight"]
        return reconstruction_loss(pixels, made, distances, perceptual_weight=weight, log_variance=log_variance)

    whole = Posterior.of(t["in.moments"])
    frames = Posterior.of(t["in.moments"], per_frame=True)
    yield "out.kl_hunyuan", whole.kl()
    yield "out.kl_2d", frames.kl()
    found = reconstruction()
    for name, posterior in (("hunyuan", whole), ("flat2d", frames), ("no_posterior", None)):
        yield f"out.{name}.kl_loss", kl_loss(posterior, cfg["kl_loss_weight"])
        for part in ("nll", "recon", "perceptual"):
            yield f"out.{name}.{part}_loss", getattr(found, part)
    yield "out.logvar_0.3.nll_loss", reconstruction(0.3).nll

    fake = critic(made)
    yield "out.fake_logits", fake
    g = generator_loss(fake)
    weight = adaptive_weight(found.nll, g, last, cfg["disc_weight"])
    yield "out.generator.adaptive_weight", weight
    for name, step in (("on", 10), ("before_start", 9)):
        yield f"out.generator.{name}.g_loss", g
        yield f"out.generator.{name}.weighted", weight * weight_from(1.0, step, 10) * g
    total = found.nll + weight * g
    yield "out.total", total
    yield "g.last_layer", torch.autograd.grad(total, last)[0]
    yield from _discriminator_results(critic, pixels, made.detach())
    average = EMA([("x", t["in.ema.0"])])
    for step in (1, 2, 3):
        average.update([("x", t[f"in.ema.{step}"])], cfg["ema_decay"])
        yield f"out.ema.{step}", average.shadow["x"].clone()


def _discriminator_results(critic: PatchDiscriminator, pixels: Tensor, made: Tensor) -> Results:
    real, fake = critic(pixels), critic(made)
    yield "out.real_logits", real
    yield "out.fake_logits_again", fake
    for kind in ("hinge", "vanilla", "wgan-gp"):
        yield f"out.discriminator.{kind}", discriminator_loss(kind, real, fake)  # type: ignore[arg-type]
    loss = discriminator_loss("hinge", real, fake)
    yield "out.discriminator.before_start", loss * weight_from(1.0, 9, 10)
    loss.backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None
        yield f"g.disc.{name}", parameter.grad


def recipe_results(golden: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name, ours, golden), for all of vae_training.json."""
    stated = json.loads((golden / "vae_training.json").read_text())
    for devices, ratio, wanted in stated["mixed_image_ratio"]:
        yield f"image probability {ratio} of {devices}", image_probability(ratio, devices), wanted
    for weight, step, start, wanted in stated["adopt_weight"]:
        yield f"weight {weight} at {step} from {start}", weight_from(weight, step, start), wanted
    for warmup, step, wanted in stated["warmup"]:
        cfg = OptimConfig(lr=5e-5, warmup_steps=warmup, initial_lr=1e-6, schedule="constant")
        yield f"lr at {step} of {warmup}", lr_at(step, cfg, 100), wanted
    with torch.device("meta"):
        critic = PatchDiscriminator()
        logits = critic(torch.empty(1, 3, 32, 256, 256))
    shapes = {name: list(parameter.shape) for name, parameter in critic.named_parameters()}
    yield "parameters of the discriminator", shapes, stated["real_discriminator_parameters"]
    yield "logits of 32x256x256", list(logits.shape), stated["real_discriminator_output_for_32x256x256"]
