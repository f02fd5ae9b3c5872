"""Submit a run of the data pipeline: ``python launch/submit.py pipeline CONFIG.yaml --tasks 5 source=DIR out=FOLDER``.

The sources are listed here, so that all tasks have the same plan. Then there is an array whose tasks share the shards;
for every stage that looks at all sources together a single task, and an array for what follows it; and at last one task
that does what is left and makes the table. Each waits for the one before, however that ended: what is missing is made
then.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import PipelineConfig
from data_pipeline.plan import read_plan
from data_pipeline.run import PLAN_ONLY, Options, run
from data_pipeline.stage_list import GLOBAL
from launch.slurm.jobs import (
    clear_away,
    copy_code,
    describe,
    next_folder,
    require_sbatch,
    sbatch,
    time_limit,
)
from opensora.config.load import load_config, save
from opensora.utils import signal_handler
from opensora.utils.command_line.arguments import Parser, whole, word
from opensora.utils.console import announce
from opensora.utils.errors import UserError
from opensora.utils.files.code_digest import PACKAGES

TEMPLATE = Path(__file__).with_name("pipeline.sbatch")
MARK = "# settings of launch/submit.py\n"
MAX_TASKS, MAX_CPUS = 10_000, 4096
SIGNAL_S = 60  # before the time limit; SLURM may be a minute early


@dataclass(frozen=True)
class Step:
    """A job of the chain."""

    name: str
    options: tuple[str, ...]  # of data_pipeline.run, beside the configuration
    tasks: int = 0  # of an array; 0: it is none


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    args, overrides = parse(argv)
    cfg = load_config(PipelineConfig, args.config, overrides)
    if args.dry_run:
        for step in steps(args.tasks):
            print(render(args, cfg, Path(cfg.out, "jobs", "N"), step), end="\n")
        return 0
    require_sbatch()
    with signal_handler.stopped_in_one_line():
        return submit(args, cfg, argv)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and what is left for the configuration.

    Raises:
        UserError: an option that cannot be.
    """
    about = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog="python launch/submit.py pipeline", description=about)
    parser.add_argument("config", help="of the pipeline; overrides section.key=value may stand anywhere")
    parser.add_argument(
        "--tasks", type=whole(1, MAX_TASKS), default=1, help="tasks of an array, which share the shards"
    )
    parser.add_argument("--at-once", type=whole(1, MAX_TASKS), help="of these at a time")
    parser.add_argument("--cpus", type=whole(1, MAX_CPUS), default=16, help="cores of a task, and its processes")
    parser.add_argument("--time", type=time_limit, help="limit of one attempt, such as 4:00:00; it goes on in the next")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", type=word)
    parser.add_argument("--python", type=word, help="interpreter of the tasks; default: this one")
    parser.add_argument(
        "--sbatch", type=word, action="append", default=[], metavar="OPTION", help="any other, as --sbatch=--mem=0"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the jobs, write nothing")
    args, overrides = parser.parse_known_args(argv)
    return args, overrides


def submit(args: argparse.Namespace, cfg: PipelineConfig, argv: Sequence[str]) -> int:
    """List the sources, make the folder of the jobs and give them to sbatch. Returns the exit code.

    Raises:
        UserError: the sources or the folder cannot be used, or sbatch refused a job; then none is left in the queue.
    """
    run(cfg, Options(until=PLAN_ONLY))
    plan = read_plan(Path(cfg.out))
    shards = len(plan.shards) if plan else 0
    if shards < args.tasks:
        announce(
            f"--tasks={args.tasks}: the sources are in {shards} shards (shard_size={cfg.shard_size}), one task each"
        )
    job = next_folder(Path(cfg.out, "jobs"))
    numbers: list[str] = []
    try:
        copy_code(job, (*PACKAGES, "data_pipeline", "launch"))
        save(cfg, job / "config.yaml")
        describe(job, ["pipeline", *argv], [Path(cfg.out)])
        (job / "logs").mkdir()
        for step in steps(min(args.tasks, shards)):
            script = job / f"{step.name}.sbatch"
            script.write_text(render(args, cfg, job, step))
            numbers.append(sbatch(script, *(f"--dependency=afterany:{number}" for number in numbers[-1:])))
    except BaseException as error:
        cancel(numbers)
        clear_away(job, ())
        if isinstance(error, (OSError, shutil.Error)):
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{job}: cannot be written ({reason}); nothing was submitted") from None
        raise
    (job / "slurm_job_id").write_text("\n".join(numbers) + "\n")
    print(f"submitted jobs {', '.join(numbers)}: {job} (logs/ has one file per task)")
    print(f"scancel {' '.join(numbers)} ends all; the same command goes on from there")
    return 0


def cancel(numbers: Sequence[str]) -> None:
    """Of a chain that is not whole."""
    if numbers:
        subprocess.run(["scancel", *numbers], check=False)


def steps(tasks: int) -> list[Step]:
    """The chain: tasks of an array stop by themselves before a stage that looks at all sources together."""
    chain = [Step("shards-1", ("--worker", f"$task/{tasks}"), tasks)]
    for number, name in enumerate(GLOBAL, start=2):
        chain.append(Step(name, ("--until", name)))
        chain.append(Step(f"shards-{number}", ("--worker", f"$task/{tasks}"), tasks))
    return [*chain, Step("table", ())]


def render(args: argparse.Namespace, cfg: PipelineConfig, job: Path, step: Step) -> str:
    """A job: pipeline.sbatch with its settings."""
    job, out = job.absolute(), Path(cfg.out).absolute()
    at_once = f"%{args.at_once}" if args.at_once else ""
    options = [
        f"--job-name={out.name}-{step.name}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={args.cpus}",
        f"--chdir={Path.cwd()}",
        f"--output={job}/logs/{step.name}-{'%A_%a' if step.tasks else '%j'}.log",
        f"--signal=B:USR2@{SIGNAL_S}",
        *(f"--{key}={getattr(args, key)}" for key in ("time", "partition", "account", "qos") if getattr(args, key)),
        *([f"--array=0-{step.tasks - 1}{at_once}"] if step.tasks else []),
        *args.sbatch,
    ]
    workers = [] if cfg.engine.workers else [f"engine.workers={args.cpus}"]
    words = [shlex.quote(str(job / "config.yaml")), *workers, *step.options]
    settings = [
        *(f"#SBATCH {option}" for option in options),
        f"OUT={shlex.quote(str(out))} JOB={shlex.quote(str(job))} CODE={shlex.quote(str(job / 'code'))}",
        f"PYTHON={shlex.quote(args.python or sys.executable)} CPUS={args.cpus}",
        f"task=${{SLURM_ARRAY_TASK_ID:-0}}\nset -- {' '.join(words)}",
    ]
    before, after = TEMPLATE.read_text().split(MARK)
    return before + "\n".join(settings) + "\n" + after
