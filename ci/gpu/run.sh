#!/usr/bin/env bash
# Runs the job on this machine: bash ci/gpu/run.sh, with the arguments of run.py. Installs nothing into its Python: what cannot
# be imported comes from ci/gpu/wheels, or for dsv3 from this checkout, into a folder that is removed in the end.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
# Compiled kernels, and settings of the machine that would change what runs.
export TRITON_CACHE_DIR="$work/triton" XDG_CONFIG_HOME="$work/config" XDG_CACHE_HOME="$work/cache"
for name in "${!DSV3_@}"; do unset "$name"; done

for module in torch triton numpy; do
  "$python" -c "import $module" || { echo "ci/gpu/run.sh needs $module in $python" >&2; exit 3; }
done

missing=()
# Which of these distributions ($1: name, $2: module, ..) are not here.
while read -r name module; do
  "$python" -c "import $module" 2>/dev/null || missing+=("$name")
done <<'LIST'
stevedore stevedore
rich rich
markdown-it-py markdown_it
mdurl mdurl
pygments pygments
jinja2 jinja2
markupsafe markupsafe
safetensors safetensors
tokenizers tokenizers
LIST

# One by one: a wheel that is missing or does not fit is no reason to go without the others.
for name in ${missing[@]+"${missing[@]}"}; do
  "$python" -m pip install -q --no-index --no-deps --find-links "$here/wheels" --target "$work/site" "$name" ||
    echo "no wheel of $name in ci/gpu/wheels: what needs it will fail" >&2
done

# dsv3 with its entry points from the wheel of this checkout, if there is one; else its folders, and backends by import.
wheel=$(ls "$here"/wheels/dsv3-*.whl 2>/dev/null | head -1)
if [ -n "$wheel" ] && "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$wheel"; then
  path="$work/site"
else
  path="$work/site:$root/core:$root/backends"
fi
echo "dsv3 from ${wheel:-$root}" >&2
# Not exec: the folder must be removed afterwards.
PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/run.py" "$@"
