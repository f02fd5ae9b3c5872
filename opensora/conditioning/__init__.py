"""What the model is told beside noise and time: which samples lose their prompt, and which latents are known."""

from opensora.conditioning.config import ConditioningConfig, DropoutConfig

__all__ = ["ConditioningConfig", "DropoutConfig"]
