"""LPIPS (Zhang et al., arXiv 1801.03924): how far apart two frames are to the eye, by features of VGG16.

    f_k  = features after relu1_2, 2_2, 3_3, 4_3, 5_3 of (x - MEAN) / STD
    n_k  = f_k / (|f_k| + 1e-10)                                 over channels, at every place
    d    = sum over k of mean over places of w_k . (n_k(x) - n_k(y))^2

Parameters are called as in the published files: ``features.N`` as torchvision's VGG16, ``linK.model.1`` as vgg.pth of
taming-transformers.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of frames in [-1, 1]
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (width, convolutions) between two poolings
EPSILON = 1e-10


class Head(nn.Module):
    """Weights of one tap's channels. Inputs are dropped in the training of LPIPS itself, which is not done here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N,)."""
        return self.model(x).mean(dim=(1, 2, 3))


class LPIPS(nn.Module):
    """Frozen; gradients reach the frames."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        taps: list[int] = []  # layers whose results are compared
        channels = len(MEAN)
        for number, (width, count) in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if number else []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            taps.append(len(layers) - 1)
        self.features, self._taps = nn.Sequential(*layers), tuple(taps)
        for number, (width, _) in enumerate(STAGES):
            self.add_module(f"lin{number}", Head(width))
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of frames: clips (B, 3, T, H, W) in [-1, 1] -> (B * T,)."""
        pairs = zip(self._normalised(x), self._normalised(y), strict=True)
        heads = (self.get_submodule(f"lin{number}") for number in range(len(STAGES)))
        distances = [head((one - other).square()) for head, (one, other) in zip(heads, pairs, strict=True)]
        return torch.stack(distances).sum(dim=0)

    def _normalised(self, clips: Tensor) -> Iterator[Tensor]:
        """The features of every tap, of length 1 at every place."""
        x = (rearrange(clips, "b c t h w -> (b t) c h w") - self.mean) / self.std
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._taps:
                yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPSILON)
