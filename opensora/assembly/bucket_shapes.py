"""Whether autoencoder and model take the shapes of the bucket table."""

from itertools import product

from opensora.datasets import DataConfig
from opensora.datasets.buckets.resolutions import training_sizes
from opensora.datasets.buckets.sizes_1x import RULES as RULES_1X
from opensora.models.base import AutoencoderShape, Denoising, latent_grid
from opensora.utils.errors import UserError


def check_buckets(cfg: DataConfig, shape: AutoencoderShape, denoising: Denoising) -> None:
    """That the autoencoder can code the lengths of all buckets, and the model cut them into patches.

    Raises:
        UserError: one that it cannot.
    """
    for resolution, rows in cfg.buckets.items():
        for frames in rows:
            try:
                denoising.check_frames(latent_grid(int(frames), shape.stride[1], shape.stride[2], shape)[0])
            except ValueError as error:
                raise UserError(f"data.buckets.{resolution}.{frames}: {error}") from None
        if cfg.bucket_rule in RULES_1X:
            _check_sizes(cfg, resolution, shape, denoising)


def _check_sizes(cfg: DataConfig, resolution: str, shape: AutoencoderShape, denoising: Denoising) -> None:
    """The same of sizes that are no multiples of a token."""
    for frames, (height, width) in product(cfg.buckets[resolution], training_sizes(resolution, cfg.bucket_rule, 1)):
        key = f"data.buckets.{resolution}.{frames}"
        try:
            latents = latent_grid(int(frames), height, width, shape)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
        if not denoising.pads and any(size % side for size, side in zip(latents, denoising.patch, strict=True)):
            raise UserError(
                f"{key}: {height}x{width} pixels make {latents[1]}x{latents[2]} latents, which this model does not cut "
                f"into patches of {denoising.patch[1]}x{denoising.patch[2]}; use sizes that are multiples of "
                f"{denoising.pixel_multiple(shape.stride)} pixels, or a model that fills up (stdit2, stdit3)"
            )
