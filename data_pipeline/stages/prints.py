"""prints: hashes of each clip, of the picture inside its bars, whole and cropped: what ``duplicates`` searches in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.analysis.hashes import picture_hash, thumbnails
from data_pipeline.limits import SourceLimits
from data_pipeline.matching.box import ASKED, CROPS, Bars, inside
from data_pipeline.rows import Row
from data_pipeline.stages.base import Resources, Unit
from opensora.utils.limits import Limits


@dataclass(frozen=True, kw_only=True)
class PrintsConfig:
    """What is worth comparing."""

    variance: float = 25.0  # of grey levels; flat, black and faded frames look alike whatever they are of

    LIMITS: ClassVar[Limits] = {"variance": (16256.0, "no picture has more")}

    def __post_init__(self) -> None:
        if self.variance < 0:
            raise ValueError(f"variance={self.variance}: must be a number >= 0")


class PrintsStage:
    """One row per clip; lists have a value per sampled frame that is not flat."""

    name: ClassVar[str] = "prints"
    version: ClassVar[int] = 1
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "frames": ("hash_frame", "hash_ms", "hash_thumb"),
        "shots": ("first", "last", "start_s"),
        "measure": ("bar_top", "bar_bottom", "bar_left", "bar_right"),
    }
    resources: ClassVar[Resources] = Resources()
    columns: ClassVar[pa.Schema] = pa.schema(
        [
            ("print_sample", pa.list_(pa.int32())),  # number among the sampled frames of the source
            ("print_ms", pa.list_(pa.int32())),  # since the beginning of the clip
            ("print_bits", pa.list_(pa.uint64())),
            ("print_asked", pa.list_(pa.int32())),  # numbers in these lists, spread over the clip: up to 8
            ("print_crops", pa.list_(pa.uint64())),  # of these frames, 5 each: see ``CROPS``
        ]
    )

    def __init__(self, config: PrintsConfig, limits: SourceLimits) -> None:
        self.config, self._limits = config, limits

    def run(self, unit: Unit) -> list[Row]:
        """See ``Stage``."""
        frames, clips = unit.row("frames"), unit.rows["shots"]
        thumb = thumbnails(frames["hash_thumb"])
        rows = []
        for clip, measured in zip(clips, unit.rows["measure"], strict=True):
            first, last = np.searchsorted(frames["hash_frame"], (clip["first"], clip["last"]))
            ms = frames["hash_ms"][first:last] - round(1000 * clip["start_s"])
            rows.append(self._of_clip(inside(thumb[first:last], bars_of(measured)), ms, int(first)))
        return rows

    def _of_clip(self, picture: np.ndarray, ms: np.ndarray, first: int) -> Row:
        kept = np.flatnonzero(picture.var(axis=(1, 2)) >= self.config.variance)
        asked = np.unique(np.linspace(0, len(kept) - 1, ASKED).round().astype(np.int32)) if len(kept) else kept
        crops = [picture_hash(picture[kept[asked]], *crop) for crop in CROPS]
        return {
            "print_sample": kept + first,
            "print_ms": ms[kept],
            "print_bits": picture_hash(picture[kept]),
            "print_asked": asked,
            "print_crops": np.stack(crops, axis=1).reshape(-1),
        }


def bars_of(measured: Mapping[str, Any]) -> Bars:
    top, bottom, left, right = (float(measured[f"bar_{side}"] or 0) for side in ("top", "bottom", "left", "right"))
    return top, bottom, left, right
