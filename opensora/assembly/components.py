"""Model, autoencoder and text encoder as sampling needs them, on this process's device."""

from dataclasses import dataclass

import torch
from torch import nn

from acceleration.distributed.mesh import SAMPLE_AXES, Mesh
from acceleration.distributed.tasks import DistributedRunner
from opensora.assembly.token_layout import TokenLayout
from opensora.assembly.turns import Turns
from opensora.config.run import VaeParallel
from opensora.models.base import Autoencoder, ModelConfig, TextEncoder
from opensora.models.image import ImageEncoder
from opensora.schedulers import ObjectiveConfig
from opensora.utils.tasks import TaskRunner, one_by_one


@dataclass(frozen=True, kw_only=True)
class LowNoiseExpert:
    """A second model, for the steps of low noise."""

    model: nn.Module
    boundary: float  # its steps are of times below, in parts of the time of pure noise


@dataclass(frozen=True, kw_only=True)
class Components:
    """Everything that sampling needs, on this process's device."""

    model: nn.Module
    cfg: ModelConfig
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None = None  # of reference pictures, for a model that reads tokens of them
    objective: ObjectiveConfig  # that the model was trained with
    layout: TokenLayout
    mesh: Mesh
    device: torch.device
    prompt_suffix: bool  # prompts end with words about frame rate and motion
    published_prompts: bool = False  # in the form of the family's own sampler
    run_tiles: TaskRunner = one_by_one  # who codes the tiles of a clip
    low_noise: LowNoiseExpert | None = None
    turns: Turns | None = None  # of text encoder, denoiser and autoencoder on the device; None: nobody keeps account


def tile_runner(choice: VaeParallel, autoencoder: Autoencoder | None, mesh: Mesh) -> TaskRunner:
    """Who codes the tiles of a clip: the processes that work on the same samples together, or each all of them."""
    if autoencoder is None or choice == "off" or (choice == "auto" and not autoencoder.is_costly):
        return one_by_one
    return DistributedRunner(*(mesh[name] for name in SAMPLE_AXES))
