"""Writes the shapes data set: files, clip tables and prompt lists.

DIR gets clips/*.mp4 (H.264), images/*.png, two clip tables (train.csv; heldout.csv: combinations that training never
sees, a few clips of each) and two prompt lists for sampling (prompts_train.csv, prompts_heldout.csv: every held-out
combination on every background). All tables carry the columns colour, shape, direction, background.
"""

import argparse
import csv
import os
import re
import signal
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_pipeline.shapes.render import (
    BACKGROUNDS,
    MARGIN,
    RADIUS,
    TRAVEL,
    ClipSpec,
    Layout,
    draw_spec,
    held_out_combinations,
    render,
    training_combinations,
)
from opensora.utils.command_line.arguments import Parser, number, place, whole
from opensora.utils.command_line.command import call, naming
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short
from opensora.utils.files.user_files import try_output, write_whole
from opensora.utils.files.video_writer import write_image, write_video
from opensora.utils.signal_handler import end_with_parent, inherited_by_nobody

TABLE_COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
TRUTH_COLUMNS = ("colour", "shape", "direction", "background")
CRF = 12  # of libx264: tiny saturated shapes suffer from compression more than natural clips do
MAX_FILES, MAX_PROCESSES, MAX_FPS = 10**7, 1024, 1000
LARGEST_SIDE, LONGEST = 4096, 10_000  # pixels, frames: a clip is held in memory while it is drawn
SMALLEST_SIDE = 32  # below, there is no room for a shape that can be told from the others, and for its way


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file to write."""

    path: str  # relative to the data set's folder
    spec: ClipSpec
    fps: float


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """``"32x32,48x32"`` (width x height) -> [(height, width), ...]."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", part.strip())
        if not match:
            raise UserError(f"--sizes: '{short(part, 40)}' is not WIDTHxHEIGHT; write for example 32x32,48x32")
        width, height = int(match[1]), int(match[2])
        if not SMALLEST_SIDE <= min(width, height) <= max(width, height) <= LARGEST_SIDE or width % 2 or height % 2:
            raise UserError(f"--sizes: {part}: both sides must be even, from {SMALLEST_SIDE} to {LARGEST_SIDE}")
        sizes.append((height, width))
    return sizes


def parse_durations(text: str) -> list[int]:
    """``"5,9,17"`` -> [5, 9, 17]; at least 2 frames each."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise UserError(f"--durations: '{short(text, 40)}' is not a list of frame counts; write for example 5,9,17")
    durations = [int(part) for part in parts]
    if min(durations) < 2:
        raise UserError(f"--durations: {min(durations)} is too short for a clip; use 2 or more (stills: --images)")
    if max(durations) > LONGEST:
        raise UserError(f"--durations: {max(durations)}: must be at most {LONGEST} frames")
    return durations


def parse_range(option: str, text: str) -> tuple[float, float]:
    """``"0.2,0.24"`` -> (0.2, 0.24)."""
    match = re.fullmatch(r"([01]?\.[0-9]{1,9}),([01]?\.[0-9]{1,9})", text)
    least, most = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not 0 < least <= most < 1:
        raise UserError(f"{option}: '{text[:40]}' is not a range of shares of the shorter side; write 0.2,0.24")
    return least, most


def parse_layout(args: argparse.Namespace) -> Layout:
    """How large shapes are and where they may move; refused where the smallest frame has no room for that."""
    radius, travel = parse_range("--radius", args.radius), parse_range("--travel", args.travel)
    most = 1 - 2 * MARGIN / SMALLEST_SIDE
    if 2 * radius[1] + travel[1] > most:
        raise UserError(
            f"--radius {args.radius} --travel {args.travel}: the largest shape would leave the frame; "
            f"twice the radius and the travel may be at most {most:.2f} together"
        )
    return Layout(radius=radius, travel=travel, off_centre=args.off_centre)


def plan_items(args: argparse.Namespace) -> dict[str, list[Item]]:
    """Table name -> its items, in table order."""
    sizes, durations, layout = parse_sizes(args.sizes), parse_durations(args.durations), parse_layout(args)
    stills = [combination for combination in training_combinations() if combination[2] == "still"]
    held_out = held_out_combinations()
    train = [
        Item(
            path=f"clips/{i:06d}.mp4",
            spec=draw_spec(args.seed, "clip", i, training_combinations(), sizes, durations, layout),
            fps=args.fps,
        )
        for i in range(args.clips)
    ]
    train += [
        Item(
            path=f"images/still_{i:06d}.png",
            spec=draw_spec(args.seed, "image", i, stills, sizes, [1], layout),
            fps=args.fps,
        )
        for i in range(args.images)
    ]
    kept = [
        Item(
            path=f"clips/heldout_{i:04d}.mp4",
            spec=draw_spec(args.seed, "held out clip", i, held_out, sizes, durations, layout),
            fps=args.fps,
        )
        for i in range(args.heldout * len(held_out))
    ]
    return {"train": train, "heldout": kept}


def write_item(folder: Path, item: Item) -> None:
    """Render and encode one file."""
    frames = render(item.spec)
    with naming(folder / item.path):
        if item.spec.frames == 1:
            write_image(folder / item.path, frames[0])
        else:
            write_video(folder / item.path, frames, item.fps, crf=CRF)


def _write_job(job: tuple[Path, Item]) -> None:
    write_item(*job)


def write_items(folder: Path, items: Sequence[Item], processes: int) -> None:
    """All files, in ``processes`` processes, with a progress bar."""
    jobs = [(folder, item) for item in items]
    with tqdm(total=len(jobs), desc="shapes", unit="file", disable=None) as bar:
        if processes <= 1:
            for job in jobs:
                _write_job(job)
                bar.update()
            return
        others = set(active_children())
        with ProcessPoolExecutor(processes, get_context("spawn"), end_with_parent, (signal.SIGKILL,)) as pool:
            try:
                with inherited_by_nobody():
                    done = pool.map(_write_job, jobs, chunksize=16)
                for _ in done:
                    bar.update()
            except BaseException:
                for process in set(active_children()) - others:  # leaving the block would wait for all jobs
                    process.kill()
                pool.shutdown(cancel_futures=True)
                raise


def table_row(item: Item) -> dict[str, Any]:
    """A clip-table row with its ground truth; a still has no rate."""
    spec = item.spec
    return {
        "path": item.path,
        "text": spec.caption,
        "num_frames": spec.frames,
        "height": spec.height,
        "width": spec.width,
        "aspect_ratio": round(spec.height / spec.width, 6),
        "resolution": spec.height * spec.width,
        "fps": item.fps if spec.frames > 1 else "",
        **spec.truth,
    }


def prompt_rows(combinations: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    """One prompt per combination and background, named after what it asks for."""
    rows = []
    for (colour, shape, direction), background in product(combinations, BACKGROUNDS):
        spec = ClipSpec(
            colour=colour,
            shape=shape,
            direction=direction,
            background=background,
            frames=2,
            height=SMALLEST_SIDE,
            width=SMALLEST_SIDE,
            radius=RADIUS[0],
            x=0.0,
            y=0.0,
            travel=TRAVEL[0],
        )
        name = f"{colour}_{shape}_{direction}_{background}"
        rows.append({"text": spec.caption, "name": name, **spec.truth})
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A table that exists is complete.

    Raises:
        UserError: it cannot be written.
    """

    def write(stream: IO[str]) -> None:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)

    write_whole(path, write)


