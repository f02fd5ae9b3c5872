"""Columns like those of a scraped video collection, for benchmarks of the index and the plan."""

import numpy as np

_SIZES = ((640, 360), (854, 480), (1280, 720), (1920, 1080), (3840, 2160))
_SIZE_SHARES = (0.10, 0.20, 0.30, 0.30, 0.10)
_RATIOS = (16 / 9, 9 / 16, 4 / 3, 1.0, 2.39, 1.85)
_RATIO_SHARES = (0.60, 0.15, 0.10, 0.05, 0.05, 0.05)
_RATES = (23.976, 24.0, 25.0, 29.97, 30.0, 60.0)
_RATE_SHARES = (0.15, 0.20, 0.15, 0.25, 0.20, 0.05)
_IMAGES = 0.20
_MEDIAN_S, _SIGMA = 6.0, 0.8  # lognormal durations: 2.5 % below 1.2 s, 2.5 % above 29 s


def clip_columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    """num_frames, height, width, fps and motion_score of random clips, a fifth of them images."""
    rng = np.random.default_rng(seed)
    image = rng.random(rows) < _IMAGES
    fps = np.array(_RATES)[rng.choice(len(_RATES), rows, p=_RATE_SHARES)]
    seconds = rng.lognormal(np.log(_MEDIAN_S), _SIGMA, rows)
    area = np.array([w * h for w, h in _SIZES])[rng.choice(len(_SIZES), rows, p=_SIZE_SHARES)]
    ratio = np.array(_RATIOS)[rng.choice(len(_RATIOS), rows, p=_RATIO_SHARES)]
    height = np.sqrt(area / ratio)
    return {
        "num_frames": np.where(image, 1, np.maximum(2, seconds * fps)).astype(np.int32),
        "height": np.rint(height).astype(np.uint16),
        "width": np.rint(height * ratio).astype(np.uint16),
        "fps": np.where(image, np.nan, fps),
        "motion_score": np.where(image, np.nan, rng.gamma(2.0, 2.0, rows)).astype(np.float32),
    }
