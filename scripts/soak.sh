#!/usr/bin/env bash
# Train the quickstart under random kills and damage: scripts/soak.sh [MINUTES] (default 30; see scripts/soak.py).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/soak.py" "$@"
