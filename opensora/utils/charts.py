"""Pictures for people: frames of videos on one sheet, the loss over time, how many samples each bucket has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opensora.utils.files.untrusted import NUMBER
from opensora.utils.metrics_log import VALIDATED, read_metrics

MARGIN = 8  # pixels around and between frames
TITLE_HEIGHT = 22
PANELS = ("held-out clips by time, 0 (data) to 1 (noise)", "held-out clips by bucket")
MIN_WIDTH = 480  # of the sheet, so that titles can be read
FRAME_WIDTH, FRAME_COLOUR = 4, "darkorange"  # around references


def contact_sheet(
    videos: Sequence[tuple[str, np.ndarray]],
    path: str | Path,
    *,
    columns: int = 8,
    frame_height: int = 96,
    references: Sequence[Sequence[np.ndarray]] = (),
) -> None:
    """A png with one row per video: its title above ``columns`` evenly spaced frames, the first and last among them.

    Args:
        videos: (title, frames uint8 (T, H, W, 3)); sizes and lengths may differ, a still has T = 1.
        frame_height: pixels; frames are resized to it, keeping their shape.
        references: of every video what it was made from, each uint8 (H, W, 3); they stand to its left, framed. Empty:
            no video has any, and there is no column for them.

    Raises:
        ValueError: no videos, frames that are not uint8 THWC, or not as many lists of references as videos.
    """
    if not videos:
        raise ValueError("videos=[]: a contact sheet needs at least one")
    if references and len(references) != len(videos):
        raise ValueError(f"references: {len(references)} lists, must be one for each of {len(videos)} videos")
    strips = [(title, _strip(frames, columns, frame_height)) for title, frames in videos]
    framed = [[_framed(one, frame_height) for one in given] for given in references or [()] * len(videos)]
    indent = max(sum(image.width + MARGIN for image in images) for images in framed)
    rows = [(title, _behind(images, strip, indent)) for (title, strip), images in zip(strips, framed, strict=True)]
    width = max(MIN_WIDTH, max(strip.width for _, strip in rows) + 2 * MARGIN)
    row_height = TITLE_HEIGHT + frame_height + MARGIN
    sheet = Image.new("RGB", (width, MARGIN + row_height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, (title, strip) in enumerate(rows):
        top = MARGIN + index * row_height
        draw.text((MARGIN, top), _fitting(title, font, width - 2 * MARGIN), fill="black", font=font)
        sheet.paste(strip, (MARGIN, top + TITLE_HEIGHT))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def loss_curve(metrics_jsonl: str | Path, path: str | Path) -> None:
    """A png of the loss over steps, with its running mean; resumes and interruptions are marked.

    Where the run has validated, the loss on held-out clips is beside it, by part of the time and by bucket.

    Raises:
        ValueError: the file holds no loss yet.
    """
    records, events = read_metrics(metrics_jsonl)
    points = [(record["step"], record["loss"]) for record in records if NUMBER.test(record.get("loss"))]
    if not points:
        raise ValueError(f"{metrics_jsonl}: holds no loss; train at least log_every steps")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = np.array([step for step, _ in points]), np.array([loss for _, loss in points])
    validated = validation_curves(events)
    figure = Figure(figsize=(8, 4.5 * (1 + len(validated[1:]))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *panels = figure.subplots(1 + len(validated[1:]), sharex=True, squeeze=False).flatten()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss")
    axes.plot(steps, running_mean(losses), color="tab:blue", linewidth=2, label="running mean")
    for curves in validated[:1]:
        for name, (at, values) in curves.items():
            axes.plot(at, values, color="tab:orange", marker="o", markersize=3, label=name)
    for panel, title, curves in zip(panels, PANELS[: len(panels)], validated[1:], strict=True):
        for number, (name, (at, values)) in enumerate(curves.items()):
            panel.plot(at, values, color=f"C{number}", marker="o", markersize=3, label=name)
        panel.set_title(title, fontsize=10)
    _mark(axes, [event for event in events if event["event"] != VALIDATED])
    for panel in (axes, *panels):
        panel.set_ylabel("loss")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, ncols=2)
    (panels or [axes])[-1].set_xlabel("step")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def validation_curves(events: Sequence[dict[str, Any]]) -> list[dict[str, tuple[list[int], list[float]]]]:
    """Name -> (steps, losses) of rounds of validation: the whole, by part of the time, by bucket; [] without any."""
    rounds = [event for event in events if event["event"] == VALIDATED and NUMBER.test(event.get("validate/loss"))]
    if not rounds:
        return []

    def curves(prefix: str) -> dict[str, tuple[list[int], list[float]]]:
        names = dict.fromkeys(name for event in rounds for name in event if name.startswith(prefix))
        found = {}
        for name in names:
            points = [(event["step"], event[name]) for event in rounds if NUMBER.test(event.get(name))]
            found[name.removeprefix(prefix)] = ([at for at, _ in points], [value for _, value in points])
        return found

    whole = {"held-out clips": next(iter(curves("validate/loss").values()))}
    return [whole, curves("validate/bin/"), curves("validate/bucket/")]


def bucket_chart(bars: Sequence[tuple[str, Sequence[int]]], path: str | Path, *, title: str) -> None:
    """A png of (name, counts) as stacked bars: one part per bucket, one bar per resolution and length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.5 + 0.22 * len(bars)), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, counts) in enumerate(bars):
        bottoms = np.cumsum([0, *counts[:-1]])
        axes.bar(
            np.full(len(counts), place), counts, bottom=bottoms, color="tab:blue", edgecolor="white", linewidth=0.4
        )
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], rotation=90, fontsize=7)
    axes.set_ylabel("samples per epoch")
    axes.set_title(title, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def running_mean(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
    """Exponential mean of (n,) values, without the pull towards zero at the start."""
    mean, weight, out = 0.0, 0.0, np.empty(len(values))
    for i, value in enumerate(values):
        mean = decay * mean + (1 - decay) * float(value)
        weight = decay * weight + (1 - decay)
        out[i] = mean / weight
    return out


def _mark(axes: Any, events: list[dict[str, Any]]) -> None:
    """A vertical line per event, each kind once in the legend."""
    colours = {"interrupted": "tab:red", "resumed": "tab:green"}
    labelled: set[str] = set()
    for event in events:
        name = event["event"]
        axes.axvline(
            event["step"],
            color=colours.get(name, "tab:gray"),
            linestyle="--" if name == "interrupted" else ":",
            linewidth=1.5,
            label=None if name in labelled else name,
        )
        labelled.add(name)


def _strip(frames: np.ndarray, columns: int, frame_height: int) -> Image.Image:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: must be uint8 (T, H, W, 3), T >= 1")
    count = min(columns, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    width = max(1, round(frame_height * frames.shape[2] / frames.shape[1]))
    strip = Image.new("RGB", (count * (width + MARGIN) - MARGIN, frame_height), "white")
    for column, index in enumerate(chosen):
        frame = Image.fromarray(np.ascontiguousarray(frames[index]))
        # small synthetic frames stay crisp when they are enlarged
        method = Image.Resampling.NEAREST if frame.height < frame_height else Image.Resampling.LANCZOS
        strip.paste(frame.resize((width, frame_height), method), (column * (width + MARGIN), 0))
    return strip


def _framed(reference: np.ndarray, frame_height: int) -> Image.Image:
    """A reference at the height of the frames, with a border that tells it from them."""
    image = _strip(reference[None], 1, frame_height)
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=FRAME_COLOUR, width=FRAME_WIDTH)
    return image


def _behind(references: Sequence[Image.Image], strip: Image.Image, indent: int) -> Image.Image:
    """A strip that begins ``indent`` pixels to the right, so that all of a sheet do, with references before it."""
    if not indent:
        return strip
    wide = Image.new("RGB", (indent + strip.width, strip.height), "white")
    left = 0
    for image in references:
        wide.paste(image, (left, 0))
        left += image.width + MARGIN
    wide.paste(strip, (indent, 0))
    return wide


def _fitting(title: str, font: Any, width: int) -> str:
    """The title, cut so that it fits into ``width`` pixels, in time that does not grow with a long title."""
    title = " ".join(title.lstrip()[: 4 * width].split())  # few characters are narrower than a pixel
    shown = title[:width]
    if shown == title and font.getlength(title) <= width:
        return title
    low, high = 0, len(shown)
    while low < high:
        middle = (low + high + 1) // 2
        fits = font.getlength(f"{shown[:middle]}...") <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return f"{shown[:low].rstrip()}..."
