"""A group on this host, as torchrun starts it: ``python -m opensora.serve.worker.start N CONFIG.yaml [key=value ...]``.

What torchrun says at length when a process fails is left out, and the exit code is that of the process that failed
first: whoever restarts groups goes by it.
"""

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from opensora.utils.signal_handler import LAUNCHER

QUIET = ("", ".agent.server.api", ".multiprocessing.api", ".multiprocessing.errors")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    for name in QUIET:
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    processes, *words = argv
    options = ["--standalone", "--nproc_per_node", processes, "--log-dir", os.devnull, "-m", "opensora.serve.worker"]
    try:
        torchrun([*options, *words])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
