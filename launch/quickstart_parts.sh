# What the quickstarts share; sourced by them, from any folder.
#
# Sets called_from, root and moves to root. The functions use what the script sets: input, config,
# nproc, dir, and what they set themselves: python, megascale, run_dir, settings.
#
# shellcheck shell=bash disable=SC2154

called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

say() { printf '%s\n' "$*"; }

die() { # die WHAT REMEDY
  printf 'quickstart: error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 1
}

step_started=$SECONDS
heading() { # heading NUMBER TEXT: the rule between two steps, with the time of the one before
  printf '\n== %s  %s\n' "$1" "$2"
  step_started=$SECONDS
}

took() { say "-- $((SECONDS - step_started)) s"; }

show() { # show COMMAND...: print it as one would type it
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '$%s\n' "$line"
}

run() {
  show "$@"
  "$@"
}

check_knobs() {
  [[ $nproc =~ ^[1-9][0-9]*$ ]] || die "NPROC=$nproc" "give a number of processes, for example NPROC=2"
  [[ ${QUICKSTART_STEPS:-1} =~ ^[1-9][0-9]*$ ]] ||
    die "QUICKSTART_STEPS=$QUICKSTART_STEPS" "give a number of steps, at least 20"
  ((${QUICKSTART_STEPS:-20} >= 20)) ||
    die "QUICKSTART_STEPS=$QUICKSTART_STEPS is too short a training to show anything" "give at least 20"
  [[ $config == /* || -f $config ]] || config="$called_from/$config"
  [[ -f $config ]] || die "QUICKSTART_CONFIG: there is no file $config" "give a YAML file of settings"
  if [[ -e $called_from/$input ]]; then input=$(cd "$called_from" && realpath "$input"); fi
  [[ $dir == /* ]] || dir="$called_from/$dir"
  dir=${dir#"$root"/} # commands are shown as they are typed in the repository's folder
}

install() {
  local started=$SECONDS
  if [[ -n ${MEGASCALE_PYTHON:-} ]]; then
    python=("$MEGASCALE_PYTHON")
    megascale=("$MEGASCALE_PYTHON" -m megascale)
    say "MEGASCALE_PYTHON is set: nothing is installed"
  else
    source tools/install.sh
    python=(python)
    megascale=(megascale)
  fi
  install_seconds=$((SECONDS - started))
  say "installation took $install_seconds s; from here on no network is needed"
}

new_run_folder() { # the first run_NN that is free; earlier runs stay as they are
  local number=1
  mkdir -p "$dir"
  until run_dir=$(printf '%s/run_%02d' "$dir" "$number") && mkdir "$run_dir" 2>/dev/null; do
    ((number += 1))
    ((number < 1000)) || die "no run folder can be made in $dir" "check its permissions"
  done
  if ((number > 1)); then
    say "earlier runs stay as they are; this one goes to $run_dir, data are reused where they fit"
  fi
}

settings_of_run() { # overrides of the config for this run
  settings=("run.output_dir=$run_dir" "data.path=$dir/data")
  if [[ -n ${QUICKSTART_STEPS:-} ]]; then
    settings+=("train.max_steps=$QUICKSTART_STEPS" "schedule.warmup_steps=$((QUICKSTART_STEPS / 20))"
      "checkpoint.save_interval=$((QUICKSTART_STEPS / 4))"
      "evaluation.interval=$((QUICKSTART_STEPS / 2))")
  fi
  # what does not fit together is said now, not after the data were prepared
  if ! "${megascale[@]}" config check "$config" --world-size "$nproc" "${settings[@]}" >/dev/null; then
    rmdir "$run_dir"
    exit 2
  fi
}

resolved() { # resolved SECTION.NAME: a setting of the run, from the config.yaml that it saved
  "${python[@]}" - "$run_dir/config.yaml" "$1" <<'PY'
import sys, yaml
value = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
for name in sys.argv[2].split("."):
    value = value[name]
print(value)
PY
}

newest_checkpoint() { # its folder; fails without one
  local manifest newest=""
  for manifest in "$run_dir"/checkpoints/step_*/manifest.json; do
    if [[ -e $manifest ]]; then newest=${manifest%/*}; fi
  done
  [[ -n $newest ]] && printf '%s\n' "$newest"
}
