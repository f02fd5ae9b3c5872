"""What commands say, and after how many seconds."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.hosts.lab import HostProcess


@dataclass(repr=False)
class Heard:
    """Lines on standard error of some processes, from when this is made."""

    processes: Sequence[HostProcess]
    begun: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, int, str]] = field(default_factory=list)  # seconds, number of the process, line
    ended: dict[int, float] = field(default_factory=dict)  # seconds, by number of the process
    _read: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._read = [len(process.err) for process in self.processes]

    def listen(self, limit_s: float, without: Sequence[int] = ()) -> None:
        """Until all have ended but those in ``without``.

        Raises:
            AssertionError: some still run after ``limit_s`` seconds.
        """
        waiting = set(range(len(self.processes))) - set(without)
        while waiting - self.ended.keys():
            for i, process in enumerate(self.processes):
                over = process.poll() is not None
                self._take(i, process.err)
                if over:
                    self.ended.setdefault(i, self.now())
            assert self.now() < limit_s or not waiting - self.ended.keys(), (
                f"still running after {limit_s:g} s: {sorted(waiting - self.ended.keys())}\n{self}"
            )
            time.sleep(0.05)

    def now(self) -> float:
        """Seconds since this was made."""
        return time.monotonic() - self.begun

    def first(self, pattern: str) -> tuple[float, str]:
        """(seconds, line) of the first line that matches.

        Raises:
            AssertionError: none does.
        """
        for seconds, _, line in self.lines:
            if re.search(pattern, line):
                return seconds, line
        raise AssertionError(f"nobody said {pattern!r}:\n{self}")

    def codes(self) -> list[int | None]:
        """Exit codes."""
        return [process.returncode for process in self.processes]

    def __repr__(self) -> str:
        said = "\n".join(f"{seconds:6.1f} s [{i}] {line}" for seconds, i, line in self.lines)
        return f"exit codes {self.codes()}\n{said}"

    def _take(self, i: int, said: str) -> None:
        whole = said.rfind("\n") + 1
        self.lines += [(self.now(), i, line) for line in said[self._read[i] : whole].splitlines()]
        self._read[i] = max(whole, self._read[i])
