#!/usr/bin/env bash
# A training on several machines by torchrun; give it on each of them, with the name of the first one:
#
#   HEAD=node-0 NODES=2 GPUS=8 scripts/launch/torchrun.sh --config ds_lars.json --data /data/imagenet-shards
#
# All that follows goes to train/pretrain.py, whose --run is called --out here (torchrun takes --run for its own).
#
# With NODES=1:2 RESTARTS=10 the run goes on from its last checkpoint where a process or a machine is lost, on as many
# processes as divide simclr.lanes (the others stand by), and takes a machine back that comes again. It needs a run
# folder that all machines see, and the first machine holds the others together: where that one is lost, give the line
# again. What is refused is refused again at each of these restarts.
# Where machines' own names do not resolve to an address that the others reach, ADDRESS says it.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ ! -f "$clone/.venv/bin/activate" ] || source "$clone/.venv/bin/activate"

# The store that torchrun otherwise keeps for all its restarts is not told to a machine that comes later.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's own; the trainer takes the cores that there are
exec torchrun \
  --nnodes "${NODES:?the number of machines}" \
  --nproc_per_node "${GPUS:?the number of GPUs of a machine}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${HEAD:?the name of the first machine}:${PORT:-29500}" \
  --rdzv_id "${JOB:-simclr}" \
  --max_restarts "${RESTARTS:-0}" \
  ${ADDRESS:+--local_addr "$ADDRESS"} \
  "$clone/train/pretrain.py" "$@"
