"""A discriminator of patches of clips, or of frames: PatchGAN (Isola et al., arXiv 1611.07004), with 3-D convolutions
as in Open-Sora 1.3 and 2, or with 2-D ones as in 1.2. One logit for about every 32x32 pixels of 4 frames of the size of
Open-Sora 2's."""

from typing import Any

from torch import Tensor, nn

DEVIATION = 0.02  # of initial weights


class PatchDiscriminator(nn.Module):
    """Clips (B, C, T, H, W) -> logits (B, 1, T', H', W'): high for clips that it takes for real ones; or frames
    (B, C, H, W) -> (B, 1, H', W').

    Time is halved by the first two layers, space by all but the last two.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        layers: int = 5,
        dropout: float | None = 0.3,
        *,
        frames: bool = False,
        kernel: int = 3,
    ) -> None:
        """
        Args:
            width: of the first layer; doubled by the next ones, to eight times at most.
            layers: with a norm each, 1 or more.
            dropout: behind each of them; None: there is none.
            frames: of single frames. Open-Sora 1.2 has (layers=3, dropout=None, frames=True, kernel=4), 1.3 has
                (layers=3, dropout=None).
        """
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}: must be an integer >= 1")
        conv: Any = nn.Conv2d if frames else nn.Conv3d
        norm: Any = nn.BatchNorm2d if frames else nn.BatchNorm3d
        modules: list[nn.Module] = [conv(channels, width, kernel, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for number in range(1, layers + 1):
            stride = (1, 1, 1) if number == layers else (2, 2, 2) if number == 1 else (1, 2, 2)
            after = width * min(2**number, 8)
            modules += [
                conv(before, after, kernel, stride=stride[1:] if frames else stride, padding=1, bias=False),
                norm(after),
                nn.LeakyReLU(0.2),
                *([] if dropout is None else [nn.Dropout(dropout)]),
            ]
            before = after
        self.main = nn.Sequential(*modules, conv(before, 1, kernel, padding=1))
        self.apply(_init)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits."""
        return self.main(clips)


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.normal_(module.weight, 0.0, DEVIATION)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        nn.init.normal_(module.weight, 1.0, DEVIATION)
        nn.init.zeros_(module.bias)