def write_dataset(args: argparse.Namespace) -> None:
    """Files first, tables last: a folder with train.csv is a complete data set."""
    folder: Path = args.out
    tables = plan_items(args)
    try_output(folder, "--out", folder=True)
    for name in ("clips", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_items(folder, [item for items in tables.values() for item in items], args.processes)
    prompt_columns = ("text", "name", *TRUTH_COLUMNS)
    write_csv(folder / "prompts_train.csv", prompt_columns, prompt_rows(training_combinations()))
    write_csv(folder / "prompts_heldout.csv", prompt_columns, prompt_rows(held_out_combinations()))
    for name in ("heldout", "train"):
        write_csv(folder / f"{name}.csv", (*TABLE_COLUMNS, *TRUTH_COLUMNS), map(table_row, tables[name]))
    kept = f"{len(tables['heldout'])} clips of {len(held_out_combinations())} held-out combinations"
    print(f"{folder}: {args.clips} clips and {args.images} stills in train.csv, {kept} in heldout.csv")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its numbers are checked here."""
    parser = Parser(prog="python -m data_pipeline.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=place, required=True, help="folder to write to")
    parser.add_argument("--clips", type=whole(0, MAX_FILES), default=2000, help="training clips")
    parser.add_argument("--images", type=whole(0, MAX_FILES), default=400, help="training stills")
    parser.add_argument("--heldout", type=whole(0, MAX_FILES), default=4, help="clips of each held-out combination")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    parser.add_argument("--sizes", default="32x32,48x32,32x48", help="WIDTHxHEIGHT, comma-separated")
    parser.add_argument("--durations", default="5,9,17", help="frames per clip, comma-separated")
    share = "a range of shares of the frame's shorter side"
    parser.add_argument("--radius", default=f"{RADIUS[0]},{RADIUS[1]}", help=f"half of a shape's extent: {share}")
    parser.add_argument("--travel", default=f"{TRAVEL[0]},{TRAVEL[1]}", help=f"from first to last frame: {share}")
    parser.add_argument(
        "--off-centre", type=number(0, 1), default=1.0, help="of the room beside a shape: 0 keeps its way in the middle"
    )
    parser.add_argument("--fps", type=number(0, MAX_FPS, above=True), default=8.0)
    parser.add_argument("--processes", type=whole(1, MAX_PROCESSES), default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for a user's mistake."""
    return call(lambda words: write_dataset(parse_arguments(words)), argv)
