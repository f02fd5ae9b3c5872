"""From raw videos to a clip table.

    python -m data_pipeline.run configs/pipeline/default.yaml source=my_videos out=work/first [section.key=value ...]

Options, before or after the others:
    --dry-run        say what would run, and run nothing
    --until STAGE    stop after this stage; --until plan only lists the sources
    --only STAGE     this stage alone, on what the ones before it have left
    --retry          try sources again that failed before
    --check          read every clip that is there, and cut those again that are damaged; else sizes are looked at
    --worker I/N     only the shards with number I modulo N, as one of N tasks of a cluster; makes no table

The same command again goes on where it was: what is done is a file that is there.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before anything is imported that takes long enough to be interrupted in
    signal_handler.listen_early()

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.engines.base import Engine
from data_pipeline.engines.local import LocalEngine
from data_pipeline.engines.ray_tasks import RayEngine
from data_pipeline.outputs import clear_leftovers
from data_pipeline.pipeline import Pipeline
from data_pipeline.plan import Plan, Shard, make_plan, read_plan, save_plan
from data_pipeline.report.amounts import plural
from data_pipeline.report.buckets import check_training, try_training
from data_pipeline.report.collect import make_report
from data_pipeline.shard import InputMissing
from data_pipeline.stage_list import GLOBAL
from data_pipeline.table import ClipsGone, make_table, summary
from opensora.config.load import config_from_argv, save
from opensora.config.schema import suggestion
from opensora.utils.command_line.command import call
from opensora.utils.console import announce, shown_bytes
from opensora.utils.errors import UserError
from opensora.utils.files.user_files import try_output

_TRIES = 5  # to find all in place
_WAIT_S = 2.0  # for another process that works on what is left
_FLAGS = ("--dry-run", "--retry", "--check")
_VALUES = {"--until": "STAGE", "--only": "STAGE", "--worker": "I/N"}
_OPTIONS = (*_FLAGS, *_VALUES)
PLAN_ONLY = "plan"


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    dry_run: bool = False
    retry: bool = False
    until: str = ""
    only: str = ""
    worker: tuple[int, int] | None = None  # (number, of how many)
    check: bool = False


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
    pipeline = Pipeline(cfg, plan, retry=options.retry, check=options.check)
    names = _chosen(pipeline, options)
    if options.worker is None and cfg.report.training:
        check_training(cfg.report.training)
        if pipeline.missing(names, plan.shards):
            try_training(cfg.report.training)
    if options.dry_run:
        if out.exists() and not out.is_dir():
            raise UserError(f"out={out}: is a file; name a folder to write to")
        return _say_what_would_run(pipeline, names)
    try_output(out, "out", folder=True)
    if options.worker is None:
        save_plan(out, plan)
        save(cfg, out / "config.yaml")
        clear_leftovers(out)
    if options.until == PLAN_ONLY:
        return 0
    engine = make_engine(cfg, pipeline)
    try:
        made = run_stages(pipeline, engine, names, options)
        if not made and names:
            upto = f"{names[0]} finds" if len(names) == 1 else f"the stages up to {names[-1]} find"
            print(f"nothing to do: what {upto} is there")
        if options.worker is None and not (options.until or options.only):
            _make_table(pipeline, engine, names, options)
    finally:
        engine.close()
    if options.worker is None:
        say_summary(pipeline)
    return 0


def _make_table(pipeline: Pipeline, engine: Engine, names: Sequence[str], options: Options) -> None:
    """From what the stages wrote; what turns out to be gone is made again first."""
    for _ in range(_TRIES):
        try:
            print(summary(make_table(pipeline)))
            make_report(pipeline)
            return
        except (ClipsGone, InputMissing):
            run_stages(pipeline, engine, names, options)
    raise UserError(f"{pipeline.out}: clips or outputs of it go as fast as they are made; does something clean it up?")


def run_stages(pipeline: Pipeline, engine: Engine, names: Sequence[str], options: Options) -> int:
    """Stage by stage, until nothing is left that can be made. Returns how many outputs were.

    An output that turns out to be damaged is made again in the next round, with what depends on it.
    """
    shards = _own(pipeline.plan.shards, options)
    total = idle = 0  # idle: rounds in which nothing was made
    while True:
        made = 0
        for name in names:
            if name in GLOBAL and options.worker is None:
                made += _run_global(pipeline, name)
            elif name in GLOBAL and pipeline.missing([name], shards):
                names = names[: names.index(name)]  # one task makes it, later; and all behind it wait for that
                break
            elif name not in GLOBAL and (tasks := pipeline.tasks(name, shards)):
                engine.run(name, tasks)
                pipeline.forget()
                made += len(tasks) - len(pipeline.tasks(name, shards))
        total += made
        left = pipeline.missing(names, shards)
        if not left:
            return total
        idle = 0 if made else idle + 1
        if idle == 2:  # once is an output that was damaged; others are at it
            announce(f"another process works on outputs that are missing ({left}); waiting for it", every_rank=True)
        if idle > 1:
            time.sleep(_WAIT_S)
        pipeline.forget()


def _run_global(pipeline: Pipeline, name: str) -> bool:
    try:
        return pipeline.run_global(name)
    except InputMissing:  # damaged, as it turned out
        return False


def parse_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Options of this command, and the rest: the configuration and its overrides.

    Raises:
        UserError: an option's value.
    """
    rest, values, flags, words = list[str](), dict[str, str](), set[str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            flags.add(word)
        elif name in _VALUES:
            if not (value if equals else words and words[0] and not words[0].startswith("--")):
                raise UserError(f"{name}: a value is missing; write {name} {_VALUES[name]}")
            values[name] = value if equals else words.pop(0)
        elif name in _FLAGS:
            raise UserError(f"{word}: {name} takes no value; write {name} alone, or leave it out")
        elif name.startswith("--") and "." not in name and (close := get_close_matches(name, _OPTIONS, 1, 0.7)):
            raise UserError(f"{name}: unknown option; did you mean {close[0]}?")
        else:
            rest.append(word)
    worker = _worker(values["--worker"]) if "--worker" in values else None
    until, only = values.get("--until", ""), values.get("--only", "")
    if until and only:
        raise UserError(f"--until {until} --only {only}: give one of them")
    return Options("--dry-run" in flags, "--retry" in flags, until, only, worker, "--check" in flags), rest


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
    plan = make_plan(Path(cfg.out), cfg.source, cfg.shard_size)
    if plan.shard_size != cfg.shard_size:
        announce(
            f"shard_size={cfg.shard_size}: {cfg.out} was begun with shard_size={plan.shard_size}, and its shards stay "
            "as they are; only new sources are divided so. Name another out to divide all"
        )
    return plan


def _own(shards: Sequence[Shard], options: Options) -> Sequence[Shard]:
    if options.worker is None:
        return shards
    number, count = options.worker
    return shards[number::count]


def _chosen(pipeline: Pipeline, options: Options) -> list[str]:
    """The stages that were asked for.

    Raises:
        UserError: there is none of that name, or what ``--only`` names lacks what it reads.
    """
    names = list(pipeline.stages)
    if options.until == PLAN_ONLY:
        return []
    option, name = ("--only", options.only) if options.only else ("--until", options.until)
    if name and name not in names:
        choices = names if options.only else [*names, PLAN_ONLY]
        raise UserError(f"{option} {name}: {suggestion(name, choices)}")
    if not options.only:
        return names[: names.index(name) + 1] if name else names
    for needed in pipeline.stages[name].reads:
        if pipeline.missing([needed], pipeline.plan.shards):
            raise UserError(
                f"--only {name}: it reads what {needed} finds, which is not all there; run --until {needed}"
            )
    return [name]


def make_engine(cfg: PipelineConfig, pipeline: Pipeline) -> Engine:
    """The engine that the configuration names."""
    stages = {name: stage for name, stage in pipeline.stages.items() if name not in GLOBAL}
    if cfg.engine.kind == "ray":
        return RayEngine(pipeline.out, stages, cfg.limits, cfg.engine)  # type: ignore[arg-type]
    return LocalEngine(pipeline.out, stages, cfg.limits, cfg.engine.workers)  # type: ignore[arg-type]


def _say_what_would_run(pipeline: Pipeline, names: Sequence[str]) -> int:
    plan = pipeline.plan
    size = sum(max(0, entry.size) for entry in plan.sources)
    print(f"{plural(len(plan.sources), 'source')}, {shown_bytes(size)}, in {plural(len(plan.shards), 'shard')}")
    for left_out in plan.left_out:
        print(f"  left out: {left_out.path}: {left_out.detail}")
    for name in names:
        total = 1 if name in GLOBAL else len(plan.shards)
        missing = pipeline.missing([name], plan.shards)
        print(f"{name:>10}: {total - missing} of {total} outputs are there" + ("" if missing else ", nothing to do"))
    return 0


def say_summary(pipeline: Pipeline) -> None:
    """What came of the sources, in a few lines."""
    errors = Counter(f"{stage}: {done.kind}" for stage, done in pipeline.errors().values())
    failed = sum(errors.values())
    print(f"{plural(len(pipeline.plan.sources), 'source')}, {failed or 'none'} of them with an error")
    for kind, count in sorted(errors.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count:>8}  {kind}")
    if (pipeline.out / "report.html").exists():
        print(f"what became of them and why: {pipeline.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
