"""A caption from what was measured: no model, and the same every time. It says little, and nothing that is wrong."""

from collections.abc import Mapping
from typing import Any

DARK, BRIGHT = 60.0, 180.0  # mean luma of 0 to 255
LITTLE, MUCH = 0.5, 6.0  # of motion_score
_CAMERA = {
    "static": "The camera stands still.",
    "pan left": "The camera pans left.",
    "pan right": "The camera pans right.",
    "tilt up": "The camera tilts up.",
    "tilt down": "The camera tilts down.",
    "zoom in": "The camera zooms in.",
    "zoom out": "The camera zooms out.",
    "roll left": "The camera rolls left.",
    "roll right": "The camera rolls right.",
    "shake": "The camera shakes.",
    "mixed": "The camera moves in several ways.",
}


def template_caption(clip: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """
    Args:
        clip: columns of the stage ``cut``.
        measured: ``luma``, ``camera_motion``, ``motion_score`` of the stage ``measure``; None where unknown.
    """
    seconds = clip["num_frames"] / clip["fps"]
    parts = [f"A {_shape(clip['height'], clip['width'])} video clip of {seconds:.1f} seconds."]
    parts += [_CAMERA[measured["camera_motion"]]] if measured["camera_motion"] in _CAMERA else []
    parts += _motion(measured["motion_score"])
    parts += _light(measured["luma"])
    return " ".join(parts)


def _shape(height: int, width: int) -> str:
    if height == width:
        return "square"
    return "wide" if width > height else "tall"


def _motion(score: float | None) -> list[str]:
    if score is None:
        return []
    words = "Almost nothing moves." if score < LITTLE else "A lot moves." if score >= MUCH else "Some of it moves."
    return [words]


def _light(luma: float | None) -> list[str]:
    if luma is None:
        return []
    return ["The picture is dark."] if luma < DARK else ["The picture is bright."] if luma > BRIGHT else []
