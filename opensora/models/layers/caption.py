"""Text of a frozen encoder to the hidden size, and the model's own text for no prompt (PixArt-alpha)."""

import torch
from torch import Tensor, nn

from opensora.models.layers.transformer import Mlp


class CaptionEmbedder(nn.Module):
    """Projects every text token; ``y_embedding`` (rows, C) stands for the text of dropped samples.

    The null text is saved and loaded with the weights, but it is not trained (it was learned once, and was a buffer
    ever since), and it has no moving average.
    """

    def __init__(self, text_dim: int, hidden: int, rows: int) -> None:
        super().__init__()
        self.y_proj = Mlp(text_dim, hidden, hidden)
        self.y_embedding = nn.Parameter(torch.empty(rows, text_dim), requires_grad=False)

    def forward(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, hidden). ``dropped`` (B,) bool: samples that take the null text."""
        y = y.to(self.y_proj.fc1.weight.dtype)
        if dropped is not None:
            y = torch.where(dropped[:, None, None], self.null(y.shape[1]).to(y.dtype), y)
        return self.y_proj(y)

    def null(self, tokens: int) -> Tensor:
        """(tokens, C): the null text, cut, or its last row repeated, to the length of the text that it stands for."""
        rows = torch.arange(tokens, device=self.y_embedding.device).clamp(max=self.y_embedding.shape[0] - 1)
        return self.y_embedding[rows]


def for_every_sample(mask: Tensor, samples: int) -> Tensor:
    """(rows, L) numbers or bool -> (samples, L) bool: a mask of fewer rows is repeated, as for both halves of a batch
    of guidance."""
    if samples % mask.shape[0]:
        raise ValueError(f"a text mask of {mask.shape[0]} rows cannot be repeated for {samples} samples")
    return mask.bool().repeat(samples // mask.shape[0], 1)
