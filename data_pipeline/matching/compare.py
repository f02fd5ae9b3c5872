"""Candidates compared on their thumbnails, of which only those are read that are looked at."""

import itertools

import numpy as np

from data_pipeline.analysis.hashes import SIDE, WHOLE_SIDE, thumbnails
from data_pipeline.matching.align import Likeness, likeness
from data_pipeline.matching.box import CROPS
from data_pipeline.matching.candidates import MIRRORED, WHOLE, Candidates, Prints, matched
from data_pipeline.matching.clip_list import ClipList
from data_pipeline.stages.base import RowsOf


class Comparison:
    """Some pairs, with their frames in memory: 16 KB of each."""

    def __init__(self, clips: ClipList, prints: Prints, pairs: Candidates, rows_of: RowsOf) -> None:
        self._pairs, self._bars = pairs, clips.bars()
        self._asked, self._partner, self._both = matched(prints, pairs)
        self._wanted = np.unique(np.concatenate([self._asked[self._both], self._partner[self._both]]))
        self._thumb = np.zeros((len(self._wanted), SIDE, SIDE), np.uint8)
        self._read(clips, prints, rows_of)

    def _read(self, clips: ClipList, prints: Prints, rows_of: RowsOf) -> None:
        """Hashes are in order of their clips, those in order of their sources: each source has a run of them."""
        names, sample = np.array(clips.sources(), object), clips.samples()[self._wanted]
        of_wanted = names[prints.clip[self._wanted]]
        edges = [0, *(np.flatnonzero(of_wanted[1:] != of_wanted[:-1]) + 1), len(of_wanted)]
        runs = {of_wanted[begin]: slice(begin, end) for begin, end in itertools.pairwise(edges) if begin < end}
        for source, rows in rows_of("frames", ("hash_thumb",), runs.keys()):
            run = runs[source]
            self._thumb[run] = thumbnails(rows["hash_thumb"][0].as_py())[sample[run]]

    def likeness(self, number: int) -> Likeness | None:
        """Of a pair; None: they do not lie over one another."""
        both, kind = self._both[number], self._pairs.kind[number]
        asked, partner = (np.searchsorted(self._wanted, side[number, both]) for side in (self._asked, self._partner))
        one, two = self._thumb[asked], self._thumb[partner]
        bars, other_bars = (self._bars[clip] for clip in (self._pairs.clip[number], self._pairs.other[number]))
        if kind == MIRRORED:
            one, bars = one[:, :, ::-1], (bars[0], bars[1], bars[3], bars[2])
        shown = (WHOLE_SIDE, WHOLE_SIDE) if kind in (WHOLE, MIRRORED) else CROPS[kind - 1]
        return likeness(one, two, (bars, other_bars), shown)
