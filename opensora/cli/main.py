"""Runs a command: its errors in one line, on one rank, with the exit code that says what it was."""

import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from opensora.utils import signal_handler
from opensora.utils.command_line.command import abandon_output, be_printable, ending_of, finish_output
from opensora.utils.console import launched_rank
from opensora.utils.errors import UserError

PEER_WAIT_S = 5.0  # how long other ranks leave the word to rank 0 before they speak themselves


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call ``main(argv)`` and exit with its code, or as ``ending_of`` says: what is the matter with inputs and disks is
    one line on stderr, a mistake in the program a traceback. A signal is one line and 128 plus its number, unless the
    command has its own way with signals.

    Of several ranks only rank 0 tells a ``UserError``. The others wait before they exit, because a launcher that sees
    one process end kills the rest, and rank 0 must have had its say; one still alive then has an error of its own, and
    says it. Other errors are told by every rank that has them.
    """
    be_printable()
    try:
        with signal_handler.stopped_in_one_line():
            code = main(sys.argv[1:])
            finish_output()
    except BaseException as error:
        ending = ending_of(error)
        if ending is None:
            raise
        abandon_output()
        _leave(error, *ending)
    raise SystemExit(code or 0)


def _leave(error: BaseException, line: str, code: int) -> NoReturn:
    """Say the line, if it is this rank's to say, and exit."""
    rank = launched_rank()
    if rank != 0 and isinstance(error, UserError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PEER_WAIT_S)
    if rank != 0 and isinstance(error, KeyboardInterrupt):
        line = ""
    if rank != 0 and isinstance(error, (UserError, OSError)):
        line = line.replace("error: ", f"error: rank {rank}: ", 1)
    if line:
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # one write: other ranks' lines stay whole
    raise SystemExit(code) from None
