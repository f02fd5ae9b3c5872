"""Mean and deviation of the latents of Open-Sora 1.3's autoencoder, by which models are given them normalized.

Of every channel, over clips of many frames; or of every channel at each of five places, which is what a piece of 17
frames becomes: the first latent frame, which is of one frame, differs from those of four.
"""

from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["none", "video", "video_5frames"]
PLACES = 5  # latent frames
CHANNELS = 16

# fmt: off
_VIDEO_MEAN = (
    -0.1901695, -0.044800628, 0.020789705, 0.018653357, -0.011585569, 0.0010865575, 0.08378933, 0.08902134,
    0.009409455, 0.08086848, -0.07251628, 0.05052144, -0.020972481, -0.12230792, -0.0038623565, -0.023072388,
)
_VIDEO_STD = (
    0.9490776, 0.9594118, 0.9444303, 0.91032845, 0.95935166, 0.84303516, 0.8888125, 0.9291137, 0.97259414, 0.8917954,
    0.8630854, 0.82798916, 0.91143, 0.7922845, 0.8991407, 0.9473514,
)
_PLACES_MEAN = (
    (-0.31038138, -0.17488302, -0.1390065, -0.11228419, -0.2143084),
    (0.089755274, -0.055954233, -0.07017383, -0.12842283, -0.059222423),
    (0.009729884, 0.022306992, 0.023845116, 0.023336032, 0.024730036),
    (0.10618276, -0.10902954, 0.060719784, 0.10005339, -0.06466035),
    (0.029384656, 0.052769065, -0.0128054805, -0.03036861, -0.09690209),
    (0.01716991, -0.007233284, 0.0011372794, -0.0029931865, -0.0026791762),
    (0.11501131, 0.087407455, 0.0757848, 0.07428467, 0.066402785),
    (0.043605775, 0.12531929, 0.05740308, 0.09716418, 0.12161173),
    (-0.003800593, 0.066950716, 0.0037457007, 0.00064624334, -0.020493738),
    (0.09442657, 0.047472052, 0.043563962, 0.05506575, 0.16380565),
    (-0.17690079, -0.13735504, -0.02259145, 0.033208176, -0.058970865),
    (0.049464937, 0.06297766, 0.0469673, 0.042452283, 0.05074439),
    (-0.052013952, -0.038366813, -0.0018303691, -0.0057245153, -0.0069338484),
    (-0.068219386, -0.13791534, -0.14595246, -0.11955552, -0.13990912),
    (-0.009703802, -0.014363708, -0.0051330593, 0.0068099457, 0.003080054),
    (-0.14393239, -0.00912384, -0.01863871, -0.005709422, 0.06205809),
)
_PLACES_STD = (
    (0.9969105, 0.9459409, 0.9167423, 0.92885023, 0.89932984),
    (1.0192935, 0.9416692, 0.9346943, 0.9353694, 0.9003037),
    (0.9833934, 0.9082298, 0.9308427, 0.9624826, 0.9349732),
    (0.97186136, 0.91052, 0.8878196, 0.86988616, 0.86309445),
    (1.0202057, 0.94473195, 0.9330361, 0.9632452, 0.92104787),
    (1.0385587, 0.8876768, 0.7368917, 0.7580699, 0.75087255),
    (1.0592127, 0.8657043, 0.82151794, 0.8476718, 0.8209494),
    (0.9920972, 0.927169, 0.89886844, 0.9289982, 0.8869122),
    (1.0359006, 0.95993954, 0.9465613, 0.9801757, 0.93422),
    (0.962186, 0.8828722, 0.87103915, 0.8808464, 0.8516325),
    (0.9560437, 0.84533536, 0.8308913, 0.825839, 0.8010841),
    (0.98799556, 0.811466, 0.75618976, 0.788991, 0.7724365),
    (0.9584462, 0.8858027, 0.89920944, 0.9229688, 0.884798),
    (0.9060379, 0.78632456, 0.73743653, 0.7614733, 0.74287385),
    (0.9648598, 0.8712865, 0.8902931, 0.8947093, 0.87098163),
    (1.0170196, 0.9330488, 0.9144401, 0.9294653, 0.88715833),
)
# fmt: on


def normalized(z: Tensor, kind: Normalization) -> Tensor:
    """Latents (B, 16, T', H', W') as models are given them, in fp32."""
    if kind == "none":
        return z
    mean, std = _statistics(kind, z)
    return (z.float() - mean) / std


def denormalized(z: Tensor, kind: Normalization) -> Tensor:
    """The inverse of ``normalized``."""
    if kind == "none":
        return z
    mean, std = _statistics(kind, z)
    return z.float() * std + mean


def _statistics(kind: Normalization, z: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std), to broadcast over ``z``; a latent frame alone is at the first place.

    Raises:
        ValueError: T' is no multiple of five.
    """
    if kind == "video":
        rows = _VIDEO_MEAN, _VIDEO_STD
        return _of(rows[0], z)[:, None, None, None], _of(rows[1], z)[:, None, None, None]
    frames = z.shape[2]
    if frames > 1 and frames % PLACES:
        raise ValueError(f"{frames} latent frames: with normalization=video_5frames must be a multiple of {PLACES}")
    places = [frame % PLACES for frame in range(frames)]
    mean, std = _of(_PLACES_MEAN, z)[:, places], _of(_PLACES_STD, z)[:, places]
    return mean[..., None, None], std[..., None, None]


def _of(values: tuple[float, ...] | tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
