"""What the command that converts weights is told."""

from dataclasses import dataclass

from opensora.models.base import ModelConfig
from opensora.models.families import MODEL_CONFIGS, MODEL_SIZES
from opensora.utils.sections import section


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What the weights are of."""

    model: ModelConfig = section(MODEL_CONFIGS, sizes=MODEL_SIZES)  # the denoiser
