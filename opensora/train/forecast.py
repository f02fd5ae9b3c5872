"""What a run would need, before it is started: memory, bytes, operations and time, per bucket and layout."""

from typing import Any

import torch
from torch import Tensor, nn


def run_denoiser(model: nn.Module, txt: int, img: int, samples: int = 1) -> Tensor:
    """The forward of a denoiser on the meta device, for ``samples`` of so many tokens."""
    return model(**denoiser_inputs(model.cfg, txt, img, samples))


def denoiser_inputs(cfg: Any, txt: int, img: int, samples: int) -> dict[str, Any]:
    """Arguments of a denoiser's forward, with the shapes and types that ``Preparation`` gives them, on meta."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(samples, *shape, dtype=dtype, device="meta")

    return {
        "img": empty(img, cfg.in_channels),
        "img_ids": empty(img, 3),
        "txt": empty(txt, cfg.context_in_dim),
        "txt_ids": empty(txt, 3),
        "timesteps": empty(),
        "y_vec": empty(cfg.vec_in_dim),
        "cond": empty(img, cfg.cond_channels) if cfg.cond_embed else None,
        "guidance": empty() if cfg.guidance_embed else None,
    }
