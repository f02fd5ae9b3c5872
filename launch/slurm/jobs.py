"""What every job of ours has: a folder with the code that it runs, a note of what it is, and a number in the queue."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from opensora.utils.errors import UserError
from opensora.utils.files.code_digest import code_digest
from opensora.utils.files.untrusted import short

ROOT = Path(__file__).resolve().parents[2]


def time_limit(text: str) -> str:
    """A time as sbatch takes it: minutes, [hours:]minutes:seconds, or days-hours[:minutes[:seconds]]."""
    if not re.fullmatch(r"[0-9]{1,7}(?::[0-9]{1,2}){0,2}|[0-9]{1,5}-[0-9]{1,2}(?::[0-9]{1,2}){0,2}", text):
        allowed = "must be a time such as 30, 4:00:00 or 1-12:00:00"
        raise argparse.ArgumentTypeError(f"={short(repr(text), 40)}: {allowed}")
    return text


def require_sbatch() -> None:
    """Raises: UserError: there is none here."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit where SLURM is, or look at the job with --dry-run")


def next_folder(jobs: Path) -> Path:
    """A new folder ``jobs/N``, N counting up."""
    jobs.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in jobs.iterdir() if path.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (jobs / str(number)).mkdir()
        except FileExistsError:  # somebody else submits at the same time
            continue
        return jobs / str(number)


def copy_code(job: Path, packages: Sequence[str]) -> None:
    """Into ``job/code``, which the job runs whatever becomes of the checkout."""
    for package in packages:
        shutil.copytree(ROOT / package, job / "code" / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def describe(job: Path, argv: Sequence[str], folders: Sequence[Path]) -> None:
    """Write ``job/job.json``: the command, the code, and where the runs are."""
    about = {
        "command": shlex.join(["python", "launch/submit.py", *argv]),
        "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
        "code": code_digest(),
        "commit": git("rev-parse", "HEAD"),
        "changed": (git("status", "--porcelain") or "").splitlines(),
        "folders": [str(folder) for folder in folders],
    }
    (job / "job.json").write_text(json.dumps(about, indent=2) + "\n")


def git(*command: str) -> str | None:
    """What git says of the checkout; None where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def clear_away(job: Path | None, made: Sequence[Path]) -> None:
    """Remove the folder of a job that is not in the queue, and the folders made for it that are empty then."""
    if job is not None:
        shutil.rmtree(job, ignore_errors=True)
    for path in made:
        with contextlib.suppress(OSError):  # somebody else submits at the same time
            path.rmdir()


def sbatch(script: Path, *options: str) -> str:
    """The number of the job in the queue.

    Raises:
        UserError: sbatch refused it; says how.
    """
    # Ctrl-C is for this process: sbatch must not end between queueing a job and saying so.
    try:
        process = subprocess.Popen(
            [shutil.which("sbatch") or "sbatch", "--parsable", *options, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(f"sbatch: cannot be run ({error.strerror}); nothing was submitted") from None
    try:
        out, err = process.communicate()
    except BaseException:
        process.terminate()
        out, err = process.communicate()
        if not out.strip():
            raise
    else:
        if process.returncode:
            said = " ".join((err or out).split()) or f"exit code {process.returncode}, without a word"
            raise UserError(f"sbatch: {said.removeprefix('sbatch: ')}; nothing was submitted, and nothing is left")
    return out.strip().split(";")[0]
