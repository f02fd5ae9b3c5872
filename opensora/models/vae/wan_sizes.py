"""What Wan's autoencoders are made of: the published numbers of 2.1 and 2.2, and those that a config.json states."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from opensora.models.vae.folder import KEY, MAX_CHANNELS
from opensora.utils.errors import UserError

COLOURS = 3
FRAMES = 4  # that the network codes at a time, behind the first, whatever its config.json says
MAX_LEVELS, MAX_PATCH, MAX_BLOCKS = 8, 16, 64


@dataclass(frozen=True, kw_only=True)
class WanSizes:
    """Arguments of ``AutoencoderKLWan``, and the statistics of its latents."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # null: base_dim
    z_dim: int = 16  # latent channels
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # as diffusers spells it
    is_residual: bool = False  # averages beside every change of size: 2.2
    patch_size: int | None = None  # pixels along a side that are channels of one place before the network: 2.2
    latents_mean: tuple[float, ...]  # of every channel
    latents_std: tuple[float, ...]

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent."""
        side = 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)
        return FRAMES, side, side

    def build(self) -> nn.Module:
        """diffusers' module, without weights that mean anything."""
        from diffusers import AutoencoderKLWan

        arguments = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
        colours = COLOURS * (self.patch_size or 1) ** 2
        frames, side, _ = self.stride
        module: nn.Module = AutoencoderKLWan(
            **arguments,
            in_channels=colours,
            out_channels=colours,
            scale_factor_temporal=frames,
            scale_factor_spatial=side,
        )
        return module


WAN = WanSizes(
    latents_mean=(
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    latents_std=(
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
)
WAN22 = WanSizes(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    patch_size=2,
    latents_mean=(
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
    latents_std=(
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
)


def stated_sizes(stated: Mapping[str, Any], path: str, published: WanSizes) -> WanSizes:
    """What a config.json says; what it does not say is as published.

    Raises:
        UserError: a value that is none of its kind, or absurd; statistics for another number of channels.
    """
    read = _Stated(stated, path)
    found = replace(
        published,
        base_dim=read.whole("base_dim", published.base_dim, MAX_CHANNELS),
        decoder_base_dim=read.whole("decoder_base_dim", published.decoder_base_dim, MAX_CHANNELS),
        z_dim=read.whole("z_dim", published.z_dim, MAX_CHANNELS),
        dim_mult=read.listed("dim_mult", published.dim_mult, int),
        num_res_blocks=read.whole("num_res_blocks", published.num_res_blocks, MAX_BLOCKS),
        attn_scales=read.listed("attn_scales", published.attn_scales, float),
        temperal_downsample=read.listed("temperal_downsample", published.temperal_downsample, bool),
        patch_size=read.whole("patch_size", published.patch_size, MAX_PATCH),
        latents_mean=read.listed("latents_mean", published.latents_mean, float),
        latents_std=read.listed("latents_std", published.latents_std, float),
    )
    return _checked(found, path)


def _checked(found: WanSizes, path: str) -> WanSizes:
    """That numbers fit one another."""

    def refuse(name: str, wanted: str) -> UserError:
        return UserError(f"{KEY}={path}: config.json has {name}={list(getattr(found, name))}; must be {wanted}")

    levels = len(found.dim_mult)
    if not 1 <= levels <= MAX_LEVELS or not all(1 <= one <= MAX_CHANNELS for one in found.dim_mult):
        raise refuse("dim_mult", f"1 to {MAX_LEVELS} whole numbers above 0")
    if len(found.temperal_downsample) != levels - 1 or sum(found.temperal_downsample) != 2:
        raise refuse("temperal_downsample", f"{levels - 1} of true and false, two of them true: 4 frames a latent")
    for name in ("latents_mean", "latents_std"):
        if len(getattr(found, name)) != found.z_dim:
            raise refuse(name, f"{found.z_dim} numbers, one for each latent channel")
    if min(found.latents_std) <= 0:
        raise refuse("latents_std", "numbers above 0")
    return found


class _Stated:
    """Values of a config.json."""

    def __init__(self, stated: Mapping[str, Any], path: str) -> None:
        self._stated, self._path = stated, path

    def whole(self, name: str, otherwise: Any, most: int) -> Any:
        """A whole number; null where ``otherwise`` may be."""
        value = self._stated.get(name, otherwise)
        if value is None and name in ("decoder_base_dim", "patch_size"):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self._refuse(name, value, f"an integer from 1 to {most}")
        return value

    def listed(self, name: str, otherwise: tuple[Any, ...], of: type) -> tuple[Any, ...]:
        """A list of numbers, or of true and false; null and none: as published."""
        value = self._stated.get(name)
        if value is None:
            return otherwise
        kinds = (bool,) if of is bool else (int,) if of is int else (int, float)
        fits = isinstance(value, list) and all(
            isinstance(one, kinds) and (of is bool or not isinstance(one, bool)) for one in value
        )
        if not fits:
            raise self._refuse(name, value, f"a list, each {'true or false' if of is bool else 'a number'}")
        return tuple(of(one) for one in value)

    def _refuse(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(f"{KEY}={self._path}: config.json has {name}={str(value)[:60]}; must be {wanted}")
