"""A small training problem in fp64 for parity tests: MMDiT, real objective, mixed buckets, no files."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.models.base import TextFeatures
from opensora.models.mmdit import MMDiTConfig
from opensora.utils.rng import torch_generator
from opensora.utils.tasks import TaskRunner, one_by_one

MODEL = MMDiTConfig(
    in_channels=8,
    patch_size=1,
    vec_in_dim=12,
    context_in_dim=12,
    hidden_size=48,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 4, 4),
    cond_embed=True,
)
TEXT_TOKENS = 5  # divisible by no degree
# Two samples of a clip, one still, three of another shape, one clip with fewer image tokens than four processes.
BUCKETS = ((2, 3, 3, 5), (1, 1, 5, 7), (3, 2, 3, 3), (1, 1, 1, 3))  # (batch, T', H', W')


@dataclass(frozen=True)
class FakeBatch:
    """What Preparation reads of a Batch. ``pixels`` are latents already: the fake autoencoder passes them on."""

    pixels: Tensor
    prompts: list[str]
    sample_ids: tuple[int, ...]
    weight: float = 1.0
    degree: int | None = None
    epoch: int = 0


class PassThrough:
    """An autoencoder of stride 1."""

    channels, stride, causal, is_costly = 8, (1, 1, 1), True, False

    def encode(self, pixels: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return pixels

    def decode(self, latents: Tensor, run: TaskRunner = one_by_one) -> Tensor:
        return latents


class FakeText:
    """Features drawn from the prompt; the padding mask depends on its length."""

    context_dim = vec_dim = 12

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device

    def encode(self, prompts: list[str]) -> TextFeatures:
        txt = torch.stack([torch.randn(TEXT_TOKENS, 12, generator=torch_generator("txt", p)) for p in prompts])
        vec = torch.stack([torch.randn(12, generator=torch_generator("vec", p)) for p in prompts])
        mask = torch.stack([torch.arange(TEXT_TOKENS) <= len(p) % TEXT_TOKENS for p in prompts])
        return TextFeatures(txt=txt.to(self.device), y_vec=vec.to(self.device), mask=mask.to(self.device))


def batches(step: int) -> list[FakeBatch]:
    """The micro-batches of a step, one per bucket; every step has other samples."""
    result = []
    for index, (batch, *grid) in enumerate(BUCKETS):
        ids = tuple(1000 * step + 10 * index + i for i in range(batch))
        pixels = torch.randint(0, 256, (batch, 8, *grid), generator=torch_generator("pixels", step, index))
        result.append(FakeBatch(pixels.to(torch.uint8), [f"{'word ' * (i % 7)}{i}" for i in ids], ids))
    return result


def elements(step: int) -> int:
    """Latent values of the whole step."""
    return sum(batch.pixels.numel() for batch in batches(step))
