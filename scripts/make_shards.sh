#!/usr/bin/env bash
# Pack an image folder into WebDataset shards: scripts/make_shards.sh SRC [OUT] (see --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
[ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
PYTHONPATH=$root/.package${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m simclr_dali pack "$@"
