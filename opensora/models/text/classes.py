"""Numbers of classes in place of prompts, as DiT was trained on ImageNet and Latte on UCF101; no model, no files."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from opensora.models.base import TextFeatures
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.limits import Limits

MOST_DIGITS = 18  # of a number that fits 64 bits


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """Captions and prompts are numbers from 0; none, which guidance moves away from, is the class ``num_classes``."""

    kind: Literal["classes"] = "classes"
    num_classes: int = 1000  # 1000 of ImageNet, 101 of UCF101

    LIMITS: ClassVar[Limits] = {"num_classes": (10_000_000, "the model has a row of weights for each")}

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes}: must be an integer >= 1")


class ClassLabels:
    """Prompt -> its number."""

    context_dim = vec_dim = 0

    def __init__(
        self, cfg: ClassesConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.cfg, self._device, self._dtype = cfg, device, dtype

    def encode(self, prompts: list[str]) -> TextFeatures:
        """label (B,), txt (B, 0, 0), y_vec (B, 0).

        Raises:
            UserError: a prompt that is no number of a class.
        """
        labels = [label_of(prompt, self.cfg.num_classes) for prompt in prompts]
        nothing = torch.zeros(len(prompts), 0, dtype=self._dtype, device=self._device)
        label = torch.tensor(labels, dtype=torch.int64, device=self._device)
        return TextFeatures(txt=nothing[..., None], y_vec=nothing, label=label)


def label_of(prompt: str, num_classes: int) -> int:
    """The number that a prompt is; ``num_classes`` of an empty one.

    Raises:
        UserError: it is no number of a class.
    """
    text = prompt.strip()
    if not text:
        return num_classes
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS and int(text) < num_classes):
        raise UserError(
            f"text.kind=classes: the prompt {short(repr(text), 40)} must be the number of a class, "
            f"0 to {num_classes - 1}, or empty for none"
        )
    return int(text)
