#!/usr/bin/env bash
# On a machine that has a package index: the wheels that ci/gpu/run.sh may need on one that has none, into ci/gpu/wheels.
# $1: the GPU machine's Python, 3.11 by default; it matters for the few that hold machine code (Linux on x86-64).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=${1:-3.11}
export PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A clean copy of what git would commit, so that nothing is left in this checkout.
mkdir "$work/source" "$work/wheels"
git -c safe.directory='*' -C "$here/../.." ls-files -z --cached --others --exclude-standard |
  tar -C "$here/../.." --null --ignore-failed-read -T - -cf - | tar -C "$work/source" -xf -
python3 -m pip wheel -q --no-deps -w "$work/wheels" "$work/source"

# What dsv3 imports in this job beside torch, triton and numpy; rich needs the three after it, jinja2 markupsafe.
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$work/wheels" \
  'stevedore>=5.3' 'rich>=13.7' markdown-it-py mdurl pygments 'jinja2>=3.1.5' markupsafe 'safetensors>=0.5' \
  'tokenizers>=0.20' 2> >(grep -v '^WARNING: Location' >&2)

rm -rf "$here/wheels"
mv "$work/wheels" "$here/wheels"
ls -l "$here/wheels" >&2
