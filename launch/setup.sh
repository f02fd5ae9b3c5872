#!/usr/bin/env bash
# Makes the checkout ready to run: a .venv with the pinned packages and this project. Source it (it sets PYTHON to the
# interpreter) or run it, in bash. Nothing outside the checkout is written; a second call takes no time. After it was
# interrupted, or failed, or Python was upgraded: the same command again.
#
#   OPENSORA_PYTHON       the Python to build .venv with, if not the first good one on PATH
#   OPENSORA_TORCH_INDEX  an index to take torch from, such as https://download.pytorch.org/whl/cpu
#   OPENSORA_TESTS=1      with the tools of the tests and every optional package that needs no GPU; launch/test.sh sets it

if [ -z "${BASH_VERSION:-}" ]; then
    echo "error: launch/setup.sh is written for bash: bash launch/setup.sh; then .venv/bin/python is the interpreter" >&2
    return 2 2>/dev/null || exit 2
fi

OPENSORA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$OPENSORA_ROOT/.venv/bin/python"
OPENSORA_SUPPORTED="(3, 10) <= sys.version_info[:2] <= (3, 14)" # the pinned packages have wheels for these

opensora_find_python() {
    # Prints the first interpreter of a supported version that can make environments; explains itself on stderr if none.
    local candidate version seen="" names=(python3 python python3.14 python3.13 python3.12 python3.11 python3.10)
    if [[ -n "${OPENSORA_PYTHON:-}" ]]; then names=("$OPENSORA_PYTHON"); fi
    for candidate in "${names[@]}"; do
        version="$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)" || continue
        if ! "$candidate" -c "import sys; sys.exit(not $OPENSORA_SUPPORTED)" 2>/dev/null; then
            seen="$seen $candidate=$version"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            seen="$seen $candidate=$version(without-venv:-install-python3-venv)"
        else
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10, 3.11, 3.12, 3.13 or 3.14 is needed; found:${seen:- none}${OPENSORA_PYTHON:+, as OPENSORA_PYTHON=$OPENSORA_PYTHON}." \
        "Install one, or name it: OPENSORA_PYTHON=/path/to/python3.12 bash $([[ "$0" == *.sh ]] && echo "$0" || echo launch/setup.sh)" >&2
    return 2
}

opensora_quietly() {
    # opensora_quietly MESSAGE COMMAND...: runs the command with its output in a log, saying now and then that it lives.
    local message="$1" log="$OPENSORA_ROOT/.venv/setup.log" start=$SECONDS said=$SECONDS pid
    shift
    echo "setup: $message" >&2
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; echo "setup: interrupted; the same command begins anew" >&2; exit 130' INT TERM HUP USR1 USR2
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - said >= 20)); then said=$SECONDS && echo "setup: still at it, $((SECONDS - start)) s" >&2; fi
    done
    trap - INT TERM HUP USR1 USR2
    wait "$pid"
}

opensora_explain() {
    # Why pip failed, by its log: the end of the log, then one line that says what to do.
    local log="$OPENSORA_ROOT/.venv/setup.log" why="see the lines above" what
    what="$(sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' "$log" | head -n 1)"
    if grep -q "No space left on device\|Disk quota exceeded" "$log"; then
        why="the disk is full: make room for .venv (1.8 GB, 6 GB with CUDA) and in ${TMPDIR:-/tmp} (TMPDIR names another place)"
    elif grep -q "Permission denied\|Read-only file system" "$log"; then
        why="a file cannot be written: see the lines above, and who owns $OPENSORA_ROOT/.venv"
    elif grep -Eq "NewConnectionError|NameResolutionError|Max retries exceeded|ConnectTimeout|ReadTimeout|ProxyError|SSLError|connection broken" "$log"; then
        why="the package index was not reached: see to the network or its proxy, or name an index in PIP_INDEX_URL"
    elif [[ -n "$what" ]] && grep -q "(from versions: none)" "$log"; then
        why="the package index was not reached, or knows no $what: see to the network or its proxy, or name an index in PIP_INDEX_URL"
    elif [[ -n "$what" ]]; then
        why="the package index has no $what for $("$PYTHON" -V 2>&1) on $(uname -sm): name another Python in OPENSORA_PYTHON, or another index in PIP_INDEX_URL"
    fi
    echo "the end of .venv/setup.log:" >&2
    tail -n 15 "$log" >&2
    echo "error: set-up failed: $why; then the same command again" >&2
    # What pip gave up before it wrote is as it was. Half a package would be taken for a whole one.
    if ! grep -q "OSError\|No space left\|Disk quota" "$log"; then rm -f "$OPENSORA_ROOT/.venv/.incomplete"; fi
}

opensora_pip() {
    # opensora_pip MESSAGE ARGUMENTS...: pip install, in the environment whatever the user's configuration says.
    local message="$1"
    shift
    : >"$OPENSORA_ROOT/.venv/.incomplete" || return 1
    if ! PIP_USER=0 opensora_quietly "$message" \
        "$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "$@"; then
        opensora_explain
        return 1
    fi
    rm -f "$OPENSORA_ROOT/.venv/.incomplete"
}

opensora_is_installed() {
    # opensora_is_installed STAMP FILE...: the environment was made from these files as they are, by this Python, here.
    local stamp="$OPENSORA_ROOT/.venv/$1"
    shift
    OPENSORA_WANTED="$("$PYTHON" - "$OPENSORA_ROOT" "$@" 2>/dev/null <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
content = b"".join((root / name).read_bytes() for name in sys.argv[2:])
print(hashlib.sha256(content + sys.version.encode() + str(root).encode()).hexdigest())
PY
)" && [[ ! -e "$OPENSORA_ROOT/.venv/.incomplete" && "$(cat "$stamp" 2>/dev/null)" == "$OPENSORA_WANTED" ]]
}

