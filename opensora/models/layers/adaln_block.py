"""The block of DiT: attention and MLP, each shifted, scaled and gated by the conditioning vector (arXiv 2212.09748)."""

from typing import Any, Literal

from torch import Tensor, nn

from opensora.models.layers.axis_switch import AxisSwitch
from opensora.models.layers.modulation import modulate, vector_rows
from opensora.models.layers.norm import plain_norm
from opensora.models.layers.transformer import Mlp, SelfAttention, along_time, within_frames


class AdaLNBlock(nn.Module):
    """``along``: among all tokens (B, N, D); or, for tokens (B, T, S, D), within a frame or along time."""

    def __init__(
        self, hidden: int, heads: int, mlp_hidden: int, along: Literal["joint", "space", "time"] = "joint"
    ) -> None:
        super().__init__()
        self.along = along
        if along == "space":
            self.to_space, self.to_time = AxisSwitch(), AxisSwitch()
        self.norm1 = plain_norm(hidden)
        self.attn = SelfAttention(hidden, heads)
        self.norm2 = plain_norm(hidden)
        self.mlp = Mlp(hidden, mlp_hidden, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, vector: Tensor, context: Any = None) -> Tensor:
        """x (B, N, D) or (B, T, S, D), vector (B, D) -> as x. Starts as the identity: gates are zero."""
        x = x.to(self.mlp.fc1.weight.dtype)
        if self.along == "space":
            x = self.to_space(x, context)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vector_rows(self.adaLN_modulation(vector), 6, x.ndim)
        x = x + gate * self._attend(modulate(self.norm1(x), shift, scale), context)
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return self.to_time(x, context) if self.along == "space" else x

    def modulated(self, x: Tensor, vector: Tensor) -> Tensor:
        """The normalised, modulated tokens that attention starts from."""
        shift, scale, *_ = vector_rows(self.adaLN_modulation(vector), 6, x.ndim)
        return modulate(self.norm1(x.to(self.mlp.fc1.weight.dtype)), shift, scale)

    def _attend(self, x: Tensor, context: Any) -> Tensor:
        if self.along == "joint":
            return self.attn(x, context=context)
        run = within_frames if self.along == "space" else along_time
        return run(self.attn, x, context=context)
