#!/usr/bin/env bash
# The whole test suite on all cores, with style and type checks; arguments go to pytest (-n 0: in one process).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
.venv/bin/python -m pytest -n auto --dist worksteal "$@"
