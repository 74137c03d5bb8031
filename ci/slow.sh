#!/usr/bin/env bash
# The tests that take minutes: held-out loss of the story checkpoint, memory while loading, two-process collectives.
set -euo pipefail
cd "$(dirname "$0")/.."
pytest -m slow -s --timeout 900
