#!/usr/bin/env bash
# The tests that take minutes: held-out loss of the story checkpoint, memory while loading, two-process collectives; the suite
# against more seeded faults, five seeds of right backends at size small, all vectors.
set -euo pipefail
cd "$(dirname "$0")/.."
# A process per core where there are two or more; files stay whole, for what their tests share.
pytest -m slow -s --timeout 900 --durations 5 -n "${TEST_PROCESSES:-2}" --dist loadfile
