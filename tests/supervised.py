"""A supervisor in a process of its own: tests send it signals, which would be theirs too in the process that runs them.

``python -m tests.supervised`` reads what it is to do as JSON, and writes how that went as its last line.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from opensora.serve import supervisor
from opensora.serve.supervisor import Child, Supervisor
from tests.conftest import ROOT
from tests.patience import patience

WAIT_S = 60.0  # for what takes a moment on a machine with nothing else to do


class Supervised:
    """A running supervisor of children that are a line of Python each."""

    def __init__(
        self, children: Mapping[str, str], *, grace_s: float = 5.0, address: str | None = None, **constants: float
    ) -> None:
        """
        Args:
            children: name -> code.
            constants: of ``opensora/serve/supervisor.py``; waits are short unless they say otherwise.
        """
        quick = {"FIRST_WAIT_S": 0.01, "LOOK_S": 0.01, **constants}
        told = json.dumps({"children": dict(children), "grace_s": grace_s, "address": address, "constants": quick})
        command = [sys.executable, "-m", "tests.supervised", told]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def interrupt(self, when: Callable[[], object]) -> None:
        """Ctrl-C as soon as ``when()`` holds.

        Raises:
            AssertionError: it does not, or the supervisor has left before.
        """
        until = time.monotonic() + patience(WAIT_S)
        while not when():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until, "what is waited for does not come"
            time.sleep(0.02)
        self.process.send_signal(signal.SIGINT)

    def result(self) -> tuple[dict[str, Any], str]:
        """(exit code, and of each child: its code, starts, failures in a row), and what was said.

        Raises:
            AssertionError: the supervisor itself was ended.
        """
        try:
            out, err = self.process.communicate(timeout=patience(WAIT_S))
        finally:
            self.process.kill()
        assert self.process.returncode == 0, (self.process.returncode, err)
        return json.loads(out.splitlines()[-1]), err


def main() -> None:
    told = json.loads(sys.argv[1])
    for name, value in told["constants"].items():
        setattr(supervisor, name, value)
    children = [Child(name, [sys.executable, "-c", code]) for name, code in told["children"].items()]
    code = Supervisor(children, told["address"], told["grace_s"]).run()
    how = {child.name: {"code": child.code, "starts": child.starts, "failures": child.failures} for child in children}
    print(json.dumps({"code": code, "children": how}))


if __name__ == "__main__":
    main()
