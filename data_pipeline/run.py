"""From raw videos to a clip table.

    python -m data_pipeline.run CONFIG.yaml source=DIR out=FOLDER [section.key=value ...]

Options, before or after the others:
    --dry-run        say what would run, and run nothing
    --until STAGE    stop after this stage
    --retry          try sources again that failed before
    --worker I/N     only the shards with number I modulo N, as one of N tasks of a cluster; makes no table

The same command again goes on where it was: what is done is a file that is there.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before anything is imported that takes long enough to be interrupted in
    signal_handler.listen_early()

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.engines.base import Engine
from data_pipeline.engines.local import LocalEngine
from data_pipeline.pipeline import Pipeline
from data_pipeline.plan import Plan, Shard, make_plan, read_plan, save_plan
from data_pipeline.shard import InputMissing
from data_pipeline.stage_list import GLOBAL
from data_pipeline.table import ClipsGone, make_table, summary
from opensora.config.load import config_from_argv, save
from opensora.config.schema import suggestion
from opensora.utils.command_line.command import call
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output

_TRIES = 5  # to find all in place
_WAIT_S = 2.0  # for another process that works on what is left
_FLAGS = ("--dry-run", "--retry")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    dry_run: bool = False
    retry: bool = False
    until: str = ""
    worker: tuple[int, int] | None = None  # (number, of how many)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return call(_main, argv)


def _main(argv: list[str]) -> int:
    options, rest = parse_options(argv)
    cfg = config_from_argv(PipelineConfig, rest, (__doc__ or "").strip())
    with signal_handler.stopped_in_one_line("the same command goes on from here"):
        return run(cfg, options)


def run(cfg: PipelineConfig, options: Options = Options()) -> int:
    """All of a run that is not done yet. Returns the exit code.

    Raises:
        UserError: sources, output folder or an output cannot be used.
    """
    out = Path(cfg.out)
    plan = _plan(cfg, options)
    pipeline = Pipeline(cfg, plan, retry=options.retry)
    if options.until and options.until not in pipeline.stages:
        raise UserError(f"--until {options.until}: {suggestion(options.until, pipeline.stages)}")
    if options.dry_run:
        return _say_what_would_run(pipeline)
    try_output(out, "out", folder=True)
    save_plan(out, plan)
    save(cfg, out / "config.yaml")
    engine = make_engine(cfg, pipeline)
    try:
        run_stages(pipeline, engine, options)
        if options.worker is None and not options.until:
            _make_table(pipeline, engine, options)
    finally:
        engine.close()
    return 0


def _make_table(pipeline: Pipeline, engine: Engine, options: Options) -> None:
    """From what the stages wrote; what turns out to be gone is made again first."""
    for _ in range(_TRIES):
        try:
            print(summary(make_table(pipeline)))
            return
        except (ClipsGone, InputMissing):
            run_stages(pipeline, engine, options)
    raise UserError(f"{pipeline.out}: clips or outputs of it go as fast as they are made; does something clean it up?")


def run_stages(pipeline: Pipeline, engine: Engine, options: Options) -> None:
    """Stage by stage, until nothing is left that can be made."""
    shards = _own(pipeline.plan.shards, options)
    names = _until(pipeline, options)
    said = False
    while True:
        before = left = 0
        for name in names:
            if name in GLOBAL:
                if options.worker is None:
                    pipeline.run_global(name)
                continue
            tasks = pipeline.tasks(name, shards)
            if tasks:
                engine.run(name, tasks)
                pipeline.forget()
            before += len(tasks)
            left += len(pipeline.tasks(name, shards))
        if not left:
            return
        if left == before:  # others are at it, or nothing can be made
            if not said:
                announce(f"another process works on {left} of the outputs that are left; waiting for it")
            said = True
            time.sleep(_WAIT_S)


def parse_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Options of this command, and the rest: the configuration and its overrides.

    Raises:
        UserError: an option's value.
    """
    rest, until, worker = list[str](), "", None
    flags, words = set[str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            flags.add(word)
        elif name in ("--until", "--worker"):
            if not equals and not words:
                raise UserError(f"{name}: a value is missing; write {name} {'STAGE' if name == '--until' else 'I/N'}")
            value = value if equals else words.pop(0)
            until, worker = (value, worker) if name == "--until" else (until, _worker(value))
        else:
            rest.append(word)
    return Options("--dry-run" in flags, "--retry" in flags, until, worker), rest


def _worker(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--worker {text}: must be I/N with I from 0 to N - 1, as 0/5")
    return int(match[1]), int(match[2])


def _plan(cfg: PipelineConfig, options: Options) -> Plan:
    """A worker of several takes the plan that is there: all of them must have the same."""
    if options.worker is not None:
        plan = read_plan(Path(cfg.out))
        if plan is None:
            raise UserError(f"out={cfg.out}: no plan in it yet; run the same command with --until plan first")
        return plan
    return make_plan(Path(cfg.out), cfg.source, cfg.shard_size)


def _own(shards: Sequence[Shard], options: Options) -> Sequence[Shard]:
    if options.worker is None:
        return shards
    number, count = options.worker
    return shards[number::count]


def _until(pipeline: Pipeline, options: Options) -> list[str]:
    names = list(pipeline.stages)
    return names[: names.index(options.until) + 1] if options.until else names


def make_engine(cfg: PipelineConfig, pipeline: Pipeline) -> Engine:
    """The engine that the configuration names."""
    stages = {name: stage for name, stage in pipeline.stages.items() if name not in GLOBAL}
    return LocalEngine(Path(cfg.out), stages, cfg.limits, cfg.engine.workers)  # type: ignore[arg-type]


def _say_what_would_run(pipeline: Pipeline) -> int:
    plan = pipeline.plan
    size = sum(max(0, entry.size) for entry in plan.sources)
    print(f"{len(plan.sources)} sources, {size / 2**20:.0f} MiB, in {len(plan.shards)} shards")
    for name in pipeline.stages:
        shards = plan.shards[:1] if name in GLOBAL else plan.shards
        done = sum(pipeline.output(name, shard) is not None for shard in shards)
        print(
            f"{name:>10}: {done} of {len(shards)} outputs are there"
            + (", nothing to do" if done == len(shards) else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
