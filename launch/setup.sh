#!/usr/bin/env bash
# Makes the checkout ready to run: a .venv with the pinned packages and this project. Source it (it sets PYTHON to the
# interpreter) or run it. Nothing outside the checkout is written; a second call takes no time.
#
#   OPENSORA_PYTHON       the Python to build .venv with, if not the first good one on PATH
#   OPENSORA_TORCH_INDEX  an index to take torch from, such as https://download.pytorch.org/whl/cpu

OPENSORA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

opensora_find_python() {
    # Prints the first interpreter of a supported version that can make environments; explains itself on stderr if none.
    local candidate version seen=""
    for candidate in ${OPENSORA_PYTHON:+"$OPENSORA_PYTHON"} python3 python python3.12 python3.11 python3.10; do
        version="$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)" || continue
        if ! "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            seen="$seen $candidate=$version"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            seen="$seen $candidate=$version(without-venv:-install-python3-venv)"
        else
            echo "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.10, 3.11 or 3.12 is needed; found:${seen:- none}." \
        "Install one, or name it: OPENSORA_PYTHON=/path/to/python3.11 bash ${0##*/}" >&2
    return 1
}

opensora_quietly() {
    # opensora_quietly MESSAGE COMMAND...: runs the command with its output in a log, saying now and then that it lives.
    local message="$1" log="$OPENSORA_ROOT/.venv/setup.log" start=$SECONDS pid
    shift
    echo "setup: $message" >&2
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM # a background command does not hear Ctrl-C
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        if (((SECONDS - start) % 20 == 19)); then echo "setup: still at it, $((SECONDS - start)) s" >&2; fi
    done
    trap - INT TERM
    if ! wait "$pid"; then
        echo "error: failed; the end of .venv/setup.log:" >&2
        tail -n 15 "$log" >&2
        return 1
    fi
}

opensora_setup() {
    local venv="$OPENSORA_ROOT/.venv" base wanted
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    PYTHON="$venv/bin/python"
    if ! "$PYTHON" -c 'import sys, pip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        base="$(opensora_find_python)" || return 1
        "$base" -m venv --clear "$venv" || return 1
    fi
    wanted="$("$PYTHON" - "$OPENSORA_ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
content = b"".join((root / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
print(hashlib.sha256(content + sys.version.encode() + str(root).encode()).hexdigest())
PY
)" || return 1
    if [[ "$(cat "$venv/.installed" 2>/dev/null)" == "$wanted" ]]; then return 0; fi
    if [[ -z "${OPENSORA_TORCH_INDEX:-}" ]] && ! "$PYTHON" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
        echo "setup: no GPU here; OPENSORA_TORCH_INDEX=https://download.pytorch.org/whl/cpu may save 3 GB of CUDA libraries" >&2
    fi
    opensora_quietly "installing the pinned packages into .venv (1.7 GB, a minute or more)" \
        "${pip[@]}" ${OPENSORA_TORCH_INDEX:+--extra-index-url "$OPENSORA_TORCH_INDEX"} -r "$OPENSORA_ROOT/requirements.txt" || return 1
    opensora_quietly "installing this project" \
        "${pip[@]}" --no-deps --no-build-isolation --editable "$OPENSORA_ROOT" || return 1
    echo "$wanted" >"$venv/.installed"
}

opensora_setup || { return 1 2>/dev/null || exit 1; }
export PYTHON
