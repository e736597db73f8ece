#!/usr/bin/env bash
# Make .venv with everything that training and the tests need, at the versions of scripts/constraints.txt.
# Running it again takes no time unless setup.cfg or the constraints changed. $PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(cat setup.cfg pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted $PWD" ]; then
  exit 0
fi
echo "setup: installing into $PWD/.venv (about 1 to 10 minutes, up to 5 GB with CUDA; log: .venv/setup.log)"
started=$SECONDS
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# The constraints hold inside build environments too, or a package that builds with torch would fetch another one.
if ! PIP_CONSTRAINT=$PWD/scripts/constraints.txt .venv/bin/python -m pip install --disable-pip-version-check \
    -e '.[dev]' >.venv/setup.log 2>&1; then
  tail -n 15 .venv/setup.log >&2
  echo "error: setup failed after $((SECONDS - started)) s; the whole log is $PWD/.venv/setup.log" >&2
  exit 1
fi
echo "$wanted $PWD" >.venv/installed
echo "setup: done in $((SECONDS - started)) s; for commands of your own: source .venv/bin/activate"
