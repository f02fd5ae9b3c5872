"""The clips of all sources in one list, as the search for duplicates sees them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.matching.box import ASKED, CROPS, Bars
from data_pipeline.matching.candidates import Prints

_PER_CLIP = ("shots", "measure", "screen", "prints")  # stages that write one row per clip


class ClipList:
    """Clips by number, in order of source and time; those of sources that failed in one of the stages are not there."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        there = [set(pc.unique(tables[name]["source"]).to_pylist()) for name in _PER_CLIP]
        sources = pa.array(sorted(set.intersection(*there)), pa.string())
        rows = {name: table.filter(pc.is_in(table["source"], sources)) for name, table in tables.items()}
        assert len({rows[name].num_rows for name in _PER_CLIP}) == 1, "stages of clips write a row for each"
        self.source: list[str] = rows["shots"]["source"].to_pylist()
        self.ids: list[str] = rows["shots"]["clip_id"].to_pylist()
        self.kept: list[int] = np.flatnonzero(_numbers(rows["screen"]["keep"])).tolist()
        self._rows = rows
        self._worth = self._bits_times_pixels().tolist()
        self._first: dict[str, int] = {}
        for clip in self.kept:
            self._first.setdefault(self.ids[clip], clip)
        self.unique = list(self._first.values())  # kept ones, one of each id: what is compared

    def __len__(self) -> int:
        return len(self.ids)

    def rank(self, clip: int) -> tuple[float, int]:
        """The best one has the smallest: the most bits times pixels, then the first by name and start."""
        return -self._worth[clip], clip

    def first_of(self, clip: int) -> int:
        """The clip that was compared in place of this one: it has the same id."""
        return self._first[self.ids[clip]]

    def bars(self) -> list[Bars]:
        """Of ``unique`` clips."""
        sides = [_numbers(self._rows["measure"][f"bar_{side}"]) for side in ("top", "bottom", "left", "right")]
        return [(float(t), float(b), float(le), float(r)) for t, b, le, r in np.stack(sides, axis=1)[self.unique]]

    def sources(self) -> list[str]:
        """Of ``unique`` clips."""
        return [self.source[clip] for clip in self.unique]

    def samples(self) -> np.ndarray:
        """Of each hash of ``prints``: number among the sampled frames of its source."""
        return self._list("print_sample")[1]

    def prints(self) -> Prints:
        """Of ``unique`` clips."""
        first, ms = self._list("print_ms")
        begins, numbers = self._list("print_asked")
        crops = self._list("print_crops")[1].reshape(-1, len(CROPS))
        shape = (len(self.unique), ASKED)
        clip = np.repeat(np.arange(len(self.unique)), np.diff(begins))
        slot = np.arange(len(numbers)) - begins[clip]
        asked, cropped = np.full(shape, -1), np.zeros((*shape, len(CROPS)), np.uint64)
        asked[clip, slot], cropped[clip, slot] = numbers + first[clip], crops
        length = _numbers(self._rows["shots"]["end_s"]) - _numbers(self._rows["shots"]["start_s"])
        length_ms = np.rint(1000 * length[self.unique]).astype(np.int64)
        return Prints(first, ms.astype(np.int64), self._list("print_bits")[1], asked, cropped, length_ms)

    def _list(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(where the values of each clip begin, and the end; all values) of ``unique`` clips."""
        chosen = self._rows["prints"][column].combine_chunks().take(pa.array(self.unique, pa.int64()))
        lengths = _numbers(pc.list_value_length(chosen)).astype(np.int64)
        return np.concatenate([[0], np.cumsum(lengths)]), chosen.flatten().to_numpy(zero_copy_only=False)

    def _bits_times_pixels(self) -> np.ndarray:
        """Of each clip: its share of the bits of its file, and the pixels of the picture inside the bars."""
        probe, shots = self._rows["probe"], self._rows["shots"]
        row = pc.index_in(shots["source"], probe["source"].combine_chunks())
        of_file: dict[str, Any] = {name: _numbers(pc.take(probe[name], row)) for name in probe.column_names[1:]}
        share = _numbers(shots["num_frames"]) / np.maximum(of_file["num_frames"], 1)
        pixels = of_file["height"].astype(float) * of_file["width"] * _numbers(self._rows["measure"]["picture_share"])
        found: np.ndarray = 8.0 * of_file["bytes"] * share * pixels
        return found


def _numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Null is 0."""
    kind = column.type
    filled = pc.fill_null(column, False if pa.types.is_boolean(kind) else 0)
    values: np.ndarray = np.asarray(filled)
    return values
