#!/usr/bin/env bash
# ruff, mypy and the import rules; what pre-commit runs too.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
lint-imports
