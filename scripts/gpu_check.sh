#!/usr/bin/env bash
# What this product does on the GPU at hand, in a few minutes: scripts/gpu_check.sh [--minutes 8] OUT (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then  # answered without installing anything
        exec python3 "$root/scripts/gpu_check.py" --help
    fi
done
if [ -n "${GPU_CHECK_PYTHON:-}" ]; then  # an environment that has all it needs, where nothing can be installed
    exec "$GPU_CHECK_PYTHON" "$root/scripts/gpu_check.py" "$@"
fi
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/gpu_check.py" "$@"
