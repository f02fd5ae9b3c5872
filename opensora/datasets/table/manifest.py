"""The clip table: one row per clip or image, held as columns.

Columns: ``path`` (relative ones start at ``root`` or at the table's folder), ``text`` (caption), ``num_frames`` (1: an
image), ``height``, ``width`` (as displayed, after rotation), ``fps`` (null for images) and optionally
``motion_score``, ``camera_motion`` (words) and ``keep`` (rows where it is false are passed over, as if they were not
there). ``aspect_ratio`` (height / width) and ``resolution`` (height * width) are derived; other columns are left alone.
The position of a row over all files, in sorted order, is its sample id.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from opensora.datasets.table.table_files import no_rows, read_batches, table_files

# Fixed-width columns: 20 bytes a row.
COLUMNS: dict[str, np.dtype] = {
    "num_frames": np.dtype("<i4"),
    "height": np.dtype("<u2"),
    "width": np.dtype("<u2"),
    "fps": np.dtype("<f8"),  # NaN where unknown (images)
    "motion_score": np.dtype("<f4"),  # NaN where unknown
}


class Texts(Protocol):
    """Path and caption of every row."""

    def path(self, row: int) -> str:
        """As written in the table."""

    def caption(self, row: int) -> str:
        """The text to train with."""

    def camera_motion(self, row: int) -> str:
        """How the camera moves, in words; empty: unknown."""


@dataclass(frozen=True, kw_only=True)
class ClipTable:
    """n clips as columns; a sample id is a row number."""

    num_frames: np.ndarray  # (n,), types as in COLUMNS
    height: np.ndarray  # (n,)
    width: np.ndarray  # (n,)
    fps: np.ndarray  # (n,)
    motion_score: np.ndarray  # (n,)
    texts: Texts
    folders: tuple[str, ...]  # what relative paths start at, one per file read
    first_rows: np.ndarray  # (files,) int64: the first row of each

    def __len__(self) -> int:
        return len(self.num_frames)

    @property
    def aspect_ratio(self) -> np.ndarray:
        """(n,) height / width."""
        return self.height.astype(np.float64) / self.width

    @property
    def resolution(self) -> np.ndarray:
        """(n,) pixels per frame."""
        return self.height.astype(np.int64) * self.width

    @property
    def is_image(self) -> np.ndarray:
        """(n,) bool."""
        return self.num_frames == 1

    def check(self, first: int, last: int) -> None:
        """Before the columns of rows [first, last) are used. Raises: UserError: they are damaged on disk."""

    def path(self, sample_id: int) -> str:
        """Where to open the clip."""
        file = int(np.searchsorted(self.first_rows, sample_id, side="right")) - 1
        return os.path.join(self.folders[file], self.texts.path(sample_id))

    def caption(self, sample_id: int) -> str:
        return self.texts.caption(sample_id)

    def camera_motion(self, sample_id: int) -> str:
        """How the camera moves, in words; empty: unknown."""
        return self.texts.camera_motion(sample_id)


@dataclass(frozen=True)
class TextsInMemory:
    """``Texts`` of a table small enough to be held."""

    paths: pa.ChunkedArray
    captions: pa.ChunkedArray
    camera_motions: pa.ChunkedArray | None = None  # None: of no row is it known

    def path(self, row: int) -> str:
        return str(self.paths[row].as_py())

    def caption(self, row: int) -> str:
        return str(self.captions[row].as_py())

    def camera_motion(self, row: int) -> str:
        return str(self.camera_motions[row].as_py() or "") if self.camera_motions is not None else ""


def read_table(path: str | Sequence[str], root: str = "") -> ClipTable:
    """Read and check one table, or several as one, into memory; ``index.open_table`` does it for any size.

    Args:
        path: a csv or parquet file, a glob, or a list of these.
        root: folder that relative clip paths start at; empty: the folder of the table they stand in.

    Raises:
        UserError: a missing file, column or value, a value of the wrong kind (with its row, 1 = first data row), or
            a table without rows.
    """
    files = table_files(path)
    parts = [list(read_batches(file)) for file in files]
    counts = [sum(batch.num_rows for batch in part) for part in parts]
    if sum(counts) == 0:
        raise no_rows(files)
    whole = pa.concat_tables([batch for part in parts for batch in part], promote_options="default")
    cameras = whole["camera_motion"] if "camera_motion" in whole.column_names else None
    return ClipTable(
        **{name: whole[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()},
        texts=TextsInMemory(whole["path"], whole["text"], cameras),
        folders=folders_of(files, root),
        first_rows=np.cumsum([0, *counts[:-1]]),
    )


def folders_of(files: Sequence[Path], root: str) -> tuple[str, ...]:
    """What relative clip paths start at, for each table file."""
    return tuple(root or str(file.parent) for file in files)
