#!/usr/bin/env bash
# Sets up, then checks style, types and behaviour. Arguments go to pytest: bash launch/test.sh -k config -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OPENSORA_TESTS=1
source launch/setup.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -q "$@"
