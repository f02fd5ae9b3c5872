"""From the last block to latents: modulation and a linear layer, in two kinds.

Rows of ``linear`` are (C_out, pt, ph, pw), as tokens are; files of these families have C_out last, which their
``WeightFormat`` permutes.
"""

import torch
from torch import Tensor, nn

from opensora.models.layers.modulation import modulate, table_rows, vector_rows
from opensora.models.layers.norm import plain_norm


class DiTLastLayer(nn.Module):
    """Shift and scale are a linear function of the conditioning vector (DiT, Latte)."""

    def __init__(self, hidden: int, values: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.linear = nn.Linear(hidden, values)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x (B, ..., D), vector (B, D) -> (B, ..., values)."""
        shift, scale = vector_rows(self.adaLN_modulation(vector), 2, x.ndim)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PixArtLastLayer(nn.Module):
    """Shift and scale are a table plus the vector of time itself (PixArt, STDiT)."""

    def __init__(self, hidden: int, values: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden))
        self.linear = nn.Linear(hidden, values)

    def forward(self, x: Tensor, vector: Tensor, *, clean: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """x (B, ..., D), vector (B, D) -> (B, ..., values).

        ``clean`` (B, D), ``known`` (B, T, S or 1): known frames are normalised and modulated a second time, by the
        vector of time 0: what the published models were trained with.
        """
        x = self._modulated(x, vector)
        if known is not None and clean is not None:
            x = torch.where(known[..., None], self._modulated(x, clean), x)
        return self.linear(x)

    def _modulated(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = table_rows(self.scale_shift_table, vector, x.ndim)
        return modulate(self.norm_final(x), shift, scale)
