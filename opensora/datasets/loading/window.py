"""Where in a clip the training window lies, in time and in the picture. Every draw is keyed by the sample."""

from opensora.datasets.plan.counter_rng import integer


def crop_origin(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(top, left) of a centred crop."""
    return (height - target_height) // 2, (width - target_width) // 2


def random_crop_origin(
    height: int, width: int, target_height: int, target_width: int, *, seed: int, epoch: int, sample_id: int
) -> tuple[int, int]:
    """(top, left) of a crop drawn for this sample and epoch."""
    top = integer(sample_id, height - target_height + 1, seed, epoch, "crop top")
    left = integer(sample_id, width - target_width + 1, seed, epoch, "crop left")
    return top, left


def window_start(num_frames: int, frames: int, interval: int, *, seed: int, epoch: int, sample_id: int) -> int:
    """First frame of the window drawn for this sample and epoch, such that all its frames lie in the clip."""
    span = (frames - 1) * interval + 1
    return integer(sample_id, max(1, num_frames - span + 1), seed, epoch, "window")
