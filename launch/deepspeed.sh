#!/usr/bin/env bash
# A training on this machine, under the deepspeed launcher: one process for each GPU, or NPROC.
#
#   bash launch/deepspeed.sh configs/gpt_tiny.yaml run.output_dir=runs/mine
#   NPROC=2 bash launch/deepspeed.sh configs/gpt_tiny.yaml --resume
#
# On CPU every process gets cores of its own (needs numactl; without it nothing is bound, and it says so).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
(($# > 0)) || {
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# shellcheck source=launch/env.sh
source "$here/env.sh"

options=(--master_port "${MASTER_PORT:-$((20000 + $$ % 10000))}") # 29500 is everybody's default
if ((gpus > 0)); then
  options+=(--num_gpus "$nproc")
else
  export DS_ACCELERATOR=cpu # else one process is started, whatever is asked for
  options+=(--num_accelerators "$nproc")
  if command -v numactl >/dev/null; then
    unset OMP_NUM_THREADS # the launcher sets it to the cores that it binds a process to
    options+=(--bind_cores_to_rank)
  else
    echo "deepspeed.sh: no numactl, so processes are not bound to cores" >&2
  fi
fi
exec deepspeed "${options[@]}" --module megascale train "$@"
