#!/usr/bin/env bash
# What a newcomer does: a fresh clone, a new environment, README's first command; then the wheel, from another folder.
# Both must tell the same story.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Nothing of this machine's settings.
for name in "${!DSV3_@}"; do unset "$name"; done
export PIP_DISABLE_PIP_VERSION_CHECK=1 XDG_CONFIG_HOME="$work/config" NUMBA_CACHE_DIR="$work/numba"
unset PIP_QUIET
# README's first command, as it stands there.
first=$(sed -n '/^```sh$/,/^```$/p' "$root/README.md" | sed -n '2p')
echo "first command: $first"

command -v git >/dev/null || { echo "ci/fresh.sh needs git" >&2; exit 1; }
git -c safe.directory='*' clone -q "$root" "$work/clone"
python3 -m venv "$work/one"
(cd "$work/clone" && . "$work/one/bin/activate" && eval "$first" >"$work/one.out" 2> >(grep -v '^WARNING: Location' | tee "$work/one.said" >&2))
# pip prints to stdout too: the story is what follows its last line.
sed -n '/^Successfully installed/,$p' "$work/one.out" | sed 1d >"$work/one.story"

# The wheel, in the same environment, whose packages are those that it asks for too.
(cd "$work/clone" && "$work/one/bin/pip" install -q build hatchling 2>/dev/null && "$work/one/bin/python" -m build --wheel --no-isolation -o "$work/dist" . >"$work/build.log" 2>&1) || { cat "$work/build.log" >&2; exit 1; }
level=$(cd "$work/clone" && "$work/one/bin/python" -c "from dsv3_cpu.processor import level; print(level() or '')")
"$work/one/bin/pip" uninstall -q -y dsv3
"$work/one/bin/pip" install -q --no-deps "$work"/dist/*.whl 2> >(grep -v '^WARNING: Location' >&2)
"$work/one/bin/pip" check >/dev/null || { "$work/one/bin/pip" check >&2; exit 1; }
rm -rf "$work/clone"
mkdir "$work/elsewhere"
(cd "$work/elsewhere" && "$work/one/bin/dsv3" run "Once upon a time" >"$work/two.story" 2> >(tee "$work/two.said" >&2))

test -s "$work/one.story"
# Kernels for this processor came with the package, and nothing was compiled on either first start.
if [ -n "$level" ] && grep compiling "$work/one.said" "$work/two.said"; then exit 1; fi
cmp "$work/one.story" "$work/two.story"
echo "the clone and the wheel ($(du -h "$work"/dist/*.whl | cut -f1)) tell the same story:"
cat "$work/two.story"
