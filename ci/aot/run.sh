#!/usr/bin/env bash
# The ahead-of-time matrix: every kernel compiled for all nine architectures with the installed Triton, and for one of each maker
# with the oldest Triton that is supported. No GPU. Fails where a binary is not as backends/dsv3_triton/aot/expect.py says.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dsv3 bench aot "$@"
python -m pip install -q --no-deps --target "$work/oldest" 'triton==3.6.*' 2> >(grep -v '^WARNING: Location' >&2)
echo
PYTHONPATH="$work/oldest${PYTHONPATH:+:$PYTHONPATH}" python -c "import triton; print('triton', triton.__version__)"
PYTHONPATH="$work/oldest${PYTHONPATH:+:$PYTHONPATH}" dsv3 bench aot --arch sm_90,gfx942 --ops quant_linear,fused_experts,mla_decode,mla_prefill,route,rms_norm
