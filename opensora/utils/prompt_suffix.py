"""The words about frame rate, motion and camera that follow a caption, the same in training and in sampling."""

import math
import re

_ENDS_WITH_RATE = re.compile(r"[0-9]+ FPS\.$")


def with_suffix(text: str, fps: float | None = None, motion: float | None = None, camera: str | None = None) -> str:
    """``"{text} {fps} FPS. {motion} motion score. camera motion: {camera}."``; a part that is unknown (None, NaN, empty
    or <= 0 FPS) is left out."""
    parts = [text]
    if fps is not None and fps > 0:
        parts.append(f"{_number(fps)} FPS.")
    if motion is not None and not math.isnan(motion):
        parts.append(f"{_number(motion)} motion score.")
    if camera:
        parts.append(f"camera motion: {camera}.")
    return " ".join(parts)


def published_suffix(
    text: str, fps: float | None = None, motion: float | None = None, camera: str | None = None
) -> str:
    """What the family's own sampler tells its published weights: ``"{text}. {fps} FPS. {motion} motion score."``; and
    ``camera``, in words of Open-Sora 1.2.

    The prompt is stripped and ends with a dot; one that ends with a frame rate keeps it.
    """
    text = text.strip()
    text = text if text.endswith(".") else f"{text}."
    return with_suffix(text, None if _ENDS_WITH_RATE.search(text) else fps, motion, camera)


def _number(value: float) -> str:
    """Whole numbers from 1 on, as the published prompts write them."""
    return str(int(value + 0.5)) if value >= 1 else f"{value:g}"
