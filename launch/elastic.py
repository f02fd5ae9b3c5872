"""torchrun for launch/torchrun.sh: exit codes are kept, some are final, and it says one line instead of pages."""

import logging
import os
import socket
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import main

FINAL = (2, 75)  # bad configuration, which would be refused again; stopped on purpose, the state is saved
QUIET = ("", ".agent.server.api", ".multiprocessing.api", ".multiprocessing.errors")
ANSWER_S = 10.0  # of a store that is alive


class Agent(api.LocalElasticAgent):
    """Starts processes again after a failure, but not after one that is final."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            error = ChildFailedError("training", result.failures)
            rank, failure = error.get_first_failure()
            if failure.exitcode in FINAL:
                raise error
            left, most = self._remaining_restarts, worker_group.spec.max_restarts
            again = f"; starting again ({most - left + 1} of {most})" if left else ""
            print(f"rank {rank} failed first, exit code {failure.exitcode}{again}", file=sys.stderr, flush=True)
        return result


def check_endpoint(argv: list[str]) -> None:
    """End with one line if a stranger listens where the machines should meet: torch would wait for it without end."""
    if "--rdzv-endpoint" not in argv:
        return
    host, _, port = argv[argv.index("--rdzv-endpoint") + 1].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError:
        return  # nobody is there yet
    limit = timedelta(seconds=ANSWER_S)
    probe = threading.Thread(target=lambda: dist.TCPStore(host, int(port), is_master=False, timeout=limit), daemon=True)
    probe.start()
    probe.join(ANSWER_S)
    if probe.is_alive():
        print(f"error: {host}:{port} is in use by another program; give --rendezvous another port", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # the probe cannot be ended


if __name__ == "__main__":
    for name in QUIET:
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    api.LocalElasticAgent = Agent  # what torchrun makes; it has no option for it
    try:
        check_endpoint(sys.argv)
        main(sys.argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + int(error.sigval))
