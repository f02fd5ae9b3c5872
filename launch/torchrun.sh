#!/usr/bin/env bash
# launch/torchrun.sh [OPTIONS] N SCRIPT ARGS...: N processes on this machine, or on each of several. The exit code is that
# of the process that failed first (2: bad configuration, 75: state saved, run again), without torchrun's own traceback.
#
#   --nodes K               machines; start the same command on each of them
#   --rendezvous HOST:PORT  with --nodes: the first machine, and a port that is free there
#   --restarts M            start all processes again, at most M times, when one fails (not after 2 and 75)
#   --shutdown-timeout S    seconds that processes get to save and leave after a signal, before they are killed (3600)
#
# SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the processes; training saves and leaves
# with 75. SIGTERM, SIGINT or SIGQUIT again makes them leave at once.
set -euo pipefail
trap 'echo "stopped before the first process was started, nothing is lost" >&2; exit 75' TERM INT HUP QUIT USR1 USR2
usage() {
    echo "usage: launch/torchrun.sh [--nodes K --rendezvous HOST:PORT] [--restarts M] [--shutdown-timeout S]" \
        "PROCESSES SCRIPT [ARGS...]" >&2
    exit 2
}
nodes=1 rendezvous="" restarts=0 shutdown=3600 given=" "
while [[ "${1:-}" == --* ]]; do
    [[ $# -ge 2 ]] || usage
    [[ "$given" != *" $1 "* ]] || { echo "error: $1 is there twice; give it once" >&2; exit 2; }
    given="$given$1 "
    case "$1" in
        --nodes) nodes="$2" ;;
        --rendezvous) rendezvous="$2" ;;
        --restarts) restarts="$2" ;;
        --shutdown-timeout) shutdown="$2" ;;
        *) usage ;;
    esac
    shift 2
done
[[ $# -ge 2 && "$1" =~ ^[1-9][0-9]*$ && "$nodes" =~ ^[1-9][0-9]*$ ]] || usage
[[ "$restarts" =~ ^[0-9]+$ && "$shutdown" =~ ^[1-9][0-9]*$ ]] || usage
if [[ "$nodes" == 1 ]]; then
    [[ -z "$rendezvous" ]] || usage
    where=(--standalone)
else
    [[ "$rendezvous" =~ ^[^:]+:[0-9]+$ ]] || usage
    where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id opensora)
fi
processes="$1"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$root/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi

# Rank 0 hosts the store of the process group, anew in every attempt. In the launcher's own, processes started again
# would read what those before them left.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Without a share each, every process starts as many threads as there are cores.
cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
export OPENSORA_SHUTDOWN_TIMEOUT="$shutdown"

# torch is to leave signals to elastic.py: its own handlers end the processes after 30 s, saved or not. It reads the option
# alone, and overwrites the variable TORCHELASTIC_SIGNALS_TO_HANDLE with it. This log folder makes it leave none in /tmp.
exec "$PYTHON" "$root/launch/elastic.py" "${where[@]}" --signals-to-handle none --log-dir /dev/null \
    --max-restarts "$restarts" --nproc-per-node "$processes" "$@"
