"""Whether a SLURM job should be queued again after an attempt, and what its attempts were.

    python attempts.py newest --run outputs/first
    python attempts.py decide --run outputs/first --job outputs/first/jobs/1 --attempt 2 --begun 100 --code 75

The first prints the newest committed step; the second prints ``requeue`` or ``stop`` with the reason, and adds a line
to ``attempts.jsonl`` of the job. Standard library only: it runs on the first node, outside of any container.

A job goes on as long as it makes progress, that is, as long as the newest committed step grows. What went wrong is not
asked beyond the few exit codes that settle it: a lost node and a mistake of ours look alike from here.
"""

from __future__ import annotations  # the first node may have an older Python than the project

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

DONE, BAD_CONFIGURATION, SAVED = 0, 2, 75  # exit codes of training
MAX_WITHOUT_PROGRESS = 3  # attempts in a row
STEP = re.compile(r"step-([0-9]{8,18})", re.ASCII)


class Attempt(NamedTuple):
    """One start of the job that ended, as far as this file knows; those that SLURM ended itself are missing."""

    attempt: int  # SLURM_RESTART_COUNT
    code: int  # exit code of training
    begun: int  # newest committed step when it began
    step: int  # newest committed step when it ended
    terminated: bool = False  # SLURM ended the batch script: scancel, requeue, or the end of a grace period
    preempted: bool = False  # a job of a higher partition wanted the nodes


class Verdict(NamedTuple):
    """What to do now."""

    requeue: bool
    reason: str


def decide(history: list[Attempt], now: Attempt) -> Verdict:
    """What to do after ``now``. ``history``: earlier attempts of the same job, oldest first."""
    if now.code == DONE:
        return Verdict(False, "finished")
    if now.code == BAD_CONFIGURATION:
        return Verdict(False, "the configuration was refused; see the log of rank 0")
    if now.terminated:
        return Verdict(False, "the job was ended; if SLURM did it, without scancel, it queues it again by itself")
    without = attempts_without_progress([*history, now])
    if without >= MAX_WITHOUT_PROGRESS:
        return Verdict(False, f"{without} attempts in a row ended at step {now.step} without progress")
    if now.code == SAVED:
        return Verdict(True, f"saved step {now.step}")
    left = MAX_WITHOUT_PROGRESS - without
    return Verdict(True, f"exit code {now.code} at step {now.step}; gives up after {left} more without progress")


def attempts_without_progress(attempts: list[Attempt]) -> int:
    """How many of the last attempts committed nothing new. Pre-empted ones do not count: they had no time."""
    count = 0
    for one in reversed(attempts):
        if one.step > one.begun:
            break
        count += not one.preempted
    return count


def newest_step(run: Path) -> int:
    """Updates in the newest committed checkpoint of a run's folder; 0 if there is none.

    A copy under the name of another step does not count.
    """
    found = ((STEP.fullmatch(path.parent.name), path) for path in run.glob("checkpoints/step-*/manifest.json"))
    return max((int(name[1]) for name, path in found if name and _stated(path) in (None, int(name[1]))), default=0)


def _stated(manifest: Path) -> int | None:
    """The step that a manifest states; None where it cannot be read."""
    if not manifest.is_file():
        return None
    try:
        step = json.loads(manifest.read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def read_history(path: Path) -> list[Attempt]:
    """What ``main`` wrote; lines that are damaged or cut short are left out.

    Raises:
        OSError: it is there and cannot be read.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError("not a file")
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record: dict[str, Any] = json.loads(line.strip(b"\0"))
            found.append(Attempt(**{name: record[name] for name in Attempt._fields}))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [one for one in found if all(type(value) in (int, bool) for value in one)]


def main(argv: list[str]) -> int:
    """Returns 0 if the job should be queued again, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("newest", "decide"))
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--job", type=Path, help="the job's folder")
    parser.add_argument("--attempt", type=int, default=0, help="SLURM_RESTART_COUNT")
    parser.add_argument("--begun", type=int, default=0, help="newest committed step when the attempt began")
    parser.add_argument("--code", type=int, default=1, help="exit code of training")
    parser.add_argument("--terminated", action="store_true", help="the batch script got SIGTERM")
    parser.add_argument("--preempted", action="store_true", help="SLURM says that the job was pre-empted")
    args = parser.parse_args(argv)
    if args.what == "newest":
        print(newest_step(args.run))
        return 0
    if args.job is None:
        parser.error("--job is missing")
    history = args.job / "attempts.jsonl"
    now = Attempt(args.attempt, args.code, args.begun, newest_step(args.run), args.terminated, args.preempted)
    try:
        verdict = decide(read_history(history), now)
        with history.open("a") as file:
            file.write(json.dumps({**now._asdict(), **verdict._asdict()}) + "\n")
    except OSError as error:  # without it attempts cannot be counted, and might never end
        verdict = Verdict(False, f"{history}: {error.strerror or error}; move it away, and submit again")
    print(f"{'requeue' if verdict.requeue else 'stop'}: {verdict.reason}")
    return 0 if verdict.requeue else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
