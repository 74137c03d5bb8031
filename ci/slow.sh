#!/usr/bin/env bash
# The tests that take minutes: held-out loss of the story checkpoint, memory while loading, two-process collectives; the suite
# against more seeded faults, five seeds of right backends at size small, all vectors. Two thousand schedules of the engine take
# hours of a core on the demo: here SCHEDULES of them are drawn. WITHIN: seconds after which no test begins any more; then every
# commit begins with another file.
set -euo pipefail
cd "$(dirname "$0")/.."
export SCHEDULES="${SCHEDULES:-20}"
limit=()
if [ -n "${WITHIN:-}" ]; then
  limit=(--within "$WITHIN" --turn "$(git -c safe.directory='*' rev-list --count HEAD 2>/dev/null || echo 0)")
fi
# A process per core where there are two or more; files stay whole, for what their tests share.
pytest -m slow -s --timeout 900 --durations 5 -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "${limit[@]}" "$@"
