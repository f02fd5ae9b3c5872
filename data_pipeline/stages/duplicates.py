"""duplicates: clips that show the same footage, among those of all sources that are kept so far; the best one of each
group stays.

Exact ones have one id: the same range of equal files. Near ones (other size, codec, bars, crop, or cut elsewhere) are
found by hashes and confirmed on thumbnails, as are mirrored ones, which are said to be so. What a camera that stands
shows at other times are other clips: what moves in both must move alike.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.limits import SourceLimits
from data_pipeline.matching.align import Likeness
from data_pipeline.matching.candidates import MIRRORED, Candidates, Prints, find_candidates
from data_pipeline.matching.clip_list import ClipList
from data_pipeline.matching.compare import Motion, MotionComparison, PictureComparison
from data_pipeline.matching.groups import Groups
from data_pipeline.rows import Row
from data_pipeline.stages.base import RowsOf
from opensora.utils.limits import Limits

_AT_ONCE, _MOTION_AT_ONCE = 20_000, 1_000  # pairs whose thumbnails are in memory
_WITHIN = 0.5  # of the motion of each clip must be in what both show
_OF_ONE_FILE = 0.5  # of what may be left, of two parts of one

Edges = dict[int, dict[int, float]]  # clip -> clips that it was found to be like -> distance


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """When two clips show the same."""

    near: bool = True  # false: only exact ones
    distance: float = 4.0  # bits of 64, the mean of up to 8 frames
    unexplained: float = 0.2  # what is left of the changes over time: 0 the same moments, 1 others of the same place
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
    version: ClassVar[int] = 2
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
        for some, alike in self._alike(clips, prints, found, rows_of):
            pairs = [(clips.unique[one], clips.unique[two]) for one, two in zip(some.clip, some.other, strict=True)]
            new = [number for number, (one, two) in enumerate(pairs) if known.find(one)[0] != known.find(two)[0]]
            alike = [alike[number] for number in new]
            comparison = MotionComparison(clips, prints, some.at(np.array(new, np.int64)), alike, rows_of)
            for place, number in enumerate(new):
                one, two = pairs[number]
                if known.find(one)[0] == known.find(two)[0]:
                    continue
                of_one_file = clips.source[one] == clips.source[two]
                if self._same_moments(alike[place], comparison.motion(place), of_one_file):
                    known.join(one, two, mirrored=False)
                    distance = min(alike[place].distance, float(some.distance[number]))
                    yield one, two, bool(some.kind[number] == MIRRORED), distance

    def _alike(
        self, clips: ClipList, prints: Prints, found: Candidates, rows_of: RowsOf
    ) -> Iterator[tuple[Candidates, list[Likeness]]]:
        """Those whose pictures are alike, some at once, and how they lie over one another."""
        for first in range(0, len(found.clip), _AT_ONCE):
            some = found.at(slice(first, first + _AT_ONCE))
            comparison = PictureComparison(clips, prints, some, rows_of)
            alike = {number: self._of_pictures(comparison, some, number) for number in range(len(some.clip))}
            right = [(number, like) for number, like in alike.items() if like is not None]
            for begin in range(0, len(right), _MOTION_AT_ONCE):
                numbers, likenesses = zip(*right[begin : begin + _MOTION_AT_ONCE], strict=True)
                yield some.at(np.array(numbers)), list(likenesses)

    def _of_pictures(self, comparison: PictureComparison, pairs: Candidates, number: int) -> Likeness | None:
        like = comparison.likeness(number)
        if like is None or min(like.distance, float(pairs.distance[number])) > self.config.distance:
            return None
        return like

    def _same_moments(self, like: Likeness, motion: Motion, of_one_file: bool) -> bool:
        """Whether what moves in both moves alike. Where nothing does, the pictures decide; but two parts of one file
        are other moments unless there is more to say that they are not."""
        if motion.within < _WITHIN or (motion.unexplained is None and of_one_file):
            return False
        left = like.unexplained if motion.unexplained is None else motion.unexplained
        return left <= self.config.unexplained * (_OF_ONE_FILE if of_one_file else 1.0)


def _row(clips: ClipList, groups: Groups[int], edges: Edges, member: int, best: int) -> Row:
    """Of a clip that is not the best one of its group."""
    row: Row = {"duplicate_of": clips.ids[best], "duplicate_kind": "exact", "duplicate_distance": 0.0}
    if clips.ids[member] == clips.ids[best]:
        return row
    own, mirrored = edges[clips.first_of(member)], groups.find(member)[1] != groups.find(best)[1]
    distance = own.get(clips.first_of(best), min(own.values()))
    return row | {"duplicate_kind": "mirrored" if mirrored else "near", "duplicate_distance": distance}
