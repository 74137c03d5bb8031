#!/usr/bin/env bash
# The conformance suite, levels 0 to 2 at size small, on emulated sm_80, sm_90, gfx942 and gfx950: half an hour on two cores, which
# is more than CI has; .ci/run tries size quick.
set -euo pipefail
exec python -m pytest -m emulated -s tests/triton "$@"
