#!/usr/bin/env bash
# Everything once, small: data, training on two processes, an interruption, a resume on another layout, samples.
#   bash launch/demo.sh                  with clips rendered on the spot
#   bash launch/demo.sh --videos DIR     with your clips (captions.csv, or a .txt beside each clip)
#   bash launch/demo.sh --raw DIR        with raw videos: cut into shots, judged, captioned by what was measured
#   bash launch/demo.sh --serve          ends with a page for what was trained
#   bash launch/demo.sh --help           the other options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
exec "$PYTHON" launch/demo.py "$@"
