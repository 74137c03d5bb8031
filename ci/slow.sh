#!/usr/bin/env bash
# The tests that take minutes: held-out loss of the story checkpoint, memory while loading, two-process collectives; the suite
# against more seeded faults, five seeds of right backends at size small, all vectors.
set -euo pipefail
cd "$(dirname "$0")/.."
pytest -m slow -s --timeout 900 --durations 5
