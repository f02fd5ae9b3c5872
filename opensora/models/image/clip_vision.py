"""CLIP's eyes as Wan 2.1 uses them: of a picture the hidden states before the last layer, 257 tokens of 1280 of CLIP-H.

A picture is the first frame of a clip, at the clip's size. ``fit`` says how it becomes the square that CLIP reads:
``squash`` is what Wan's own code does and was trained with, ``crop`` what the published pipeline of diffusers does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from opensora.models.base import Width
from opensora.models.text.folder import stated_width
from opensora.models.text.placement import PLACEMENT, PLACEMENT_LIMITS, check_moves, check_placement
from opensora.models.text.row_by_row import row_by_row
from opensora.models.text.transformers_encoder import Peers, PlacedModules, Visits
from opensora.models.text.weights import open_clip_vision
from opensora.utils.limits import Limits

KEY = "image_encoder.path"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of colours, for all CLIPs
LEVELS = 255  # of a colour in a picture


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """``path``: CLIP ViT-H/14, which gives 1280 dims: a folder of transformers, or of a diffusers pipeline of Wan."""

    kind: Literal["clip_vision"] = "clip_vision"
    path: str = ""  # folder of transformers or of the whole pipeline, or the file of weights in it
    fit: Literal["squash", "crop"] = "squash"  # the whole picture as a square; crop: the square in its middle
    device: Literal["auto", "cpu"] = "auto"  # where pictures are encoded: on the run's device, or on the CPU
    shard: bool = False  # weights are cut over all processes (of a copy of the model's), each block gathered for use
    offload: bool = False  # weights are in CPU memory, and on the GPU only while pictures are encoded

    PLACEMENT: ClassVar[tuple[str, ...]] = PLACEMENT
    LIMITS: ClassVar[Limits] = {name: limit for name, limit in PLACEMENT_LIMITS.items() if name != "cache_mib"}

    def __post_init__(self) -> None:
        check_placement(self)

    @property
    def cache_mib(self) -> int:
        """No picture is kept."""
        return 0


class ClipVisionEncoder(PlacedModules):
    """Pictures -> tokens. With ``peers``, ``encode`` is collective; every process gives some, as many as it likes."""

    section = "image_encoder"

    def __init__(
        self,
        cfg: ClipVisionConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        peers: Peers | None = None,
        visits: "Callable[[Sequence[nn.Module], torch.device], Visits] | None" = None,
    ) -> None:
        """See ``PlacedModules``."""
        self.cfg = cfg
        file = open_clip_vision(KEY, cfg.path)
        stated = file.module.config
        self.side, self.dim = int(stated.image_size), int(stated.hidden_size)  # type: ignore[union-attr, arg-type]
        self.tokens: int = file.module.embeddings.num_positions  # type: ignore[union-attr, assignment]
        super().__init__(cfg, [file], device, dtype, peers, visits)
        self._clip = self._modules[0]
        row_by_row([self._clip.embeddings])  # type: ignore[list-item]

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, tokens, dim) of the type of the weights, on the run's device."""
        with self._at_work(turns=1):
            x = clip_pixels(pictures.to(self._work_device), self.side, self.cfg.fit)
            found: Tensor = self._clip(pixel_values=x.to(self._dtype)).last_hidden_state
            return found.to(self._device)


def clip_pixels(pictures: Tensor, side: int, fit: str) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, side, side) as CLIP reads it; fp32, fp64 of fp64.

    ``squash`` is bicubic without filtering before it; ``crop`` has the filter and the 256 levels of a picture.
    """
    x = pictures.to(torch.promote_types(pictures.dtype, torch.float32)) / 2 + 0.5
    x = _squashed(x, side) if fit == "squash" else _cropped(x, side)
    mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def _squashed(x: Tensor, side: int) -> Tensor:
    return interpolate(x, (side, side), mode="bicubic", align_corners=False)


def _cropped(x: Tensor, side: int) -> Tensor:
    """The shorter side becomes ``side``, the longer one is cut to its middle."""
    height, width = x.shape[2:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    if size != (height, width):
        x = interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    x = (x.clamp(0, 1) * LEVELS).round() / LEVELS
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return x[:, :, top : top + side, left : left + side]


def stated_picture_width(cfg: ClipVisionConfig) -> Width:
    """Width of the tokens, by the config.json of the folder; None: it does not say.

    Raises:
        UserError: as ``stated_width``; or weights that are to be moved to a GPU, and there is none.
    """
    width = stated_width(KEY, cfg.path, "hidden_size")
    check_moves(cfg, "image_encoder")
    return Width(width, f"{KEY}={cfg.path}")


def check_picture_files(cfg: ClipVisionConfig) -> None:
    """That the files hold the model of their config.json, by names and shapes; reads headers only.

    Raises:
        UserError: they do not, with everything that is missing, unexpected or of another shape.
    """
    open_clip_vision(KEY, cfg.path)
