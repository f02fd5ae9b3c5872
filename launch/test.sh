#!/usr/bin/env bash
# Sets up, then checks style, types and behaviour. Arguments go to pytest: bash launch/test.sh -k config -x
# Tests run on several cores where there are any (tests/workers.py says which together); -n 0: all in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OPENSORA_TESTS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would each compile the project anew
source launch/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -q -n auto "$@"
