#!/usr/bin/env bash
# On emulated sm_80, sm_90, gfx942 and gfx950: the conformance suite at level 1 and size small, and the demo's story, with drafts and an
# FP8 cache too. About an hour, which is more than CI has; .ci/run tries a part at size quick.
set -euo pipefail
exec python -m pytest -m emulated -s tests/triton "$@"
