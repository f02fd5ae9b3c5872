"""Submit a training run to SLURM: ``python launch/submit.py CONFIG.yaml --nodes 2 --time 4:00:00 [key=value ...]``.

The configuration is read and checked here, so that a mistake costs a second and not a place in the queue. What was read
and the code are copied into ``RUN/jobs/N/``: every attempt of the job runs exactly these, whatever becomes of the
checkout. The job is launch/slurm.sbatch with its settings filled in; it queues itself again until the run is finished.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opensora.utils import signal_handler  # noqa: E402

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from launch.slurm import pipeline  # noqa: E402
from launch.slurm.jobs import (  # noqa: E402
    clear_away,
    copy_code,
    describe,
    next_folder,
    require_sbatch,
    sbatch,
    time_limit,
)
from opensora.cli.main import run_cli  # noqa: E402
from opensora.config.load import load_config, save  # noqa: E402
from opensora.config.run import RunConfig  # noqa: E402
from opensora.train.setup import check  # noqa: E402
from opensora.utils.command_line.arguments import Parser, place, whole, word  # noqa: E402
from opensora.utils.errors import UserError  # noqa: E402
from opensora.utils.files.code_digest import PACKAGES  # noqa: E402
from opensora.utils.files.untrusted import short  # noqa: E402
from opensora.utils.files.user_files import read_text  # noqa: E402

TEMPLATE = ROOT / "launch" / "slurm.sbatch"
MARK = "# settings of launch/submit.py\n"
MIN_SIGNAL_S = 30  # SLURM may be so late, and saving takes its time
MAX_SIGNAL_S = 65535  # of sbatch --signal
MAX_NODES, MAX_PER_NODE, MAX_CPUS = 65536, 1024, 4096


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if argv[:1] == ["pipeline"]:
        return pipeline.main(argv[1:])
    args, overrides = parse(argv)
    runs = configurations(args.config, overrides, args.array)
    world = args.nodes * args.tasks_per_node
    for cfg in runs:
        if args.check:
            check(cfg, world)
    head = load_config(RunConfig, args.config, overrides)
    if args.dry_run:
        print(render(args, head, runs, Path(head.folder, "jobs", "N")), end="")
        return 0
    require_sbatch()
    with signal_handler.stopped_in_one_line():  # as from the command line, for those who call this
        return submit(args, head, runs, argv)


def submit(args: argparse.Namespace, head: RunConfig, runs: Sequence[RunConfig], argv: Sequence[str]) -> int:
    """Make the job's folder and give it to sbatch; without a job in the queue no folder is left. Returns the exit code.

    Raises:
        UserError: the folder cannot be written, or sbatch refused the job; says how.
    """
    jobs = head.folder / "jobs"
    made = [path for path in (jobs, *jobs.parents) if not path.exists()]
    job = jobs
    try:
        job = next_folder(jobs)
        freeze(job, runs, argv)
        script = job / "job.sbatch"
        script.write_text(render(args, head, runs, job))
        number = sbatch(script)
    except BaseException as error:
        clear_away(job if job != jobs else None, made)
        if isinstance(error, KeyboardInterrupt):
            print(f"interrupted: {job} is removed; squeue --name={head.name} shows if a job was queued all the same")
            return 128 + getattr(error, "number", signal.SIGINT)  # as signal_handler.stopped_in_one_line says it
        if isinstance(error, (OSError, shutil.Error)):
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{job}: cannot be written ({reason}); nothing was submitted") from None
        raise
    (job / "slurm_job_id").write_text(f"{number}\n")
    print(f"submitted job {number}: {job} (logs/ has one file per rank)")
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and what is left for the configuration.

    Raises:
        UserError: an option that cannot be.
    """
    about = (__doc__ or "").split("\n\n")[0]
    parser = Parser(prog="python launch/submit.py", description=about)
    parser.add_argument("config", help="a training configuration; overrides section.key=value may stand anywhere")
    parser.add_argument("--nodes", type=whole(1, MAX_NODES), default=1)
    parser.add_argument("--gpus-per-node", type=whole(0, MAX_PER_NODE), default=8, help="0: training runs on CPUs")
    parser.add_argument("--tasks-per-node", type=whole(1, MAX_PER_NODE), help="processes; default: one per GPU")
    parser.add_argument("--cpus-per-task", type=whole(1, MAX_CPUS), help="cores of a process")
    parser.add_argument(
        "--time", type=time_limit, help="limit of one attempt, such as 4:00:00; the run goes on in the next"
    )
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", type=word)
    parser.add_argument("--array", type=place, metavar="FILE", help="a run for every line of FILE, which has overrides")
    parser.add_argument(
        "--container", type=word, metavar="IMAGE", help="image for the tasks (srun --container-image, by pyxis)"
    )
    parser.add_argument(
        "--mounts", type=word, help="of the container, FROM:TO[,...]; default: this folder and the run's"
    )
    parser.add_argument(
        "--python", type=word, help="interpreter of the tasks; default: this one, or python in a container"
    )
    parser.add_argument(
        "--signal",
        type=whole(MIN_SIGNAL_S, MAX_SIGNAL_S),
        default=120,
        metavar="S",
        help="seconds before the limit to save and stop",
    )
    parser.add_argument(
        "--sbatch", type=word, action="append", default=[], metavar="OPTION", help="any other, as --sbatch=--mem=0"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="where the data cannot be seen from here"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job, write nothing")
    args, overrides = parser.parse_known_args(argv)
    if args.tasks_per_node is None:
        args.tasks_per_node = args.gpus_per_node or 1
    if args.gpus_per_node and args.tasks_per_node > args.gpus_per_node:
        raise UserError(
            f"--tasks-per-node={args.tasks_per_node}: must be at most --gpus-per-node={args.gpus_per_node}, "
            "as a process has a GPU of its own"
        )
    return args, overrides


def configurations(path: str, overrides: Sequence[str], array: Path | None) -> list[RunConfig]:
    """The run, or one per line of ``array``; the i-th is called NAME-i unless its line names it.

    Raises:
        UserError: a mistake in one of them, or two in one folder.
    """
    if array is None:
        return [load_config(RunConfig, path, overrides)]
    text = read_text(array, f"--array={array}")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise UserError(f"--array={array}: no lines; give one with overrides for every run")
    name = load_config(RunConfig, path, overrides).name
    runs = [
        load_config(RunConfig, path, [*overrides, f"name={name}-{i}", *_words(array, s)]) for i, s in enumerate(lines)
    ]
    folders = [str(cfg.folder) for cfg in runs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise UserError(f"--array={array}: two runs in {twice}; give every run another name")
    return runs


def _words(array: Path, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"--array={array}: {error} in the line {short(repr(line))}") from None


def freeze(job: Path, runs: Sequence[RunConfig], argv: Sequence[str]) -> None:
    """Copy code and configurations into ``job``, with a note of what they are."""
    copy_code(job, (*PACKAGES, "launch"))
    for i, cfg in enumerate(runs):
        save(cfg, job / f"config-{i}.yaml")
    (job / "logs").mkdir()
    describe(job, argv, [cfg.folder for cfg in runs])


def render(args: argparse.Namespace, head: RunConfig, runs: Sequence[RunConfig], job: Path) -> str:
    """The job: launch/slurm.sbatch with its settings."""
    job = job.absolute()
    many = args.array is not None
    options = [
        f"--job-name={head.name}",
        f"--nodes={args.nodes}",
        f"--ntasks-per-node={args.tasks_per_node}",
        f"--chdir={Path.cwd()}",
        f"--output={job}/logs/{'%A_%a' if many else '%j'}.log",
        f"--signal=B:USR2@{args.signal}",
        *([f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []),
        *([f"--cpus-per-task={args.cpus_per_task}"] if args.cpus_per_task else []),
        *(f"--{key}={getattr(args, key)}" for key in ("time", "partition", "account", "qos") if getattr(args, key)),
        *([f"--array=0-{len(runs) - 1}"] if many else []),
        *args.sbatch,
    ]
    python = args.python or ("python" if args.container else sys.executable)
    srun = []
    if args.container:
        mounts = args.mounts or ",".join(
            f"{folder}:{folder}" for folder in (Path.cwd(), *(cfg.folder.absolute() for cfg in runs))
        )
        srun = [
            f"--container-image={args.container}",
            f"--container-mounts={mounts}",
            f"--container-workdir={Path.cwd()}",
        ]
    if args.cpus_per_task:
        srun.append(f"--cpus-per-task={args.cpus_per_task}")  # which srun does not take from the job since 22.05
    task = "${SLURM_ARRAY_TASK_ID:-0}"
    settings = [
        *(f"#SBATCH {option}" for option in options),
        f"RUNS=({shlex.join(str(cfg.folder.absolute()) for cfg in runs)})",
        f"RUN=${{RUNS[{task}]}} JOB={shlex.quote(str(job))}/{task}"
        if many
        else f"RUN=${{RUNS[0]}} JOB={shlex.quote(str(job))}",
        f"CODE={shlex.quote(str(job / 'code'))} PYTHON={shlex.quote(python)}",
        f"SRUN_OPTIONS=({shlex.join(srun)})",
        f"set -- {shlex.quote(str(job))}/config-{task}.yaml",
    ]
    before, after = TEMPLATE.read_text().split(MARK)
    return before + "\n".join(settings) + "\n" + after


if __name__ == "__main__":
    run_cli(main)
