"""Text and marks that are planted in real footage, and what the data pipeline says of it: a confusion table.

    python -m benchmarks.planted_text [--media DIR] [--footage 28]

Rows are what is laid over each piece of footage (tests/planted_text.py), columns how many of them the stage ``text``
finds by text that it can read, by marks that never move, and of how many it cannot tell the latter. A piece counts as
found where the default filter of ``text_share`` turns it away, or where there is a mark. Prints one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.limits import SourceLimits
from data_pipeline.rows import Row
from data_pipeline.stages.base import Unit
from data_pipeline.stages.filter import DEFAULT_FILTERS
from data_pipeline.stages.text import TextConfig, TextStage
from opensora.utils.files.video_writer import write_video
from tests.copies import Pile, footage
from tests.planted_text import OVERLAYS, laid_over
from tests.shot_set import REAL


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--media", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "media")
    parser.add_argument("--footage", type=int, default=28, help="pieces of it")
    args = parser.parse_args(argv)
    print(json.dumps({"benchmark": "planted_text", **text_table(args.media, args.footage)}))
    return 0


def text_table(media: Path, count: int) -> dict[str, Any]:
    """What is planted -> how many of the pieces are found. Prints a table."""
    # titles burned into footage of a rocket are no clean footage
    ranges = [each for half in REAL.values() for each in half if not each[0].startswith("rocket")][:count]
    pieces = [footage(media / "clips" / name, first, end) for name, first, end in ranges]
    print(f"{'planted':<12}{'pieces':>7}{'text':>6}{'mark':>6}{'unknown':>9}{'share of text':>15}{'s a clip':>10}")
    with tempfile.TemporaryDirectory() as folder:
        return {overlay: one_overlay(Path(folder), pieces, overlay) for overlay in ("clean", *OVERLAYS)}


def one_overlay(folder: Path, pieces: Sequence[tuple[np.ndarray, float]], overlay: str) -> dict[str, Any]:
    rows, seconds = list[Row](), 0.0
    for frames, fps in pieces:
        path = write_video(folder / "clip.mp4", laid_over(frames, overlay), fps, crf=23)
        row, took = of_file(path)
        rows.append(row)
        seconds += took
    objection = DEFAULT_FILTERS["text"].objection
    found = {
        "pieces": len(rows),
        "text": sum(objection(row["text_share"]) is not None for row in rows),
        "mark": sum(bool(row["logo_share"]) for row in rows),
        "unknown": sum(row["logo_share"] is None for row in rows),
    }
    share = statistics.median(row["text_share"] for row in rows)
    print(f"{overlay:<12}{found['pieces']:>7}{found['text']:>6}{found['mark']:>6}{found['unknown']:>9}", end="")
    print(f"{share:>15.4f}{seconds / len(rows):>10.2f}")
    return found | {"median_share": share, "seconds": seconds / len(rows)}


_STAGE = TextStage(TextConfig(), SourceLimits())


def of_file(path: Path) -> tuple[Row, float]:
    """(the row of a file that is one clip, seconds of the processor that it took)."""
    pile = Pile()
    pile.add("clip", path)
    rows = pile.rows["clip"]
    rows["duplicates"] = [{"duplicate_of": None} for _ in rows["shots"]]
    unit = Unit(source="clip", file=str(path))
    begin = time.process_time()
    (row,) = _STAGE.run(replace(unit, rows=rows))
    return {column: row.get(column) for column in TextStage.columns.names}, time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
