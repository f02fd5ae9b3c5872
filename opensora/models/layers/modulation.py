"""Adaptive layer norm: the conditioning vector shifts, scales and gates every layer (DiT, arXiv 2212.09748)."""

from torch import Tensor, nn


class Modulation(nn.Module):
    """(B, D) -> ``parts`` tensors (B, 1, D), in the order (shift, scale, gate), (shift, scale, gate)."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.act = nn.SiLU()
        self.lin = nn.Linear(hidden, parts * hidden)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(self.act(vec.to(self.lin.weight.dtype)))[:, None, :].chunk(self.parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D) with (B, 1, D) twice -> (B, N, D); scale 0 leaves x as it is."""
    return (1 + scale) * x + shift
