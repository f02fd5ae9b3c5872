"""Frames as a CLIP model sees them: scaled, the middle cut out, normalised."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """The defaults are those of the published models."""

    side: int = 224  # pixels of the shorter one, after scaling
    height: int = 224  # of what is cut out of the middle
    width: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 to (3, height, width) float32."""
        height, width = frame.shape[:2]
        short, long = min(height, width), max(height, width)
        scaled = int(self.side * long / short)  # cut off, as transformers does
        size = (scaled, self.side) if width > height else (self.side, scaled)
        picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
        top, left = (picture.shape[0] - self.height) // 2, (picture.shape[1] - self.width) // 2
        middle = picture[top : top + self.height, left : left + self.width].astype(np.float32) / 255
        normal = (middle - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def read_preprocessing(folder: Path) -> Preprocessing:
    """As the folder of a model states it; without such a file, the defaults.

    Raises:
        ValueError, TypeError, KeyError: it states something else.
    """
    path = folder / FILE
    if not path.is_file():
        return Preprocessing()
    stated = json.loads(path.read_bytes())
    size, crop = stated.get("size", 224), stated.get("crop_size", 224)
    height, width = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
    found = Preprocessing(
        side=int(size["shortest_edge"] if isinstance(size, dict) else size),
        height=int(height),
        width=int(width),
        mean=_three(stated.get("image_mean", Preprocessing.mean)),
        std=_three(stated.get("image_std", Preprocessing.std)),
    )
    if not 0 < max(found.height, found.width) <= found.side:
        raise ValueError(f"crop_size {found.height}x{found.width} of pictures whose shorter side is {found.side}")
    return found


def _three(values: Any) -> tuple[float, ...]:
    first, second, third = (float(value) for value in values)
    return first, second, third
