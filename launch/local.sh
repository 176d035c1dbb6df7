#!/usr/bin/env bash
# A training on this machine, under torchrun: one process for each GPU, or NPROC processes.
#
#   bash launch/local.sh configs/gpt_tiny.yaml run.output_dir=runs/mine
#   NPROC=2 bash launch/local.sh configs/gpt_tiny.yaml --resume
#
# `megascale train CONFIG --nproc N` does the same without torchrun's elastic agent.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
(($# > 0)) || {
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((nproc < $(nproc) ? $(nproc) / nproc : 1))}
# shellcheck source=launch/env.sh
source "$here/env.sh"

# --standalone picks a free port itself, so that two runs on one machine do not meet
exec python -m torch.distributed.run --standalone --nproc-per-node "$nproc" -m megascale train "$@"
