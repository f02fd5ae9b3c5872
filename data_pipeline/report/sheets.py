"""Contact sheets: clips that a filter nearly let pass, clips that were kept, and duplicates side by side."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.report.amounts import clock, length, number
from data_pipeline.report.clips import Clips
from data_pipeline.report.data import Album, Shot
from data_pipeline.report.markup import escape, figure

_KINDS = ("exact", "near", "mirrored")


class Sheets:
    """Pictures of rows of the clip table, which are asked for all at once."""

    def __init__(self, clips: Clips, album: Album, rows: Sequence[int]) -> None:
        """``rows``: all that any sheet will show."""
        self._clips = clips
        self._row = {row: self._read(row) for row in sorted({int(row) for row in rows})}
        shots = [Shot(row["source"], row["first"], row["last"]) for row in self._row.values()]
        self._jpeg = dict(zip(self._row, album(shots), strict=True))

    def _read(self, row: int) -> dict[str, Any]:
        return {
            name: self._clips.table[name][row].as_py()
            for name in ("source", "clip_id", "first", "last", "start_s", "reason")
        }

    def sheet(self, rows: np.ndarray, column: str, kind: str = "") -> str:
        """A grid of clips, each with its value of a column."""
        shown = [self._figure(int(row), self._value(int(row), column), kind) for row in rows]
        return f'<div class="sheet">{"".join(shown)}</div>'

    def pair(self, kept: int, other: int, said: str) -> str:
        """Two clips of which one was taken for a copy of the other."""
        both = self._figure(kept, "kept", "") + self._figure(other, "duplicate", "miss")
        return f'<div class="card pair"><p><small>{escape(said)}</small></p>{both}</div>'

    def _figure(self, row: int, title: str, kind: str) -> str:
        of_row = self._row[row]
        name = PurePosixPath(of_row["source"]).name
        place = f"{of_row['source']} at {clock(of_row['start_s'])}, {length(self._clips.seconds[row])}"
        about = f"{place}; {of_row['reason'] or 'kept'}"
        return figure(self._jpeg[row], title, f"{clock(of_row['start_s'])} {name}", about=about, kind=kind)

    def _value(self, row: int, column: str) -> str:
        clips = self._clips
        if not clips.has(column):
            return "not there"
        if clips.is_number(column):
            value = clips.numbers(column)[row]
            return number(float(value)) if np.isfinite(value) else "not measured"
        return clips.words(column)[row] or "none"


def duplicate_pairs(clips: Clips, most: int) -> list[tuple[int, int, str]]:
    """(row that is kept in its place, row of the duplicate, what is said of them): the least alike first."""
    if "duplicate_of" not in clips.table.column_names:
        return []
    row_of = {clip_id: row for row, clip_id in enumerate(clips.table["clip_id"].to_pylist())}
    copies = clips.table["duplicate_of"].to_pylist()
    found = [(row_of[of], row) for row, of in enumerate(copies) if of in row_of]
    distance = clips.numbers("duplicate_distance") if clips.has("duplicate_distance") else np.full(len(clips), np.nan)
    kinds = clips.words("duplicate_kind") if clips.has("duplicate_kind") else [None] * len(clips)
    found.sort(key=lambda pair: (-np.nan_to_num(distance[pair[1]]), pair[1]))
    return [(kept, row, _said(kinds[row], float(distance[row]))) for kept, row in found[:most]]


def _said(kind: str | None, distance: float) -> str:
    words = kind or "duplicate"
    return f"{words}, distance {number(distance)}" if np.isfinite(distance) and kind != "exact" else words


def count_duplicates(clips: Clips) -> dict[str, int]:
    """Kind -> how many, those that there are."""
    if not clips.has("duplicate_kind"):
        return {}
    words = clips.words("duplicate_kind")
    return {kind: words.count(kind) for kind in _KINDS if kind in words}
