"""Text and marks laid over footage, as people burn them in."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WHITE, BLACK, RED = (255, 255, 255, 255), (0, 0, 0, 255), (230, 40, 40, 255)
SHINE = (255, 255, 255, 110)  # one looks through it


def _font(height: int, share: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(8, round(share * height)))


def _subtitle(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    text, font = "I never thought we would get here.", _font(height, 0.055)
    left, _, right, _ = draw.textbbox((0, 0), text, font=font)
    place = ((width - right + left) / 2, 0.88 * height)
    draw.text(place, text, font=font, fill=WHITE, stroke_width=2, stroke_fill=BLACK)


def _title(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    draw.text((0.1 * width, 0.4 * height), "THE LONG ROAD", font=_font(height, 0.12), fill=WHITE)


def _channel(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    draw.text((0.8 * width, 0.05 * height), "ACME TV", font=_font(height, 0.045), fill=WHITE)


def _watermark(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    draw.text((0.25 * width, 0.45 * height), "stockvideo.com", font=_font(height, 0.09), fill=SHINE)


def _clock(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    draw.rectangle((0.02 * width, 0.02 * height, 0.4 * width, 0.09 * height), fill=BLACK)
    draw.text((0.03 * width, 0.03 * height), "2024-05-17 13:45:02", font=_font(height, 0.045), fill=WHITE)


def _mark(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    x, y, r = 0.9 * width, 0.1 * height, 0.05 * height
    draw.ellipse((x - r, y - r, x + r, y + r), fill=RED)
    draw.polygon([(x - r / 2, y + r / 2), (x, y - r / 2), (x + r / 2, y + r / 2)], fill=WHITE)


def _ghost(draw: ImageDraw.ImageDraw, height: int, width: int) -> None:
    x, y, r, line = 0.9 * width, 0.88 * height, 0.06 * height, max(2, round(0.012 * height))
    draw.ellipse((x - r, y - r, x + r, y + r), outline=SHINE, width=line)
    draw.line((x - r, y, x + r, y), fill=SHINE, width=line)


OVERLAYS: Mapping[str, Callable[[ImageDraw.ImageDraw, int, int], None]] = {
    "subtitle": _subtitle,
    "title": _title,
    "channel": _channel,
    "watermark": _watermark,
    "clock": _clock,
    "mark": _mark,
    "ghost": _ghost,
}
TEXTS = ("subtitle", "title", "channel", "watermark", "clock")  # the others have no letters


def laid_over(frames: np.ndarray, overlay: str) -> np.ndarray:
    """(n, h, w, 3) uint8 RGB with it in each frame; "clean": without any."""
    if overlay == "clean":
        return frames
    height, width = frames.shape[1:3]
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    OVERLAYS[overlay](ImageDraw.Draw(picture), height, width)
    layer = np.asarray(picture).astype(np.float32)
    solid = layer[..., 3:] / 255
    return (frames * (1 - solid) + layer[..., :3] * solid).round().astype(np.uint8)
