"""duplicates: clips that show the same footage, among those of all sources that are kept so far; the best one of each
group stays.

Exact ones have one id: the same range of equal files. Near ones (other size, codec, bars, crop, or cut elsewhere) are
found by hashes and confirmed on thumbnails, as are mirrored ones, which are said to be so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.matching.candidates import MIRRORED, find_candidates
from data_pipeline.matching.clip_list import ClipList
from data_pipeline.matching.compare import Comparison
from data_pipeline.matching.groups import Groups
from data_pipeline.rows import Row
from data_pipeline.stages.base import RowsOf
from opensora.utils.limits import Limits

_AT_ONCE = 20_000  # pairs whose thumbnails are in memory

Edges = dict[int, dict[int, float]]  # clip -> clips that it was found to be like -> distance


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """When two clips show the same."""

    near: bool = True  # false: only exact ones
    distance: float = 4.0  # bits of 64, the mean of up to 8 frames
    unexplained: float = 0.25  # what is left of the changes over time: 0 the same moments, 1 others of the same place
    overlap: float = 0.8  # the least share of the longer clip that both show

    LIMITS: ClassVar[Limits] = {
        "distance": (32.0, "that is the mean of any two pictures"),
        "unexplained": (1.0, "other moments of the same place have no more"),
        "overlap": (1.0, "it is a share"),
    }

    def __post_init__(self) -> None:
        for name in ("distance", "unexplained"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number >= 0")
        if self.overlap < 0.5:
            raise ValueError(f"overlap={self.overlap}: must be a share from 0.5 to 1; what shares less are two clips")


class DuplicatesStage:
    """One row per clip. See ``GlobalStage``."""

    name: ClassVar[str] = "duplicates"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "probe": ("bytes", "num_frames", "height", "width"),
        "frames": (),  # hash_thumb, of the clips that are compared
        "shots": ("clip_id", "start_s", "end_s", "num_frames"),
        "measure": ("picture_share", "bar_top", "bar_bottom", "bar_left", "bar_right"),
        "screen": ("keep",),
        "prints": ("print_sample", "print_ms", "print_bits", "print_asked", "print_crops"),
    }
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("duplicate_of", pa.string()),  # id of the clip that is kept of its group; null: none, or not looked at
            ("duplicate_kind", pa.string()),  # exact, near, mirrored
            ("duplicate_distance", pa.float64()),  # bits of 64: to the one that is kept, or to the nearest of the group
        ]
    )

    def __init__(self, config: DuplicatesConfig, limits: SourceLimits) -> None:
        self.config, self._limits = config, limits

    def run_all(self, tables: Mapping[str, pa.Table], rows_of: RowsOf) -> pa.Table:
        """See ``GlobalStage``."""
        clips, groups, edges = ClipList(tables), Groups[int](), Edges()
        for clip in clips.kept:
            groups.join(clips.first_of(clip), clip, mirrored=False)
        for one, two, mirrored, distance in self._near(clips, rows_of) if self.config.near else ():
            groups.join(one, two, mirrored=mirrored)
            edges.setdefault(one, {})[two] = edges.setdefault(two, {})[one] = distance
        rows: list[Row] = [{} for _ in range(len(clips))]
        for members in groups.of(clips.kept).values():
            best = min(members, key=clips.rank)
            for member in members:
                if member != best:
                    rows[member] = _row(clips, groups, edges, member, best)
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in self.columns]
        names = pa.array(clips.source, pa.string())
        return pa.table([names, *columns], names=["source", *self.columns.names])

    def _near(self, clips: ClipList, rows_of: RowsOf) -> Iterator[tuple[int, int, bool, float]]:
        """(clip, clip, mirrored, distance) of confirmed pairs, the likeliest first. What follows from others is not
        confirmed once more."""
        prints, known = clips.prints(), Groups[int]()
        found = find_candidates(prints, overlap=self.config.overlap)
        for first in range(0, len(found.clip), _AT_ONCE):
            some = found.at(slice(first, first + _AT_ONCE))
            comparison = Comparison(clips, prints, some, rows_of)
            for number in range(len(some.clip)):
                one, two = (clips.unique[pair[number]] for pair in (some.clip, some.other))
                if known.find(one)[0] == known.find(two)[0]:
                    continue
                like = comparison.likeness(number)
                if like is None or like.unexplained > self.config.unexplained:
                    continue
                distance = min(like.distance, float(some.distance[number]))
                if distance <= self.config.distance:
                    known.join(one, two, mirrored=False)
                    yield one, two, bool(some.kind[number] == MIRRORED), distance


def _row(clips: ClipList, groups: Groups[int], edges: Edges, member: int, best: int) -> Row:
    """Of a clip that is not the best one of its group."""
    row: Row = {"duplicate_of": clips.ids[best], "duplicate_kind": "exact", "duplicate_distance": 0.0}
    if clips.ids[member] == clips.ids[best]:
        return row
    own, mirrored = edges[clips.first_of(member)], groups.find(member)[1] != groups.find(best)[1]
    distance = own.get(clips.first_of(best), min(own.values()))
    return row | {"duplicate_kind": "mirrored" if mirrored else "near", "duplicate_distance": distance}
