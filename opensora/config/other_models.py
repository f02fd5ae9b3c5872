"""Sections of a sampling job that name a model beside that of ``weights``: ``still:`` and ``low_noise:``."""

from dataclasses import dataclass
from typing import ClassVar

from opensora.models.base import ModelConfig
from opensora.models.families import MODEL_CONFIGS, MODEL_SIZES
from opensora.models.text import TEXT_ENCODER_CONFIGS, TextConfig
from opensora.models.vae import AUTOENCODER_CONFIGS, AutoencoderConfig
from opensora.utils.limits import Limits
from opensora.utils.sections import section


@dataclass(frozen=True, kw_only=True)
class StillConfig:
    """A model of stills that makes the first frame of every clip: text to image to video."""

    weights: str  # run folder, export folder or safetensors file
    model: ModelConfig | None = section(MODEL_CONFIGS, sizes=MODEL_SIZES, optional=True)  # null: as saved with weights
    vae: AutoencoderConfig | None = section(AUTOENCODER_CONFIGS, optional=True)  # null: as saved with weights
    text: TextConfig | None = section(TEXT_ENCODER_CONFIGS, optional=True)  # null: that of the clips
    resolution: str = "768px"  # area of the stills, with sampling.aspect_ratio a size of training's table
    guidance: float = 4.0  # read by a distilled model, else by two passes

    LIMITS: ClassVar[Limits] = {"guidance": (1000.0, "the velocity would overflow")}

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights='': must be a run folder, an export folder or a safetensors file")
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance}: must be a number >= 0")


@dataclass(frozen=True, kw_only=True)
class LowNoiseConfig:
    """The expert for low noise (Wan 2.2): it makes the steps of low times, the model of ``weights`` those before."""

    weights: str  # run folder, export folder or safetensors file, of the same shape
    boundary: float | None = None  # its steps are of times below, in parts of the latest; null: where the times meet
    # that both were trained at
    use_ema: bool = True  # of a run that kept a moving average: sample from it
    lora: str | None = None  # adapters to add to its weights
    lora_scale: float = 1.0

    LIMITS: ClassVar[Limits] = {"lora_scale": (1000.0, "the adapters would drown the weights")}

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights='': must be a run folder, an export folder or a safetensors file")
        if self.lora == "":
            raise ValueError("lora='': must be a path, or null")
        if self.boundary is not None and not 0 < self.boundary < 1:
            raise ValueError(f"boundary={self.boundary}: must be a number between 0 and 1, or null")
        if self.lora_scale < -1000:
            raise ValueError(f"lora_scale={self.lora_scale}: must be a number from -1000 to 1000")
