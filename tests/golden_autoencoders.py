"""Autoencoders against tensors that published code has computed: ``python -m tests.golden_autoencoders``.

Every case of a file goes through ``build_autoencoder``, and the largest difference over the largest value is told.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.models.vae import AutoencoderConfig, DCAEConfig, Flux2DConfig, HunyuanConfig, build_autoencoder
from tests.conftest import ROOT

LIMIT = 1e-5  # fp32
FILES = ("hunyuan_vae", "flux_ae", "video_dc_ae")


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest difference over largest value; shapes must be the same."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    found, truth = found.detach().double(), truth.double()
    return float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def single_file(golden: Path, name: str, to: Path) -> dict[str, Any]:
    """The weights of a golden file as they were published, with what the file says of them; returns the latter."""
    with safe_open(golden / f"{name}.safetensors", "pt") as file:
        stated = file.metadata()["config"]
    weights = {key[2:]: value for key, value in load_file(golden / f"{name}.safetensors").items() if key[:2] == "w."}
    save_file(weights, to, {"config": stated})
    found: dict[str, Any] = json.loads(stated)
    return found


def configuration(name: str, case: str, stated: dict[str, Any], path: str) -> AutoencoderConfig:
    """How a case was coded: its name tells what was cut into tiles."""
    if name == "flux_ae":
        return Flux2DConfig(path=path, sample="posterior")
    cuts = {
        "spatial_tiling": any(word in case for word in ("spatial", "both", "shipped")),
        "temporal_tiling": any(word in case for word in ("temporal", "both")),
        "tile_overlap": stated["tile_overlap_factor"],
    }
    if name == "hunyuan_vae":
        sizes = {"tile_size": stated["sample_size"], "tile_frames": stated["sample_tsize"]}
        return HunyuanConfig(path=path, sample="posterior", **cuts, **sizes)
    sizes = {"tile_size": stated["spatial_tile_size"], "tile_frames": stated["temporal_tile_size"]}
    return DCAEConfig(path=path, scale=stated["scaling_factor"], **cuts, **sizes)


def differences(golden: Path, name: str, path: str, stated: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(result, relative difference) of all cases of a golden file, by the autoencoder at ``path``."""
    tensors = load_file(golden / f"{name}.safetensors")
    inputs = [key for key in tensors if key.startswith("in.") and "noise" not in key]
    for key in sorted(inputs):
        case = key.split(".")[1]
        autoencoder: Any = build_autoencoder(configuration(name, case, stated, path), "cpu", torch.float32)
        truths = {one.rpartition(".")[2]: one for one in tensors if one.startswith(f"out.{case}.")}
        if key.endswith("latents"):
            found = {"pixels": lambda z=tensors[key], ae=autoencoder: ae.decode(z, clamp=False)}
        else:
            found = _encoded(autoencoder, tensors[key].float() / 127, tensors.get(f"in.{case}.posterior_noise"))
        for result, truth in truths.items():
            yield f"{case} {result}", relative(found[result](), tensors[truth])


def _encoded(autoencoder: Any, pixels: Tensor, noise: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    return {
        "latents": lambda: autoencoder.encode(pixels),
        "sample": lambda: autoencoder.encode(pixels, draw=lambda shape: noise),
        **{
            part: lambda part=part: getattr(autoencoder.posterior(pixels), part)  # type: ignore[misc]
            for part in ("mean", "logvar")
        },
        "kl": lambda: autoencoder.posterior(pixels).kl(),
    }


def main(golden: Path) -> int:
    """Prints every difference; 1 if one is too large."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            path = Path(folder) / f"{name}.safetensors"
            for result, difference in differences(golden, name, str(path), single_file(golden, name, path)):
                print(f"{name:<12} {result:<30} {difference:.1e}")
                worst = max(worst, difference)
    return int(worst > LIMIT)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "golden"))
