#!/usr/bin/env bash
# launch/torchrun.sh N SCRIPT ARGS...: N processes on this machine. The exit code is that of the process that failed
# first (2: bad configuration, 75: state saved, run again), without torchrun's own traceback.
set -euo pipefail
if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/torchrun.sh PROCESSES SCRIPT [ARGS...]" >&2
    exit 2
fi
processes="$1"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$root/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi

# Rank 0 hosts the store of the process group, instead of the launcher lending its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Without a share each, every process starts as many threads as there are cores.
cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
# Passed on to the ranks, which save and exit.
export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"

exec "$PYTHON" -c '
import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors"):
    logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
try:
    main(sys.argv[1:])
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode not in (2, 70, 75):
        print(f"rank {rank} failed first, exit code {failure.exitcode}", file=sys.stderr)
    sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
except SignalException as error:
    sys.exit(128 + int(error.sigval))
' --standalone --nproc-per-node "$processes" "$@"
