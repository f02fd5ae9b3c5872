"""What the shapes of families have in common to be checked."""

from typing import Any

from opensora.utils.limits import Limits

_WIDTH = (2**17, "no device multiplies wider matrices")
SHAPE_LIMITS: Limits = {
    **dict.fromkeys(("in_channels", "hidden_size", "num_heads", "caption_channels"), _WIDTH),
    "depth": (1000, "every block is built one by one"),
    "mlp_ratio": (64.0, "the hidden layer would be wider than any matrix product wants"),
    "model_max_length": (100_000, "no text encoder gives as many tokens"),
}


def check_shape(cfg: Any) -> None:
    """That a configuration's sizes make a model that knows places by sines.

    Raises:
        ValueError: ``field=value: must be ...``.
    """
    check_sizes(cfg, "caption_channels", "model_max_length")
    _check_heads(cfg)
    if cfg.hidden_size % 4:
        raise ValueError(
            f"hidden_size={cfg.hidden_size}: must be a multiple of 4, for sines and cosines of rows and columns"
        )


def check_sizes(cfg: Any, *more: str) -> None:
    """That the sizes of a configuration, and ``more`` where it has them, are sizes.

    Raises:
        ValueError: ``field=value: must be ...``.
    """
    for name in ("in_channels", "hidden_size", "num_heads", "depth", *more):
        if getattr(cfg, name, 1) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)}: must be an integer >= 1")
    if len(cfg.patch_size) != 3 or not all(1 <= size <= 64 for size in cfg.patch_size):
        raise ValueError(f"patch_size={tuple(cfg.patch_size)}: must be three integers from 1 to 64, for (t, h, w)")
    if cfg.mlp_ratio <= 0 or cfg.hidden_size * cfg.mlp_ratio < 1:
        raise ValueError(f"mlp_ratio={cfg.mlp_ratio}: must be a number > 0 that leaves hidden units")


def check_rotary_heads(cfg: Any) -> None:
    """That a configuration's heads have channels for each axis that they are rotated along.

    Raises:
        ValueError: ``field=value: must be ...``.
    """
    _check_heads(cfg)
    if len(cfg.axes_dim) != 3 or any(dim <= 0 or dim % 2 for dim in cfg.axes_dim):
        raise ValueError(f"axes_dim={tuple(cfg.axes_dim)}: must be three even numbers > 0, for (t, h, w)")
    if sum(cfg.axes_dim) != cfg.head_dim:
        raise ValueError(
            f"axes_dim={tuple(cfg.axes_dim)}: must be dims whose sum is the head dim, "
            f"hidden_size/num_heads={cfg.head_dim}, not {sum(cfg.axes_dim)}"
        )
    if cfg.theta <= 1:
        raise ValueError(f"theta={cfg.theta}: must be a number > 1")


def _check_heads(cfg: Any) -> None:
    if cfg.hidden_size % cfg.num_heads:
        raise ValueError(f"num_heads={cfg.num_heads}: must be a divisor of hidden_size={cfg.hidden_size}")
