#!/usr/bin/env bash
# The plugin kit end to end, in an environment of its own: a new plugin from the template is installed, checked and tried
# against the conformance suite; then the same plugin with an import that takes 5 s, and with one that prints.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in "${!DSV3_@}"; do unset "$name"; done
export PIP_DISABLE_PIP_VERSION_CHECK=1 XDG_CONFIG_HOME="$work/config" PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH PIP_QUIET

say() { printf -- '-- %s (%ss)\n' "$1" "$SECONDS"; }

say "environment"
python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
# KIT_CONSTRAINTS: further arguments of pip, such as --find-links.
pip install -q ${KIT_CONSTRAINTS:-} -e "$root[conformance]" 2> >(grep -v '^WARNING: Location' >&2)
cd "$work"

say "dsv3 plugin new acme; pip install -e dsv3-acme"
dsv3 plugin new acme
pip install -q ${KIT_CONSTRAINTS:-} -e dsv3-acme 2> >(grep -v '^WARNING: Location' >&2)

# What `dsv3 plugin check acme --json` says: valid JSON on standard output, nothing failed, exit code 0, and under 5 s beside
# the plugin's own import ($1). $2: the case that must be a warning, if any.
check() {
  dsv3 plugin check acme --json >check.json
  python - "$1" "${2:-}" <<'PY'
import json, sys
(entry,) = json.load(open("check.json"))
warnings = [case["id"] for case in entry["cases"] if case["state"] == "warning"]
assert entry["failed"] == 0 and warnings == sys.argv[2].split(), entry
assert entry["seconds"] < 5 + float(sys.argv[1]), entry["seconds"]
print(f"checked in {entry['seconds']:.1f} s; warnings: {' '.join(warnings) or 'none'}")
PY
}

# The conformance suite's quick size; nothing on standard output that the plugin printed, nothing failed, exit code 0.
conform() {
  rm -rf out
  dsv3 conformance --backend acme --size quick --report out >conformance.txt
  test -s conformance.txt && test -s out/junit.xml && test -s out/results.jsonl
  if grep -q 'hello from acme' conformance.txt; then echo "the plugin printed into the report" >&2; exit 1; fi
  tail -1 conformance.txt
}

say "dsv3 plugin check acme"
dsv3 plugin check acme
check 0
say "its own tests"
pip install -q ${KIT_CONSTRAINTS:-} pytest
(cd dsv3-acme && pytest -q -p no:cacheprovider)
say "dsv3 conformance --backend acme"
conform

module=dsv3-acme/dsv3_acme/__init__.py
cp "$module" module.kept
say "with an import that takes 5 s"
sed -i 's/^import platform$/import platform\nimport time\n\ntime.sleep(5)/' "$module"
check 5 l0/import-time
conform

say "with an import that prints"
cp module.kept "$module"
sed -i 's/^import platform$/import platform\n\nprint("hello from acme")/' "$module"
check 0 l0/stdout
conform
test "$(dsv3 run --backend acme --max-new-tokens 3 Once 2>/dev/null | grep -c 'hello from acme')" = 0

say "with an import that fails"
cp module.kept "$module"
sed -i 's/^import platform$/import platform\nimport a_module_that_is_not_there/' "$module"
code=0
dsv3 plugin check acme --json >check.json || code=$?
test "$code" = 3
python -c 'import json; (e,) = json.load(open("check.json")); assert e["failed"] == 1, e'
say "the guide, as it stands in plugins/README.md"
pip uninstall -q -y dsv3-acme
mkdir guide
python "$root/ci/docs/guide.py" "$root/plugins/README.md" guide
say "done"
