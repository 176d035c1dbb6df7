# Variables of a training, each with its reason; sourced by local.sh, deepspeed.sh and the batch
# scripts. What is set already stays: `NCCL_DEBUG=INFO bash launch/local.sh ...` works.
#
# shellcheck shell=bash

# ---- processes
# Ranks of a machine share its cores; more threads than cores cost more than they give.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# What a rank printed before it was killed is in the log.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
# A tokenizer that was used before a fork warns on every rank otherwise.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# ---- CUDA
# Grows segments instead of holding many of fixed size: fewer "out of memory" by fragmentation when
# sequence lengths or layers differ in size.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Collectives of tensor parallelism and kernels must start in the order they were issued, so that
# communication overlaps with computation. With ZeRO stages 2 and 3 on the torch engine set it to 8.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# ---- NCCL
# The last collectives of each rank are written when one times out: which rank did not come?
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Errors only; INFO shows which network card and algorithm NCCL chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Without a choice NCCL takes every interface that is up: docker0 and lo of the same name on each
# machine have led to hangs. "^" excludes; set the fabric's own, e.g. NCCL_SOCKET_IFNAME=ib0.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,veth}"

# ---- gloo
# gloo binds to the interface of the host's own name. Set this only where that is the wrong one:
#   export GLOO_SOCKET_IFNAME=eth0

# ---- memory allocator of the host (megascale doctor tells which one is loaded)
# With glibc's malloc a rank that loads and frees large arrays keeps what it has freed; tcmalloc gives
# it back and locks less with many threads. Loaded, and said so, only where it is installed.
# MEGASCALE_ALLOCATOR=default leaves the system's.
if [[ -z ${LD_PRELOAD+set} && ${MEGASCALE_ALLOCATOR:-} != default ]]; then
  for library in /usr/lib/*/libtcmalloc_minimal.so.4 /usr/lib64/libtcmalloc_minimal.so.4; do
    if [[ -e $library ]]; then
      export LD_PRELOAD=$library
      echo "allocator of the ranks: $library (MEGASCALE_ALLOCATOR=default for the system's)" >&2
      break
    fi
  done
fi