opensora_wrong() {
    # Prints what is wrong with .venv, if something is.
    local venv="$OPENSORA_ROOT/.venv" version='import sys; print(sys.version_info[:2])'
    if [[ -e "$venv/.incomplete" ]]; then
        echo "an earlier set-up was interrupted"
    elif ! "$PYTHON" -c "import sys, pip; sys.exit(not $OPENSORA_SUPPORTED)" 2>/dev/null; then
        echo "its Python is gone, was upgraded, is not supported or has no pip"
    elif [[ -n "${OPENSORA_PYTHON:-}" && "$("$OPENSORA_PYTHON" -c "$version" 2>&1)" != "$("$PYTHON" -c "$version")" ]]; then
        echo "OPENSORA_PYTHON=$OPENSORA_PYTHON is of another version"
    fi
}

opensora_make_venv() {
    local venv="$OPENSORA_ROOT/.venv" wrong base free
    wrong="$(opensora_wrong)"
    if [[ -z "$wrong" ]]; then return 0; fi
    base="$(opensora_find_python)" || return
    if [[ -e "$venv" ]]; then echo "setup: .venv is built anew: $wrong" >&2; fi
    if ! { mkdir -p "$venv" && find "$venv/" -mindepth 1 -delete && : >"$venv/.incomplete"; }; then
        echo "error: $venv cannot be written: clone to a folder of yours, or see who owns it" >&2
        return 1
    fi
    free="$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1024) }')"
    if [[ "$free" =~ ^[0-9]+$ ]] && ((free < 1800)); then
        echo "error: $free MB are free at $venv, and 1,800 are needed (6,000 with CUDA): make room, or link .venv to another disk" >&2
        return 1
    fi
    if ! "$base" -m venv "$venv" >"$venv/setup.log" 2>&1; then
        opensora_explain
        return 1
    fi
    rm -f "$venv/.incomplete"
}

opensora_install() {
    # opensora_install: everything that is asked for, into a .venv that works.
    local index=()
    opensora_make_venv || return
    if [[ -n "${OPENSORA_TORCH_INDEX:-}" ]]; then
        index=(--extra-index-url "$OPENSORA_TORCH_INDEX")
    elif ! "$PYTHON" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
        echo "setup: no GPU here; OPENSORA_TORCH_INDEX=https://download.pytorch.org/whl/cpu may save 4 GB of CUDA libraries" >&2
    fi
    if ! opensora_is_installed .installed requirements.txt pyproject.toml; then
        opensora_pip "installing the pinned packages into .venv (1.7 GB, 6 GB with CUDA; a minute or more)" \
            ${index[@]+"${index[@]}"} -r "$OPENSORA_ROOT/requirements.txt" || return
        opensora_pip "installing this project" --no-deps --no-build-isolation --editable "$OPENSORA_ROOT" || return
        echo "$OPENSORA_WANTED" >"$OPENSORA_ROOT/.venv/.installed"
    fi
    if [[ "${OPENSORA_TESTS:-}" == 1 ]] && ! opensora_is_installed "${OPENSORA_FOR_TESTS[@]}"; then
        opensora_pip "installing what the tests want (0.5 GB)" \
            ${index[@]+"${index[@]}"} -r "$OPENSORA_ROOT/requirements-test.txt" || return
        opensora_pip "installing ColossalAI" --no-deps -r "$OPENSORA_ROOT/requirements-colossalai.txt" || return
        echo "$OPENSORA_WANTED" >"$OPENSORA_ROOT/.venv/.installed-for-tests"
    fi
}

opensora_setup() {
    # In a shell of its own, so that its traps and its lock end with it.
    cd "$OPENSORA_ROOT" || return
    OPENSORA_FOR_TESTS=(.installed-for-tests requirements.txt requirements-test.txt requirements-colossalai.txt pyproject.toml)
    if [[ -z "$(opensora_wrong)" ]] && opensora_is_installed .installed requirements.txt pyproject.toml; then
        if [[ "${OPENSORA_TESTS:-}" != 1 ]] || opensora_is_installed "${OPENSORA_FOR_TESTS[@]}"; then return 0; fi
    fi
    if command -v flock >/dev/null && { exec 9>"$OPENSORA_ROOT/.venv.lock"; } 2>/dev/null; then
        flock -n 9 || { echo "setup: another one is at work in this checkout; waiting for it" >&2 && flock 9; }
    fi
    opensora_install
}

opensora_setup_or_stop() {
    # Runs opensora_setup and takes it along when a signal comes to this shell alone, which would leave what it waits for
    # behind, or wait for it to end. The status is then 128 plus the signal's number.
    local pid name traps asked="" status=0 names=(INT TERM HUP QUIT USR1 USR2)
    traps="$(trap -p "${names[@]}")"
    opensora_setup </dev/null &
    pid=$!
    for name in "${names[@]}"; do
        trap "asked=\"\${asked:-$(kill -l "$name")}\"; kill $pid 2>/dev/null" "$name"
    done
    while true; do # waits first: what has ended already still has its status to give
        if wait "$pid"; then status=0; else status=$?; fi # returns when a signal comes, too
        kill -0 "$pid" 2>/dev/null || break
    done
    trap - "${names[@]}"
    eval "$traps"
    return $((asked ? 128 + asked : status))
}

opensora_setup_or_stop || { OPENSORA_STATUS=$? && { return "$OPENSORA_STATUS" 2>/dev/null || exit "$OPENSORA_STATUS"; }; }
export PYTHON
