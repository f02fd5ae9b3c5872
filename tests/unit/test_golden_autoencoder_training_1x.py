"""Training of the autoencoders of Open-Sora 1.2 and 1.3: losses and gradients of the published code, to 1e-4."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.models.vae import OpenSoraV12Config, OpenSoraV13Config, build_autoencoder
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    lecam_averages,
    lecam_penalty,
    reconstruction_loss,
    weight_from,
)
from opensora.models.vae.training.two_stages import STAGES, Coded, Terms, code_both_ways, stage_terms
from tests.golden_1x import TRAINING_LIMIT, Golden, noise_of_1_2, stand_in
from tests.golden_autoencoders import relative


@pytest.fixture
def g(golden: Path) -> Golden:
    return Golden(golden, "vae_train_v1_2")


def network_of(g: Golden, folder: Path, *, frozen: bool = False) -> Any:
    path = g.write(folder / "v1_2.safetensors", {"norm_num_groups": 4, "num_groups": 4})
    autoencoder: Any = build_autoencoder(OpenSoraV12Config(path=path), "cpu", torch.float32)
    network = autoencoder.network.requires_grad_(True)
    network.spatial_vae.requires_grad_(not frozen)
    return network


def critic_of(weights: Mapping[str, Tensor], stated: dict[str, Any], *, frames: bool) -> PatchDiscriminator:
    kernel = 4 if frames else 3
    critic = PatchDiscriminator(
        stated["input_nc"], stated["ndf"], stated["n_layers"], None, frames=frames, kernel=kernel
    )
    critic.load_state_dict(dict(weights))
    return critic


def coded_by(network: Any, g: Golden, frames: int) -> tuple[Tensor, Coded, Tensor]:
    x = g["in.x"][:, :, :frames]
    coded = code_both_ways(network, x, noise_of_1_2(g, str(frames), 1))
    return x, coded, stand_in(x, coded.pixels)


def compare(found: Mapping[str, Tensor], truths: Mapping[str, Tensor]) -> None:
    for name, truth in truths.items():
        assert relative(found[name].reshape(truth.shape), truth) <= TRAINING_LIMIT, name


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {f"g.{name}": p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", ["image", "video"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_stages(number: int, clip: str, g: Golden, tmp_path: Path) -> None:
    case = f"stage{number}.{clip}"
    stated = g.stated["cases"][case]
    network = network_of(g, tmp_path, frozen=stated["freeze"])
    x, coded, distances = coded_by(network, g, stated["frames"])
    terms = stage_terms(STAGES[number - 1], x, coded, distances)
    terms.loss.backward()
    outputs = {"x_rec": coded.pixels, "x_z": coded.images, "x_z_rec": coded.images_again, "z": coded.latents}
    outputs |= {"kl": coded.posterior.kl()}
    compare(outputs, {name: g[f"out.{name}.{stated['frames']}"] for name in outputs})
    compare(named(terms) | gradients(network), g.named(f"{case}."))
    taught = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert len(taught) == stated["parameters_with_gradient"]


def named(terms: Terms) -> dict[str, Tensor]:
    """By the golden names."""
    found = {"loss": terms.loss, "nll": terms.nll, "kl": terms.kl, "z_nll": terms.images_nll}
    return found if terms.identity is None else found | {"identity": terms.identity}


def test_generator_term(g: Golden, tmp_path: Path) -> None:
    """Beside stage 3: the discriminator's opinion on frames, weighed by gradients of the decoder's last layer."""
    stated = g.stated["cases"]["gan.video"]
    network = network_of(g, tmp_path)
    x, coded, distances = coded_by(network, g, stated["frames"])
    terms = stage_terms(STAGES[2], x, coded, distances)
    critic = critic_before(g)
    fake = critic(coded.pixels.transpose(1, 2).flatten(0, 1))
    generator = generator_loss(fake)
    weight = adaptive_weight(terms.nll, generator, network.last_layer, 0.5)
    loss = terms.loss + weight * generator
    loss.backward()
    found = named(terms) | gradients(network) | {"adversarial": weight * generator, "adversarial_weight": weight}
    compare(found | {"loss": loss}, g.named("gan.video."))
    compare({"fake_logits": fake}, {"fake_logits": g["gan.fake_logits"]})
    assert sum(p.grad is not None for p in network.parameters()) == stated["parameters_with_gradient"]


def critic_before(g: Golden) -> PatchDiscriminator:
    """The discriminator; its averages are written after the steps, and none reads them in training mode."""
    weights = {name: x for name, x in g.named("disc.").items() if name.startswith("main.")}
    return critic_of(weights, g.stated["discriminator"], frames=True)


def test_step_of_the_discriminator(g: Golden) -> None:
    critic = critic_before(g)
    frames = g["in.x"][:, :, :6].transpose(1, 2).flatten(0, 1)
    real, fake = critic(frames), critic(g["out.x_rec.6"].transpose(1, 2).flatten(0, 1))
    found = {"real_logits": real, "fake_logits": fake}
    found |= {kind: discriminator_loss(kind, real, fake) for kind in ("hinge", "vanilla", "non-saturating")}  # type: ignore
    compare(found, {name: g[f"disc.step.{name}"] for name in found})


def test_losses_of_logits(g: Golden) -> None:
    real, fake = g["in.real_logits"], g["in.fake_logits"]
    averages = (0.1, -0.1)
    for i in range(3):
        averages = lecam_averages(averages, (1.0 + i, -2.0 * i))
    found: dict[str, Tensor] = {"lecam_ema": torch.tensor(averages)}
    found["lecam"] = lecam_penalty(real, fake, (0.3, -0.2), 0.7)
    found["non_saturating_d"] = discriminator_loss("non-saturating", real, fake)
    for name, step in (("before_start", 4), ("at_start", 5)):
        found[name] = discriminator_loss("hinge", real, fake) * weight_from(1.0, step, 5)
    for kind in ("hinge", "non-saturating"):
        last = g["in.last_layer"].clone().requires_grad_()
        generator = generator_loss(2 * last[:2], kind)  # type: ignore[arg-type]
        weight = adaptive_weight(3 * last.square().sum(), generator, last, 0.5)
        found[f"generator.{kind}"] = weight * generator
    truths = g.named("logits.")
    assert set(truths) == set(found)
    compare(found, truths)


def test_training_step_of_1_3(golden: Path, tmp_path: Path) -> None:
    g = Golden(golden, "vae_train_v1_3")
    critic = critic_of(
        {name.removeprefix("w.disc."): x for name, x in g.tensors.items() if name.startswith("w.disc.")},
        g.stated["discriminator"],
        frames=False,
    )
    g.tensors = {name: x for name, x in g.tensors.items() if not name.startswith("w.")}
    truths = dict(g.tensors)
    for side in ("encoder", "decoder"):
        g.tensors |= Golden(golden, f"vae_v1_3_weights_{side}").tensors
    path = g.write(tmp_path / "v1_3.safetensors", {})
    autoencoder: Any = build_autoencoder(OpenSoraV13Config(path=path), "cpu", torch.float32)
    network, x = autoencoder.network.requires_grad_(True), g["in.x"]
    posterior = Posterior.of(network.encoder(x))
    z = posterior.sample(g["noise"])
    made = network.decoder(z)
    nll = reconstruction_loss(x, made, stand_in(x, made), perceptual_weight=1.0).nll
    kl, fake = kl_loss(posterior, g.stated["kl_weight"]), critic(made)
    generator = generator_loss(fake)
    term = adaptive_weight(nll, generator, network.decoder.conv_out.weight, 0.5) * generator
    loss = nll + kl + term
    loss.backward()
    real = critic(x)
    again = critic(made.detach())
    found = {"out.z": z, "out.x": made, "nll": nll, "kl": kl, "generator": term, "loss": loss, "fake_logits": fake}
    found |= {f"disc.{kind}": discriminator_loss(kind, real, again) for kind in ("hinge", "vanilla")}  # type: ignore
    wanted = {name: x for name, x in truths.items() if not name.startswith(("in.", "noise"))}
    assert len(wanted) > 120
    compare(found | gradients(network), wanted)


def test_discriminators_of_published_sizes(golden: Path) -> None:
    """Names and shapes of 1.2's, for frames and for clips, and of 1.3's."""

    names = json.loads((golden / "v1" / "names_vae.json").read_text())
    sizes = {
        "v1.2 NLayerDiscriminator": {"frames": True, "kernel": 4},
        "v1.2 N_Layer_DISCRIMINATOR_3D": {"kernel": 4},
        "v1.3 N_LAYER_DISCRIMINATOR_3D": {},
    }
    for name, options in sizes.items():
        with torch.device("meta"):
            critic = PatchDiscriminator(layers=3, dropout=None, **options)  # type: ignore[arg-type]
        assert {n: list(x.shape) for n, x in critic.state_dict().items()} == names[name]["shapes"]
