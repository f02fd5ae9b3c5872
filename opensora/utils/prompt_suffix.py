"""The words about frame rate and motion that follow a caption, the same in training and in sampling."""

import math


def with_suffix(text: str, fps: float | None = None, motion: float | None = None) -> str:
    """``"{text} {fps} FPS. {motion} motion score."``; a part that is unknown (None, NaN or <= 0 FPS) is left out."""
    parts = [text]
    if fps is not None and fps > 0:
        parts.append(f"{_number(fps)} FPS.")
    if motion is not None and not math.isnan(motion):
        parts.append(f"{_number(motion)} motion score.")
    return " ".join(parts)


def _number(value: float) -> str:
    """Whole numbers from 1 on, as the published prompts write them."""
    return str(int(value + 0.5)) if value >= 1 else f"{value:g}"
