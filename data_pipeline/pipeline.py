"""The stages of a run in order, and the outputs that are still to be made."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from data_pipeline.config import PipelineConfig
from data_pipeline.outputs import (
    Done,
    Output,
    digest_of,
    key_and_digest,
    list_outputs,
    read_done,
    read_output,
    write_output,
)
from data_pipeline.plan import Plan, Shard
from data_pipeline.shard import InputMissing, ShardTask
from data_pipeline.stage_list import GLOBAL, make_stages
from data_pipeline.stages.base import GlobalStage, ReadsBeside, Stage, has_failed
from opensora.config.schema import plain

ALL = "all"  # the shard of a stage that looks at all sources together


@dataclass
class Pipeline:
    """A configuration and its sources."""

    cfg: PipelineConfig
    plan: Plan
    retry: bool = False  # sources that failed before are tried again
    check: bool = False  # clips are read, and not only looked for
    stages: dict[str, Stage | GlobalStage] = field(init=False)
    # What is known of the folder, until something is made or ``forget`` is called.
    _listed: dict[str, dict[tuple[str, str], Path]] = field(default_factory=dict)  # stage -> (shard, key) -> output
    _found: dict[tuple[str, str], Path | None] = field(default_factory=dict)  # (stage, shard) -> the one that is wanted
    _retried: set[tuple[str, str]] = field(default_factory=set)  # (stage, shard) that were made again

    def __post_init__(self) -> None:
        self.stages = make_stages(self.cfg)

    @property
    def out(self) -> Path:
        return Path(self.cfg.out).absolute()

    def output(self, stage: str, shard: Shard) -> Path | None:
        """The output that is wanted, if it is there."""
        name = ALL if stage in GLOBAL else shard.name
        if (stage, name) not in self._found:
            if stage not in self._listed:
                self._listed[stage] = list_outputs(self.out / stage)
            key = self.key(stage, shard)
            self._found[stage, name] = self._listed[stage].get((name, key)) if key is not None else None
        return self._found[stage, name]

    def forget(self) -> None:
        """Look again for every output: some were made, or turned out to be damaged."""
        self._found.clear()
        self._listed.clear()

    def missing(self, stages: Sequence[str], shards: Sequence[Shard]) -> int:
        """How many outputs are not there."""
        each = ((stage, shard) for stage in stages for shard in (shards[:1] if stage in GLOBAL else shards))
        return sum(self.output(stage, shard) is None for stage, shard in each)

    def key(self, stage: str, shard: Shard) -> str | None:
        """Of the output that is wanted; None: what it reads is not there yet."""
        of_stage = self.stages[stage]
        shards = self.plan.shards if stage in GLOBAL else (shard,)
        digests: dict[str, list[str]] = {}
        for name in of_stage.reads:
            paths = [self.output(name, each) for each in (shards[:1] if name in GLOBAL else shards)]
            if any(path is None for path in paths):
                return None
            digests[name] = [key_and_digest(path)[1] for path in paths if path is not None]
        if not digests:
            return digest_of(
                [self.stage_key(stage), [[entry.name, entry.size, entry.mtime_ns] for entry in shard.sources]]
            )
        if isinstance(of_stage, ReadsBeside):
            digests["beside"] = [digest_of(of_stage.beside(entry.file)) for entry in shard.sources]
        return digest_of([self.stage_key(stage), digests])

    def stage_key(self, stage: str) -> str:
        """Of all that a stage is, but for what it reads."""
        of_stage = self.stages[stage]
        return digest_of([of_stage.name, of_stage.version, plain(of_stage.config)])

    def task(self, stage: str, shard: Shard) -> ShardTask | None:
        """What is to be done for one output; None: it is there, or what it reads is not."""
        key, present = self.key(stage, shard), self.output(stage, shard)
        if key is None or (present is not None and not self._tries_again(stage, shard, present)):
            return None
        of_stage = self.stages[stage]
        paths = {name: self.output(name, shard) for name in of_stage.reads}
        return ShardTask(
            out=self.out,
            stage=of_stage,  # type: ignore[arg-type]
            stage_key=self.stage_key(stage),
            shard=shard.name,
            key=key,
            sources=shard.sources,
            inputs={name: path for name, path in paths.items() if path is not None and name not in GLOBAL},
            shared={name: path for name, path in paths.items() if path is not None and name in GLOBAL},
            attempts=self.cfg.limits.attempts,
            retry=self.retry,
        )

    def tasks(self, stage: str, shards: Sequence[Shard]) -> list[ShardTask]:
        """The outputs of a stage that can be made now."""
        found = (self.task(stage, shard) for shard in shards)
        return [task for task in found if task is not None]

    def run_global(self, stage: str) -> bool:
        """Make the output of a stage that looks at all sources together; False: it is there, or cannot be made yet."""
        of_stage, shards = self.stages[stage], self.plan.shards
        key = self.key(stage, shards[0])
        if key is None or self.output(stage, shards[0]) is not None:
            return False
        tables = {name: self.table(name, columns) for name, columns in of_stage.reads.items() if columns}
        found = of_stage.run_all(tables, self.rows_of)  # type: ignore[union-attr]
        names = found["source"].to_pylist()
        done = [Done(source, "", len(list(rows))) for source, rows in groupby(names)]
        rows, first = found.drop_columns(["source"]), 0
        results = []
        for each in done:
            results.append((each, rows.slice(first, each.rows)))
            first += each.rows
        write_output(self.out / stage, ALL, key, of_stage.columns, results)
        self.forget()
        return True

    def table(self, stage: str, columns: Sequence[str]) -> pa.Table:
        """These columns of a stage's rows over all sources, behind ``source``; in order of source.

        Raises:
            InputMissing: an output is not there, or was damaged.
        """
        shards = self.plan.shards[:1] if stage in GLOBAL else self.plan.shards
        each = (pair for shard in shards for pair in self.read(stage, shard, columns).by_source())
        found = [(done, rows.select(columns)) for done, rows in each]
        found.sort(key=lambda pair: pair[0].source)
        tables = [self.stages[stage].columns.empty_table().select(columns), *(rows for _, rows in found)]
        names = pa.array([done.source for done, _ in found for _ in range(done.rows)], pa.string())
        if not columns:  # a table without columns has no rows either
            return pa.table({"source": names})
        return pa.concat_tables(tables).add_column(0, "source", names)

    def rows_of(self, stage: str, columns: Sequence[str], sources: Collection[str]) -> Iterator[tuple[str, pa.Table]]:
        """See ``RowsOf``; in order of shards.

        Raises:
            InputMissing: an output is not there, or was damaged.
        """
        for shard in self.plan.shards:
            if any(entry.name in sources for entry in shard.sources):
                for done, rows in self.read(stage, shard, columns).by_source():
                    if done.source in sources:
                        yield done.source, rows.select(columns)

    def errors(self) -> dict[str, tuple[str, Done]]:
        """Source -> the stage that it failed in, and why."""
        found: dict[str, tuple[str, Done]] = {}
        for stage in self.stages:
            for done in self.done(stage):
                if done.error:
                    found[done.source] = (stage, done)
        return found

    def done(self, stage: str) -> Iterator[Done]:
        """What became of every source in a stage, as far as it is there; without reading the rows."""
        for shard in self.plan.shards[:1] if stage in GLOBAL else self.plan.shards:
            path = self.output(stage, shard)
            yield from read_done(path) if path is not None else ()

    def read(self, stage: str, shard: Shard, columns: Sequence[str] = ()) -> Output:
        """``columns``: see ``read_output``. Raises: InputMissing: the output is not there, or was damaged."""
        path = self.output(stage, shard)
        output = read_output(path, columns) if path is not None else None
        if output is None:
            self.forget()
            raise InputMissing(f"{stage}/{shard.name}")
        return output

    def _tries_again(self, stage: str, shard: Shard, present: Path) -> bool:
        """Once per command, where it is told to and something failed."""
        if not self.retry or (stage, shard.name) in self._retried:
            return False
        self._retried.add((stage, shard.name))
        output = read_output(present)
        of_stage = self.stages[stage]
        return output is None or any(has_failed(of_stage, done.error, rows) for done, rows in output.by_source())
