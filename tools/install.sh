#!/usr/bin/env bash
# Creates or completes .venv in the repository root, with the versions of constraints.txt.
#
#   bash tools/install.sh      installs
#   source tools/install.sh    installs, then activates .venv in the calling shell
#
# Environment:
#   PYTHON           the Python to build .venv from (default: the first one found that is >= 3.10)
#   TORCH_INDEX_URL  the package index to take torch from. Plain pip on Linux x86_64 may choose
#                    torch's CUDA build of several GB; an index of CPU builds makes it about 200 MB.
#
# A machine with a working nvidia-smi keeps the torch of that Python, if there is one.
# Once installed, a further call only compares .venv with a stamp: no network, under a second.

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then # sourced: install in a child, so that no option leaks
  _megascale_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  bash "$_megascale_root/tools/install.sh" || return
  export VIRTUAL_ENV="$_megascale_root/.venv"
  export PATH="$VIRTUAL_ENV/bin:$PATH"
  unset _megascale_root
  return 0
fi

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv="$root/.venv"
venv_python="$venv/bin/python"
stamp="$venv/.megascale-installed"  # holds the fingerprint; written last
marker="$venv/.megascale-installing" # present from the first step until the stamp is written
oldest_torch="2.11"                  # as in pyproject.toml

say() { printf 'install: %s\n' "$*"; }

die() { # die WHAT REMEDY
  printf 'install: error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 1
}

fingerprint() { # of what .venv was made from; the path too, since a venv cannot be moved
  "$1" - "$root" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(repr((sys.argv[1], sys.version_info[:3])).encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())
PY
}

is_of_wanted_python() {
  [[ -z ${PYTHON:-} || $("$PYTHON" -V 2>&1) == "$("$venv_python" -V 2>&1)" ]]
}

is_complete() {
  [[ -f $stamp && ! -e $marker ]] || return 1
  is_of_wanted_python || return 1
  local current
  current=$(fingerprint "$venv_python" 2>/dev/null) || return 1
  [[ $current == "$(cat "$stamp")" ]]
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    is_new_enough "$PYTHON" ||
      die "PYTHON=$PYTHON is not a Python >= 3.10" "name another, or unset PYTHON"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python >= 3.10 found" "install one, or name it: PYTHON=/path/to/python3 bash tools/install.sh"
}

has_cuda() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

torch_of() { # "VERSION FOLDER" of the torch that a Python imports, if it is new enough
  "$1" - "$oldest_torch" 2>/dev/null <<'PY'
import pathlib, re, sys
import torch
numbers = lambda text: tuple(int(n) for n in re.findall(r"\d+", text)[:2])
if numbers(torch.__version__) < numbers(sys.argv[1]):
    sys.exit(1)
print(torch.__version__, pathlib.Path(torch.__file__).parents[1])
PY
}

pip_install() { # progress bars on a terminal, one line a package elsewhere
  local status=0
  if [[ -t 1 ]]; then
    "$venv_python" -m pip install --disable-pip-version-check "$@" || status=$?
  else
    "$venv_python" -m pip install --disable-pip-version-check "$@" 2>&1 |
      { grep -E --line-buffered '^(Collecting|Building|Installing|Successfully|ERROR|WARNING: Retrying|  ?error)' || true; } ||
      status=$?
  fi
  ((status == 0)) || die "pip install ${*: -1} failed (above: pip's own words)" \
    "check the network and pip's index (pip config list, PIP_INDEX_URL, TORCH_INDEX_URL), then run again"
}

create_venv() { # create_venv PYTHON [OPTION]
  say "creating .venv with $("$1" -V 2>&1)${2:+ ($2)}"
  mkdir -p "$venv"
  : >"$marker" # first of all: an install killed at any later moment is recognised
  find "$venv" -mindepth 1 -maxdepth 1 ! -path "$marker" -exec rm -rf {} +
  "$1" -m venv ${2:+"$2"} "$venv" ||
    die "$1 cannot create a virtual environment" "install its venv module (Debian: apt-get install python3-venv)"
}

prepare_venv() { # prepare_venv PYTHON [OPTION]
  if [[ -e $marker ]]; then
    say "an earlier install was interrupted: starting .venv again"
    create_venv "$@"
  elif [[ ! -d $venv ]]; then
    create_venv "$@"
  elif ! is_new_enough "$venv_python"; then
    say "the Python of .venv does not run or is older than 3.10"
    create_venv "$@"
  elif [[ -f $stamp && $(cat "$stamp.root" 2>/dev/null) != "$root" ]]; then
    say ".venv was made in another folder"
    create_venv "$@"
  elif ! is_of_wanted_python; then
    say ".venv was made with another Python than PYTHON"
    create_venv "$@"
  else
    say "reusing .venv ($("$venv_python" -V 2>&1))"
    rm -f "$stamp"
    : >"$marker"
  fi
  "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null ||
    die ".venv has no pip" "remove .venv and run again"
}

keep_users_torch() { # keep_users_torch FOLDER: seen from .venv even if PYTHON is itself in a venv
  torch_of "$venv_python" >/dev/null && return
  local site
  site=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$1" >"$site/users_torch.pth"
  torch_of "$venv_python" >/dev/null ||
    die "torch in $1 cannot be imported from .venv" "name the Python it belongs to: PYTHON=... bash tools/install.sh"
}

install_torch() { # install_torch REQUIREMENT
  if [[ -n ${TORCH_INDEX_URL:-} ]]; then # that index need not hold what torch depends on
    say "installing $1 from $TORCH_INDEX_URL"
    pip_install --index-url "$TORCH_INDEX_URL" --no-deps "$1"
  else
    say "installing $1"
    pip_install -c "$constraints" "$1"
  fi
}

install_all() {
  local python users_torch="" torch_requirement
  python=$(find_python)
  torch_requirement=$(grep '^torch==' constraints.txt)
  if ! has_cuda; then
    say "no CUDA device: $torch_requirement, as in constraints.txt"
    prepare_venv "$python"
    cp constraints.txt "$constraints"
    install_torch "$torch_requirement"
  else
    grep -v '^torch==' constraints.txt >"$constraints"
    users_torch=$(torch_of "$python") || users_torch=""
    if [[ -n $users_torch ]]; then
      say "CUDA device: keeping torch ${users_torch%% *} of $python"
      echo "torch==${users_torch%% *}" >>"$constraints" # so that no dependency replaces it
      prepare_venv "$python" --system-site-packages
      keep_users_torch "${users_torch#* }"
    else
      say "CUDA device, and $python has no torch >= $oldest_torch"
      prepare_venv "$python"
      install_torch "torch>=$oldest_torch"
    fi
  fi
  say "installing megascale and its dependencies"
  pip_install -c "$constraints" -e '.[dev]'
  if [[ ! -x $venv/bin/ninja ]]; then # the user's Python has it, but not on .venv's PATH
    say "installing ninja, with which DeepSpeed compiles"
    pip_install -c "$constraints" --ignore-installed --no-deps ninja
  fi
  echo "$root" >"$stamp.root"
  fingerprint "$venv_python" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  rm -f "$marker"
}

if command -v flock >/dev/null; then # two installs at once would write over each other
  exec 9<"$root/tools/install.sh"
  flock -n 9 || { say "waiting for another install to end" && flock 9; }
fi
if is_complete; then
  say ".venv is complete, nothing to do"
  exit 0
fi
constraints=$(mktemp "${TMPDIR:-/tmp}/megascale-constraints.XXXXXX")
trap 'rm -f "$constraints"' EXIT
started=$SECONDS
install_all
say "installed in $((SECONDS - started)) s"
