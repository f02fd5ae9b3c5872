"""The ``low_noise:`` section of a sampling job: the second of two experts."""

from dataclasses import dataclass
from typing import ClassVar

from opensora.utils.limits import Limits


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
