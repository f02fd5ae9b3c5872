#!/usr/bin/env bash
# launch/torchrun.sh [OPTIONS] N SCRIPT ARGS...: N processes on this machine, or on each of several. The exit code is that
# of the process that failed first (2: bad configuration, 75: state saved, run again), without torchrun's own traceback.
#
#   --nodes K               machines; start the same command on each of them
#   --nodes MIN:MAX         begin with MIN of them, go on with what is left, take in up to MAX
#   --rendezvous HOST:PORT  with --nodes: an address of one of the machines, or its name, and a port that is free there
#   --restarts M            start all processes again, at most M times, when one fails (not after 2 and 75) or is gone
#   --timeout S             seconds until all machines must have come, or have come back (600)
#   --last-call S           seconds without a newcomer until fewer than MAX begin (30)
#   --heartbeat-timeout S   seconds of silence until a machine is gone (15)
#   --id NAME               of the run, on all machines; without one, machines with another command belong to another run
#   --shutdown-timeout S    seconds that processes get to save and leave after a signal, before they are killed (3600)
#
# SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the processes; training saves and leaves
# with 75. SIGTERM, SIGINT or SIGQUIT again makes them leave at once.
set -euo pipefail
trap 'echo "stopped before the first process was started, nothing is lost" >&2; exit 75' TERM INT HUP QUIT USR1 USR2
usage() {
    echo "usage: launch/torchrun.sh [--nodes K|MIN:MAX --rendezvous HOST:PORT [--timeout S] [--last-call S]" \
        "[--heartbeat-timeout S] [--id NAME]] [--restarts M] [--shutdown-timeout S] PROCESSES SCRIPT [ARGS...]" >&2
    exit 2
}
nodes=1 rendezvous="" restarts=0 shutdown=3600 timeout=600 last_call=30 heartbeat=15 id=opensora given=" "
while [[ "${1:-}" == --* ]]; do
    [[ $# -ge 2 ]] || usage
    [[ "$given" != *" $1 "* ]] || { echo "error: $1 is there twice; give it once" >&2; exit 2; }
    given="$given$1 "
    case "$1" in
        --nodes) nodes="$2" ;;
        --rendezvous) rendezvous="$2" ;;
        --restarts) restarts="$2" ;;
        --shutdown-timeout) shutdown="$2" ;;
        --timeout) timeout="$2" ;;
        --last-call) last_call="$2" ;;
        --heartbeat-timeout) heartbeat="$2" ;;
        --id) id="$2" ;;
        *) usage ;;
    esac
    shift 2
done
number='^[1-9][0-9]{0,8}$'
[[ $# -ge 2 && "$1" =~ $number && "$nodes" =~ ^([1-9][0-9]{0,5})(:([1-9][0-9]{0,5}))?$ ]] || usage
least="${BASH_REMATCH[1]}" most="${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}"
[[ "$restarts" =~ ^[0-9]{1,9}$ && "$shutdown" =~ $number && "$timeout" =~ $number && "$heartbeat" =~ $number ]] || usage
[[ "$last_call" =~ ^[0-9]{1,9}$ && "$id" =~ ^[A-Za-z0-9._-]{1,100}$ && $least -le $most ]] || usage
if [[ "$most" == 1 ]]; then
    [[ -z "$rendezvous" && "$given" != *" --timeout "* && "$given" != *" --last-call "* ]] || usage
    [[ "$given" != *" --heartbeat-timeout "* && "$given" != *" --id "* ]] || usage
    where=(--standalone)
else
    place='^(\[[0-9A-Fa-f:.]+(%[^]]+)?\]|[^]:[]+):([1-9][0-9]{0,4})$'  # a name, an IPv4 address, an IPv6 one in brackets
    [[ "$rendezvous" =~ $place && ${BASH_REMATCH[3]} -lt 65536 ]] || usage
    where=(--nnodes "$least:$most" --rdzv-backend machines --rdzv-endpoint "$rendezvous" --rdzv-id "$id" --rdzv-conf
        "timeout=$timeout,last_call_timeout=$last_call,heartbeat_timeout=$heartbeat")
fi
processes="$1"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$root/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi

# Rank 0 hosts the store of the process group, anew in every attempt. In a launcher's own, processes started again would
# read what those before them left.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Without a share each, every process starts as many threads as there are cores.
cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
export OPENSORA_SHUTDOWN_TIMEOUT="$shutdown"

# torch is to leave signals to elastic.py: its own handlers end the processes after 30 s, saved or not. It reads the option
# alone, and overwrites the variable TORCHELASTIC_SIGNALS_TO_HANDLE with it. This log folder makes it leave none in /tmp.
exec "$PYTHON" "$root/launch/elastic.py" "${where[@]}" --signals-to-handle none --log-dir /dev/null \
    --max-restarts "$restarts" --nproc-per-node "$processes" "$@"
