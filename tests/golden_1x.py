"""Golden files of Open-Sora 1.x: their tensors in fp32, and small files of weights as they were published."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT, TRAINING_LIMIT = 1e-5, 1e-4


class Golden:
    """One golden file of an autoencoder, with what vae.json says of it."""

    def __init__(self, folder: Path, name: str) -> None:
        stored = load_file(folder / "v1" / f"{name}.safetensors")
        self.tensors = {key: x.float() if x.is_floating_point() else x for key, x in stored.items()}
        self.stated: dict[str, Any] = json.loads((folder / "v1" / "vae.json").read_text())[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {key[2:]: x for key, x in self.tensors.items() if key.startswith("w.")}

    def named(self, start: str) -> dict[str, Tensor]:
        """Tensors whose names begin so, by the rest."""
        return {key.removeprefix(start): x for key, x in self.tensors.items() if key.startswith(start)}

    def write(self, path: Path, groups: dict[str, int]) -> str:
        """The weights as one file, with the numbers of groups that no shape tells."""
        save_file({name: x.contiguous() for name, x in self.weights.items()}, path, {"config": json.dumps(groups)})
        return str(path)


def noise_of_1_2(golden: Golden, case: str, clips: int) -> Any:
    """What draws the noise of a case: frames of the images came in (b t) order, pieces are joined along time."""
    images = golden[f"noise.spatial.{case}"]
    stages = {
        "spatial": images.view(clips, -1, *images.shape[1:]).transpose(1, 2),
        "temporal": golden[f"noise.temporal.{case}"],
    }

    def draw(shape: tuple[int, ...], stage: str = "") -> Tensor:
        assert tuple(stages[stage].shape[1:]) == shape
        return stages[stage]

    return draw


def stand_in(x: Tensor, y: Tensor) -> Tensor:
    """In place of LPIPS: (B * T,)."""
    a, b = (clip.transpose(1, 2).flatten(0, 1) for clip in (x, y))
    return ((a - b).square() + 0.1 * (a - b).abs()).flatten(1).mean(1)


def largest(differences: dict[str, float]) -> float:
    """For a message."""
    torch.set_num_threads(1)
    return max(differences.values())
