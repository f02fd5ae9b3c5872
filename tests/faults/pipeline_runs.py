"""Runs of the data pipeline as processes: started, killed, and what they leave."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.outputs import Done, Output, read_output
from tests.conftest import ROOT
from tests.patience import patience

MARK = "OPENSORA_TEST_RUN"  # in the environment of all processes of a command
CONFIG = """
source: {source}
out: {out}
shard_size: 4
limits: {{attempts: 3}}
engine: {{workers: 2}}
"""


class Command:
    """One command in a process group of its own."""

    def __init__(
        self,
        config: Path,
        *words: str,
        program: str = "tests.faults.pipeline_stages",
        prefix: Sequence[str] = (),
        **more: Any,
    ) -> None:
        self.mark = uuid.uuid4().hex
        more["env"] = os.environ | {MARK: self.mark, "PYTHONUNBUFFERED": "1"} | more.get("env", {})
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", program, str(config), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            cwd=ROOT,
            **more,
        )
        self.said = ""

    def end(self, limit_s: float = 100) -> int:
        """Exit code. ``limit_s``: of an idle machine."""
        limit_s = patience(limit_s)
        try:
            self.said = self.process.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            self.kill_group()
            raise AssertionError(f"not done within {limit_s:g} s: {self.process.communicate()[0]}") from None
        return self.process.returncode

    def kill_group(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The command alone."""
        self.process.send_signal(number)

    def others(self, word: str = "") -> list[int]:
        """Processes of the command beside the first one, of whose command line ``word`` is a part."""
        return [pid for pid in marked(self.mark) if pid != self.process.pid and word in command_line(pid)]

    def wait_until(self, what: Callable[[], object], limit_s: float = 60) -> None:
        """Until it is so, while the command works."""
        deadline = time.monotonic() + patience(limit_s)
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill_group()
                raise AssertionError(f"ended, or not so in time: {self.process.communicate()[0]}")
            time.sleep(0.005)

    def wait_gone(self, limit_s: float = 30) -> None:
        """Until no process of the command is left."""
        deadline = time.monotonic() + patience(limit_s)
        while left := self.others():
            assert time.monotonic() < deadline, [command_line(pid) for pid in left]
            time.sleep(0.02)


def marked(mark: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    yield int(entry.name)
            except OSError:  # gone meanwhile
                continue


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def run(config: Path, *words: str, **more: Any) -> str:
    """What a command says that ends well."""
    command = Command(config, *words, **more)
    assert command.end() == 0, command.said
    return command.said


def outputs(out: Path) -> dict[str, bytes]:
    """Every output of every stage: its name, which holds key and digest, and its bytes."""
    paths = [
        path for path in out.glob("*/*.parquet") if not path.name.startswith(".")
    ]  # those are halves, of the killed
    assert paths
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def journals(out: Path) -> list[Path]:
    """What is left of shards that are not whole."""
    return list(out.glob("*/.*.journal"))


def records(journal: Path) -> int:
    """How many a journal holds, that are whole: each begins with its length and its checksum."""
    try:
        content = journal.read_bytes()
    except FileNotFoundError:  # its shard is whole now
        return 0
    count = at = 0
    while at + 8 <= len(content):
        at += 8 + int.from_bytes(content[at : at + 4], "little")
        count += at <= len(content)
    return count


def results(out: Path, stage: str) -> dict[str, tuple[Done, Any]]:
    """Source -> what became of it in a stage, and its rows."""
    found: dict[str, tuple[Done, Any]] = {}
    for path in sorted((out / stage).glob("*.parquet")):
        output = read_output(path)
        assert isinstance(output, Output)
        found |= {done.source: (done, rows) for done, rows in output.by_source()}
    return found


def errors(out: Path, *stages: str) -> dict[str, Done]:
    """Source -> its error, of whichever stage."""
    found = (done for stage in stages for done, _ in results(out, stage).values())
    return {done.source: done for done in found if done.error}
