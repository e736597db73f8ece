#!/usr/bin/env bash
# The main job from pictures to a number: scripts/quickstart.sh [IMAGE_FOLDER]
# IMAGE_FOLDER holds train/<class>/* and val/<class>/*; without it a labelled set of pictures is drawn.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then  # answered without installing anything
        exec python3 "$root/scripts/quickstart.py" --help
    fi
done
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/quickstart.py" "$@"
