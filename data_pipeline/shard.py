"""One stage over one shard: what has to be computed, what is known already, and the output once all is there.

Rows are found, in this order: in the journal of this very output, in outputs of the same stage and shard with other
keys (a threshold changed elsewhere does not change what a unit is made of), and by running the stage.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from data_pipeline.journal import Journal
from data_pipeline.log import RunLog
from data_pipeline.outputs import Done, Output, outputs_of, read_output, row_keys_of, unit_key, write_output
from data_pipeline.plan import SourceFile
from data_pipeline.rows import Row, to_rows
from data_pipeline.stages.base import PerClip, ReadsBeside, Stage, Unit, has_failed, has_failed_rows
from data_pipeline.worker import Failed, Worker, WorkerLost

POISON, GONE = "poison", "gone"
# Errors of the moment: no content is to blame, so nobody takes them for what is known of it.
_PASSING = {
    GONE: "gone since the sources were listed; when it is there again, --retry takes it",
    "changed": "changed since the sources were listed; the same command takes it as it is now",
}


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """All that it takes to make one output, wherever: an engine carries this to a machine."""

    out: Path
    stage: Stage
    stage_key: str  # of its name, version and configuration
    shard: str
    key: str  # of the output
    sources: tuple[SourceFile, ...]
    inputs: Mapping[str, Path]  # earlier stage -> its output for this shard
    shared: Mapping[str, Path]  # earlier stage that looks at all sources together -> its output
    attempts: int  # of SourceLimits
    retry: bool = False  # sources that failed before are tried again

    @property
    def folder(self) -> Path:
        return self.out / self.stage.name

    @property
    def weight(self) -> int:
        return sum(source.weight for source in self.sources)


class InputMissing(Exception):
    """What a stage reads is not there, or was damaged: whoever comes next makes it first."""


class ShardRun:
    """A task being worked on. ``pending`` are the units to be computed, the longest first, so that none of them is left
    to one core at the end; ``compute`` may run in several threads. Whoever computes the last one, finishes."""

    def __init__(self, task: ShardTask, log: RunLog) -> None:
        """
        Raises:
            InputMissing: an earlier output is not there.
            ShardTaken: another process works on it.
        """
        self.task, self._log = task, log
        self._guard = threading.Lock()
        self._listed = {source.name: source for source in task.sources}
        inputs = {name: _read(path, task.stage.reads[name]) for name, path in task.inputs.items()}
        shared = {name: _read(path, task.stage.reads[name]) for name, path in task.shared.items()}
        self._journal = Journal(task.folder / f".{task.shard}.{task.key}.journal")
        self._keys: dict[str, str] = {}
        self._results: dict[str, tuple[Done, pa.Table]] = {}
        self._row_keys: dict[str, list[str]] = {}  # by source, of a stage ``PerClip``
        self._known_rows: dict[str, Row] = {}  # by the key of a row
        try:
            self.pending = self._units(inputs, shared)
        except BaseException:
            self.close()
            raise
        self._left = len(self.pending)

    def weight(self, unit: Unit) -> int:
        """Of its source."""
        return self._listed[unit.source].weight

    def _units(self, inputs: Mapping[str, Output], shared: Mapping[str, Output]) -> list[Unit]:
        """What has to be computed. A source that failed in an earlier stage is passed over."""
        stage, known = self.task.stage, self._known()
        own = {name: _declared(output, stage.reads[name]) for name, output in inputs.items()}
        common = {name: _declared(output, stage.reads[name]) for name, output in shared.items()}
        units: dict[str, Unit] = {}  # by key: two files of equal content are one unit
        for source in self.task.sources:
            if any(source.name not in tables for tables in own.values()):
                continue
            rows = {name: to_rows(tables[source.name]) for name, tables in own.items()}
            rows |= {
                name: to_rows(tables[source.name]) if source.name in tables else [] for name, tables in common.items()
            }
            if isinstance(stage, ReadsBeside):
                rows["beside"] = [stage.beside(source.file)]
            key = self._keys[source.name] = unit_key(self.task.stage_key, self._identity(source, rows))
            if isinstance(stage, PerClip):
                self._row_keys[source.name] = row_keys_of(self.task.stage_key, rows)
            if key in known:
                self._results[key] = known[key]
            else:
                before = [self._known_rows.get(each) for each in self._row_keys.get(source.name, ())]
                units.setdefault(key, Unit(source=source.name, file=source.file, rows=rows, before=before or None))
        return sorted(units.values(), key=self.weight, reverse=True)

    def _identity(self, source: SourceFile, rows: Mapping[str, list[Row]]) -> Mapping[str, list[Row]]:
        """A stage that reads no other one reads the file: its unit is what the listing says of it."""
        if rows:
            return rows
        return {"file": [{"name": source.name, "size": source.size, "mtime_ns": source.mtime_ns}]}

    def _known(self) -> dict[str, tuple[Done, pa.Table]]:
        known: dict[str, tuple[Done, pa.Table]] = {}
        for path in outputs_of(self.task.folder, self.task.shard):
            if (output := read_output(path)) is not None:
                known = _by_key(output) | known
        known |= self._journal.done
        known = {key: value for key, value in known.items() if not _passes(value[0])}
        for done, rows in known.values():
            self._learn_rows(done, rows)
        if self.task.retry:
            again = [key for key, (done, rows) in known.items() if has_failed(self.task.stage, done.error, rows)]
            known = {key: value for key, value in known.items() if key not in again}
        return known

    def _learn_rows(self, done: Done, rows: pa.Table) -> None:
        """Rows that a unit may take over although it is another one as a whole; no failed ones where they are tried
        again."""
        if not done.row_keys or done.error:
            return
        failed = has_failed_rows(self.task.stage, rows) if self.task.retry else [False] * rows.num_rows
        for key, row, has_failed_before in zip(done.row_keys, to_rows(rows), failed, strict=True):
            if not has_failed_before:
                self._known_rows[key] = row

    def compute(self, unit: Unit, worker: Worker) -> bool:
        """Run the stage on one source, and write down what came of it. Returns whether all units are done now."""
        found = None
        while found is None:
            with self._log.timed(self.task.stage.name, unit.source) as entry:
                found = self._try(unit, worker)
                entry.error = found[0].error if found else "its worker died; tried again"
        with self._guard:
            self._journal.add(*found)
            self._results[found[0].key] = found
            self._left -= 1
            return self._left == 0

    def _try(self, unit: Unit, worker: Worker) -> tuple[Done, pa.Table] | None:
        """None: its worker died, and it gets another try."""
        key, nothing = self._keys[unit.source], self.task.stage.columns.empty_table()
        try:
            rows = worker.run(self.task.stage.name, unit)
            each = tuple(self._row_keys.get(unit.source, ()))
            found: tuple[Done, pa.Table] | None = (Done(unit.source, key, rows.num_rows, row_keys=each), rows)
        except Failed as error:
            found = (Done(unit.source, key, 0, str(error), error.kind), nothing)
        except WorkerLost as lost:
            timeout = Done(unit.source, key, 0, str(lost), "timeout")
            done = timeout if lost.too_slow else self._poison(unit, key, str(lost))
            found = (done, nothing) if done else None
        became = self._listed[unit.source].changed()
        if became and not (became == GONE and found and not found[0].error):  # gone, but not needed any more
            return Done(unit.source, key, 0, _PASSING[became], became), nothing
        return found

    def _poison(self, unit: Unit, key: str, reason: str) -> Done | None:
        """A source that kills its worker again and again; None: it gets another try."""
        with self._guard:
            reasons = self._journal.add_lost(key, reason)
        if len(reasons) < self.task.attempts:
            return None
        return Done(unit.source, key, 0, f"{reason}, {len(reasons)} times in a row", POISON)

    def finish(self) -> Path:
        """Write the output: all units are there."""
        results = []
        for source in self.task.sources:
            if source.name in self._keys:
                done, rows = self._results[self._keys[source.name]]
                results.append((replace(done, source=source.name), rows))
        task = self.task
        path = write_output(task.folder, task.shard, task.key, task.stage.columns, results)
        self._journal.close(remove=True)
        return path

    def close(self) -> None:
        """Leave it as it is; what is done stays in the journal."""
        self._journal.close()


def _passes(done: Done) -> bool:
    return done.kind in _PASSING


def _read(path: Path, columns: Sequence[str]) -> Output:
    output = read_output(path, columns)
    if output is None:
        raise InputMissing(str(path))
    return output


def _declared(output: Output, columns: Sequence[str]) -> dict[str, pa.Table]:
    """The columns that a stage reads, of every source without an error."""
    return {done.source: table.select(list(columns)) for done, table in output.by_source() if not done.error}


def _by_key(output: Output) -> dict[str, tuple[Done, pa.Table]]:
    return {done.key: (done, table) for done, table in output.by_source()}


def run_shard(task: ShardTask, worker: Worker, log: RunLog) -> None:
    """One output, by one worker: what an engine calls somewhere, at least once.

    Raises:
        InputMissing, ShardTaken: not now.
        UserError, OSError: the output cannot be written.
    """
    run = ShardRun(task, log)
    try:
        for unit in run.pending:
            run.compute(unit, worker)
        run.finish()
    finally:
        run.close()
