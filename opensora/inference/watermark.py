"""A picture that is laid over the lower right corner of what is made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing
from opensora.utils.files.user_files import absence

SHARE = 0.2  # of a clip's width and height that the picture takes at most
MARGIN = 0.02  # of the shorter side, between the picture and the edges


@dataclass(frozen=True)
class Watermark:
    """A picture with its transparency; scaled down to clips, never up."""

    picture: Image.Image  # RGBA

    def __call__(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> the same with the picture in it."""
        height, width = frames.shape[1:3]
        mark = self.picture.copy()
        mark.thumbnail((max(1, int(width * SHARE)), max(1, int(height * SHARE))))
        rgba = torch.from_numpy(np.asarray(mark).copy()).float()
        margin = int(min(height, width) * MARGIN)
        bottom, right = height - margin, width - margin
        place = (slice(None), slice(bottom - rgba.shape[0], bottom), slice(right - rgba.shape[1], right))
        alpha, marked = rgba[..., 3:] / 255, frames.clone()
        mixed = frames[place].float() * (1 - alpha) + rgba[..., :3] * alpha
        marked[place] = mixed.round().to(torch.uint8)
        return marked


def read_watermark(path: str | None) -> Watermark | None:
    """
    Raises:
        UserError: the picture is not there or cannot be read.
    """
    if path is None:
        return None
    if reason := absence(Path(path), "file"):
        raise UserError(f"watermark={path}: {reason}; give a picture, best a PNG with transparency")
    with parsing(lambda why: UserError(f"watermark={path}: {why}; give a picture that can be read")):
        return Watermark(Image.open(path).convert("RGBA"))
