"""The columns that filters can ask for: one value per clip, as a stage wrote it or as it follows from such values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_pipeline.quality.camera import NAMES
from data_pipeline.rows import Row
from data_pipeline.stages.base import GlobalStage, Stage
from opensora.config.schema import suggestion

_OF_SOURCES = ("probe", "frames")  # stages with one row per source, which all of its clips share
NUMBERS, TRUTHS, TEXT = "numbers", "true or false", "text"
_VERDICTS = ("keep", "reason", "rejected_by")  # of other stages of filters

# All that a column of text can hold, where that is known: a word that is misspelt in a filter would go unnoticed.
WORDS: Mapping[str, tuple[str, ...]] = {"camera_motion": NAMES, "duplicate_kind": ("exact", "near", "mirrored")}


@dataclass(frozen=True)
class Column:
    """Where the values of a filter's column are from."""

    inputs: tuple[tuple[str, str], ...]  # (stage, column), what ``value`` is made of
    value: Callable[..., Any]
    type: pa.DataType
    position: int  # of its stage among those that measure only what is kept so far; 0: it measures every clip


def same(value: Any) -> Any:
    """A value as it is written."""
    return value


def duration_s(start: float, end: float) -> float:
    """Seconds, without what the subtraction adds to the last digits."""
    return round(end - start, 6)


def short_side(height: int, width: int) -> int:
    """Pixels."""
    return min(height, width)


def pixels(height: int, width: int) -> int:
    """Of a frame."""
    return height * width


def aspect_ratio(height: int, width: int) -> float:
    """Height over width, as in the clip table."""
    return height / width


_SIZE = (("probe", "height"), ("probe", "width"))
DERIVED: Mapping[str, tuple[tuple[tuple[str, str], ...], Callable[..., Any], pa.DataType]] = {
    "duration_s": ((("shots", "start_s"), ("shots", "end_s")), duration_s, pa.float64()),
    "short_side": (_SIZE, short_side, pa.int64()),
    "pixels": (_SIZE, pixels, pa.int64()),
    "aspect_ratio": (_SIZE, aspect_ratio, pa.float64()),
}


def find_column(name: str, stages: Sequence[Stage | GlobalStage], screen: str) -> Column | None:
    """The column called ``name`` or STAGE.name; of several stages that have it, the last one's. None: there is none.

    Args:
        screen: the name of the stage of filters after which stages measure only what is kept.
    """
    if name in DERIVED:
        inputs, value, kind = DERIVED[name]
        present = {(stage.name, column) for stage in stages for column in stage.columns.names}
        return Column(inputs, value, kind, 0) if present.issuperset(inputs) else None
    wanted, _, column = name.rpartition(".")
    names = [stage.name for stage in stages]
    for position, stage in reversed(list(enumerate(stages))):
        if wanted in ("", stage.name) and column in columns_of(stage):
            is_gated = screen in names[:position]
            return Column(((stage.name, column),), same, stage.columns.field(column).type, position if is_gated else 0)
    return None


def unknown_column(name: str, stages: Sequence[Stage | GlobalStage]) -> str:
    """What to say of a column that there is not."""
    names = [*DERIVED, *dict.fromkeys(column for stage in stages for column in columns_of(stage))]
    said = suggestion(name.rpartition(".")[2], names)
    return f"no stage of this run writes it; {said} (a score is a column only where scores names it)"


def columns_of(stage: Stage | GlobalStage) -> list[str]:
    """Those with a single value that can be compared."""
    if set(_VERDICTS) <= set(stage.columns.names):
        return []
    return [field.name for field in stage.columns if kind_of(field.type) is not None]


def kind_of(kind: pa.DataType) -> str | None:
    """In words: numbers, text, true or false; None: nothing that a filter compares."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return NUMBERS
    if pa.types.is_boolean(kind):
        return TRUTHS
    return TEXT if pa.types.is_string(kind) else None


def values_of(column: Column, rows: Mapping[str, Sequence[Row]], clips: int) -> list[Any]:
    """One per clip of a source; None where there is none, or no number."""
    inputs = [_one_per_clip(rows[stage], stage, clips, name) for stage, name in column.inputs]
    values = [None if None in parts else column.value(*parts) for parts in zip(*inputs, strict=True)]
    return [None if isinstance(value, float) and math.isnan(value) else value for value in values]


def _one_per_clip(rows: Sequence[Row], stage: str, clips: int, name: str) -> list[Any]:
    if stage in _OF_SOURCES:
        return [rows[0][name]] * clips
    if not rows:  # of a stage that looks at all sources, and had nothing to say of this one
        return [None] * clips
    assert len(rows) == clips, f"{stage}: {len(rows)} rows for {clips} clips"
    return [row[name] for row in rows]
