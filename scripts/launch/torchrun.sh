#!/usr/bin/env bash
# A training on several machines by torchrun; give it on each of them, with the name of the first one:
#
#   HEAD=node-0 NODES=2 GPUS=8 scripts/launch/torchrun.sh --config ds_lars.json --data /data/imagenet-shards
#
# All that follows goes to train/pretrain.py, whose --run is called --out here (torchrun takes --run for its own).
# RESTARTS=3 asks torchrun to start all ranks again, up to so many times, where one has died: the run then goes on from
# its last checkpoint. When it was tried with a killed rank, torchrun did not always bring the ranks up again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec torchrun \
  --nnodes "${NODES:?the number of machines}" \
  --nproc_per_node "${GPUS:?the number of GPUs of a machine}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${HEAD:?the name of the first machine}:${PORT:-29500}" \
  --rdzv_id "${JOB:-simclr}" \
  --max_restarts "${RESTARTS:-0}" \
  train/pretrain.py "$@"
