"""Which samples of a micro-batch lose their prompt."""

import torch
from torch import Tensor

from opensora.conditioning.config import DropoutConfig
from opensora.utils.rng import numpy_generator


def drop_text(seed: int, step: int, sample_ids: tuple[int, ...], cfg: DropoutConfig) -> tuple[Tensor, Tensor]:
    """Which samples lose their text tokens, and which their pooled prompt: two (B,) bool on the CPU, independent."""

    def draw(purpose: str, p: float) -> Tensor:
        dropped = [numpy_generator(seed, step, sample, purpose).random() < p for sample in sample_ids]
        return torch.tensor(dropped, dtype=torch.bool)

    return draw("drop_txt", cfg.text), draw("drop_vec", cfg.pooled)


def dropped_labels(labels: Tensor | None, dropped: Tensor | None, num_classes: int) -> Tensor | None:
    """(B,) int64: ``num_classes``, which stands for no class, where a sample lost its own; None of models that read
    none. ``dropped`` None: no sample did."""
    if not num_classes:
        return None
    assert labels is not None, "checked with the configuration: the text encoder gives labels"
    return labels if dropped is None else torch.where(dropped, num_classes, labels)
