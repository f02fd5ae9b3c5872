#!/usr/bin/env bash
# Sets up, then checks style, types and behaviour. Arguments go to pytest: bash launch/test.sh -k config -x
# Tests run on several cores where there are any (tests/workers.py says which together); -n 0: all in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OPENSORA_TESTS=1
source launch/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
# Once, instead of in each of the hundreds of processes that tests start; what a file is made of is seen by its hash.
"$PYTHON" -m compileall -q --invalidation-mode checked-hash acceleration opensora data_pipeline launch scripts tests benchmarks
"$PYTHON" -m pytest -q -n auto "$@"
