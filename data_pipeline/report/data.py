"""What a report is made of: tables and numbers, wherever they are from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.stages.filter import FilterRule

FINAL = "final"  # columns such as final.height are of a clip's own file


@dataclass(frozen=True)
class Shot:
    """Frames [first, last) of a source: what a picture is wanted of."""

    source: str
    first: int
    last: int


Album = Callable[[Sequence[Shot]], list[bytes | None]]  # a JPEG of each, from about its middle; None: there is none


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A source that ended in an error."""

    source: str
    stage: str
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage took."""

    stage: str
    sources: int
    seconds: float  # of its workers, added up


def no_pictures(shots: Sequence[Shot]) -> list[bytes | None]:
    """An album of a run that took none."""
    return [None] * len(shots)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A run.

    ``clips`` has a row per clip: source, clip_id, first, last, start_s, end_s, height, width, keep, reason,
    rejected_by, and whatever else was measured, under the names that filters use; final.num_frames, final.height,
    final.width and final.fps where clips have files of their own. Rows are in order of source and time.
    """

    clips: pa.Table
    filters: Mapping[str, FilterRule]  # in the order in which they were asked
    sources: int  # videos that were listed
    seconds: float  # of those that could be read
    failures: tuple[Failure, ...] = ()
    work: tuple[Work, ...] = ()
    album: Album = no_pictures
