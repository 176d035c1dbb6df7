#!/usr/bin/env bash
# Installs what is missing, then lints, checks formats and types, and runs the tests.
# Arguments go to pytest:  bash tools/test.sh tests/unit -k schedule
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/install.sh

export OMP_NUM_THREADS=1 # several processes share the cores in most tests
export HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false

failed=()

check() { # check NAME COMMAND...: run one check under a heading and remember whether it failed
  local name=$1 started=$SECONDS status=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || status=$?
  if ((status != 0)); then
    failed+=("$name")
    printf -- '-- %s: FAILED (exit code %d) after %d s\n' "$name" "$status" $((SECONDS - started))
    return
  fi
  printf -- '-- %s: passed in %d s\n' "$name" $((SECONDS - started))
}

started=$SECONDS
check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check .
check "mypy" python -m mypy
check "pytest" python -m pytest "$@"

printf '\n== checks took %d s\n' $((SECONDS - started))
if ((${#failed[@]} > 0)); then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed"
