"""What a stage is: what it reads and writes, and what it does with one source.

A stage is a function of one source and of what earlier stages wrote about it. It runs in a worker process, knows
nothing of shards, engines or files of the run, and its output is keyed by all that it depends on: its configuration,
its version, and the columns that it declares to read. Whoever changes what a stage computes raises its version.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data_pipeline.rows import Row


class SourceError(Exception):
    """This source cannot be used, and why: it becomes a row with this error, and later stages pass it over."""

    def __init__(self, reason: str, *, kind: str = "refused") -> None:
        """``kind``: a word or two that such errors are counted by."""
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one unit of a stage occupies, for engines that place work."""

    cpus: float = 1.0
    gpus: float = 0.0
    models: bool = False  # it loads some, which stay: whatever comes next begins in a process without them


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One source, and what earlier stages wrote about it."""

    source: str  # as tables name it: relative to the folder of the sources
    file: str  # where to open it
    rows: Mapping[str, list[Row]] = field(default_factory=dict)  # stage -> its rows, the declared columns only
    before: list[Row | None] | None = None  # of a stage ``PerClip``: rows that it need not make again; None: it must

    def row(self, stage: str) -> Row:
        """The one row of a stage that writes one per source."""
        (row,) = self.rows[stage]
        return row


class Step(Protocol):
    """What all stages say of themselves; ``config`` is the section of the configuration, a frozen dataclass."""

    @property
    def name(self) -> str:
        """Of its section, its folder and its progress bar."""

    @property
    def version(self) -> int:
        """Raised by whoever changes what it computes."""

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Earlier stage -> columns; only these change the key of a unit."""

    @property
    def columns(self) -> pa.Schema:
        """Of its rows, without ``source``."""

    @property
    def config(self) -> Any:
        """What it computes depends on nothing else."""


class Stage(Step, Protocol):
    """A step that looks at one source at a time."""

    @property
    def resources(self) -> Resources:
        """What one source takes."""

    def run(self, unit: Unit) -> list[Row]:
        """The rows of one source: of a stage of files one, of a stage of clips one per clip, in order of time.

        Raises:
            SourceError, DecodeError: there are none, for a reason that the source is to blame for.
        """


@runtime_checkable
class ReadsBeside(Protocol):
    """A stage that reads more of a source than earlier stages wrote: files that lie beside it."""

    def beside(self, file: str) -> Row:
        """What it reads there; runs where the work is given out. It is part of the key of a unit, whose ``rows`` have
        it as ``beside``."""


@runtime_checkable
class PerClip(Protocol):
    """A stage whose rows depend each on the inputs of its own clip, and on those of the whole source. Where the inputs
    of one clip change, as when a threshold lets it pass, the other clips keep their rows (``Unit.before``)."""

    @property
    def per_clip(self) -> bool:
        """True."""


@runtime_checkable
class TriesAgain(Protocol):
    """A stage with rows that are there although something failed: ``--retry`` makes these again."""

    @property
    def retry_column(self) -> str:
        """Null in rows in which nothing failed."""


def has_failed_rows(stage: object, rows: pa.Table) -> list[bool]:
    """Of each row, whether ``--retry`` makes it again."""
    if not isinstance(stage, TriesAgain):
        return [False] * rows.num_rows
    failed: list[bool] = rows[stage.retry_column].is_valid().to_pylist()
    return failed


def has_failed(stage: object, error: str, rows: pa.Table) -> bool:
    """Whether ``--retry`` tries a source again, of which these rows or this error are known."""
    return bool(error) or any(has_failed_rows(stage, rows))


# (stage, columns, sources) -> these columns of a source's rows, one source after the other, in any order: for what is
# too large to have of all sources at once
RowsOf = Callable[[str, Sequence[str], Collection[str]], Iterator[tuple[str, pa.Table]]]


class GlobalStage(Step, Protocol):
    """A step that looks at all sources together, such as the search for duplicates."""

    def run_all(self, tables: Mapping[str, pa.Table], rows_of: RowsOf) -> pa.Table:
        """Rows with a column ``source`` from the declared columns of earlier stages, which have it as well; the rows
        of a table are in order of source, and of time within one. ``rows_of`` gives more columns of stages that are
        declared, of some sources."""
