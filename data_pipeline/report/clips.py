"""The clip table as numbers: who was rejected by what, and which clips are worth looking at."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.report.data import FINAL, ReportData
from data_pipeline.stages.filter import FilterRule
from data_pipeline.stages.filter_columns import DERIVED, NUMBERS, kind_of


class Clips:
    """n clips as columns."""

    def __init__(self, data: ReportData) -> None:
        self.table, self.filters = data.clips, data.filters
        self._numbers: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def keep(self) -> np.ndarray:
        """(n,) bool."""
        return self._filled("keep", False)

    @cached_property
    def seconds(self) -> np.ndarray:
        """(n,) how long each is."""
        return self.numbers("duration_s")

    @cached_property
    def rejecting(self) -> tuple[str, ...]:
        """The filters in order, and behind them what else clips are rejected by: an error, no caption."""
        return tuple(dict.fromkeys([*self.filters, *sorted(set(self._rejections[1].tolist()))]))

    @cached_property
    def rejected(self) -> Mapping[str, np.ndarray]:
        """Of ``rejecting``: (n,) bool: whether it rejects the clip, perhaps among others."""
        row, name, _ = self._rejections
        return {wanted: self._mask(row[name == wanted]) for wanted in self.rejecting}

    @cached_property
    def first(self) -> Mapping[str, np.ndarray]:
        """Of ``rejecting``: (n,) bool: whether it is the clip's reason."""
        row, name, place = self._rejections
        return {wanted: self._mask(row[(name == wanted) & (place == 0)]) for wanted in self.rejecting}

    @cached_property
    def rejections(self) -> np.ndarray:
        """(n,) by how many filters."""
        return np.bincount(self._rejections[0], minlength=len(self))

    @cached_property
    def _rejections(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every rejection: (row of the clip, the filter, its place among the clip's own)."""
        lists = self.table["rejected_by"].combine_chunks()
        row = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        name = np.array(pc.list_flatten(lists).to_pylist(), dtype=object)
        start = np.searchsorted(row, row, side="left")
        return row, name, np.arange(len(row)) - start

    def has(self, column: str) -> bool:
        """Whether it is there, and holds something that filters compare."""
        if column in DERIVED:
            return all(name in self.table.column_names for _, name in DERIVED[column][0])
        return column in self.table.column_names and kind_of(self.table[column].type) is not None

    def is_number(self, column: str) -> bool:
        """Of a column that is there."""
        return column in DERIVED or kind_of(self.table[column].type) == NUMBERS

    def numbers(self, column: str) -> np.ndarray:
        """(n,) float64, NaN where there is none; not to be written to."""
        if column not in self._numbers:
            self._numbers[column] = self._derived(column) if column in DERIVED else self._stored(column)
        return self._numbers[column]

    def _derived(self, column: str) -> np.ndarray:
        inputs, value, _ = DERIVED[column]
        parts = [self.numbers(name) for _, name in inputs]
        return np.array([value(*each) for each in zip(*parts, strict=True)], dtype=np.float64)

    def _stored(self, column: str) -> np.ndarray:
        values = pc.cast(self.table[column], pa.float64()).combine_chunks()
        return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float64)

    def final(self, column: str) -> np.ndarray:
        """(n,) of the clip's own file, else of its source; NaN where neither is known."""
        of_source = self.numbers(column) if self.has(column) else np.full(len(self), np.nan)
        if not self.has(f"{FINAL}.{column}"):
            return of_source
        own = self.numbers(f"{FINAL}.{column}")
        return np.where(np.isfinite(own), own, of_source)

    def words(self, column: str) -> list[str | None]:
        """(n,) of a column of text, or of true and false."""
        values = self.table[column].to_pylist()
        return [str(value).lower() if isinstance(value, bool) else value for value in values]

    def _filled(self, column: str, value: bool) -> np.ndarray:
        return np.array(pc.fill_null(self.table[column], value).to_numpy(), dtype=bool)

    def _mask(self, rows: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(self), dtype=bool)
        mask[rows] = True
        return mask


def nearest_misses(clips: Clips, name: str, count: int, seed: int) -> np.ndarray:
    """Rows that a filter rejects: of a range those closest to its threshold, of others drawn ones."""
    rule, rows = clips.filters[name], np.flatnonzero(clips.rejected[name])
    if not rule.has_range or not clips.has(rule.column):
        return _drawn(rows, count, seed, f"{name} rejects")
    distance = _beyond(clips.numbers(rule.column)[rows], rule)
    others = clips.rejections[rows] - 1  # of equally close ones, those that nothing else rejects
    return rows[np.lexsort((rows, others, distance))][:count]


def some_kept(clips: Clips, name: str, count: int, seed: int) -> np.ndarray:
    """Rows that are kept, drawn at random; those of a range in order of the filter's value."""
    rule = clips.filters[name]
    drawn = _drawn(np.flatnonzero(clips.keep), count, seed, f"{name} keeps")
    if not (clips.has(rule.column) and clips.is_number(rule.column)):
        return drawn
    return drawn[np.argsort(clips.numbers(rule.column)[drawn], kind="stable")]


def _beyond(values: np.ndarray, rule: FilterRule) -> np.ndarray:
    """(n,) how far values are outside a range; of one that is not there, infinity."""
    below = rule.min - values if rule.min is not None else np.full(len(values), -np.inf)
    above = values - rule.max if rule.max is not None else np.full(len(values), -np.inf)
    return np.nan_to_num(np.maximum(below, above), nan=np.inf)


def _drawn(rows: np.ndarray, count: int, seed: int, purpose: str) -> np.ndarray:
    """Some of the rows in their order, the same for the same seed."""
    if len(rows) <= count:
        return rows
    from opensora.utils.rng import numpy_generator  # with torch: only where there is something to draw

    generator = numpy_generator("report", seed, purpose)
    return np.sort(generator.choice(rows, count, replace=False))


def column_order(clips: Clips, known: Sequence[str]) -> list[str]:
    """Columns of numbers whose distribution is worth a look: those of filters first, then those of ``known``."""
    names = [rule.column for rule in clips.filters.values()]
    return [name for name in dict.fromkeys([*names, *known]) if clips.has(name) and clips.is_number(name)]
