#!/usr/bin/env bash
# The whole road on this machine, from raw text to generated text:
#
#   bash launch/quickstart.sh        a GPT
#   bash launch/quickstart.sh bert   a BERT, see quickstart_bert.sh
#
# Installs into .venv (the only part that needs a network), then: tokenizer -> dataset -> training on
# several processes, killed on purpose -> resume -> evaluation -> a sample. A few minutes on 2 cores.
# It can be run again: tokenizer and dataset are reused, and each run gets a folder of its own.
#
# Environment:
#   QUICKSTART_DIR     where everything is put (default: runs/quickstart in the repository)
#   QUICKSTART_STEPS   length of the training in steps (default: that of the config)
#   QUICKSTART_INPUT   text to train on: a file, folder or glob (default: python-stdlib)
#   QUICKSTART_CONFIG  settings to train with (default: configs/gpt_tiny.yaml)
#   NPROC              number of processes (default: 2)
#   MEGASCALE_PYTHON   a Python that has everything already: nothing is installed
#   PYTHON, TORCH_INDEX_URL  see tools/install.sh

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
case ${1:-gpt} in
gpt) ;;
bert) exec bash "$here/quickstart_bert.sh" ;;
*)
  printf 'quickstart: error: %s\n  remedy: give gpt (the default) or bert\n' "$1" >&2
  exit 2
  ;;
esac
# shellcheck source=launch/quickstart_parts.sh
source "$here/quickstart_parts.sh"

vocab_size=1024
gate_from_steps=600 # a shorter training is not expected to beat the bigram entropy
input=${QUICKSTART_INPUT:-python-stdlib}
config=${QUICKSTART_CONFIG:-configs/gpt_tiny.yaml}
nproc=${NPROC:-2}
dir=${QUICKSTART_DIR:-$root/runs/quickstart}
training="" # process group of the running training

stop_training() { # the whole process group, at once and without warning
  [[ -n $training ]] || return 0
  kill -9 -- "-$training" 2>/dev/null || true
  wait "$training" 2>/dev/null || true
  training=""
  if [[ -t 1 ]]; then printf '\033[?25h'; fi # the progress bar had hidden the cursor
}

last_step() { # last whole line's step of metrics.jsonl, 0 without one
  local line
  line=$(grep -s '}$' "$run_dir/metrics.jsonl" | tail -n 1) || true
  line=${line#*\"step\": }
  line=${line%%,*}
  printf '%s\n' "${line:-0}"
}

train_until_killed() {
  local command=("${megascale[@]}" train "$config" --nproc "$nproc" "${settings[@]}")
  local checkpoint saved
  show "${command[@]}"
  set -m # a background job gets a process group of its own: the launcher and all its ranks
  "${command[@]}" &
  training=$!
  set +m
  until checkpoint=$(newest_checkpoint); do
    kill -0 "$training" 2>/dev/null || training_ended_early
    sleep 0.1
  done
  saved=$((10#${checkpoint##*_}))
  until (($(last_step) >= saved + 2)); do # steps that the kill will lose
    kill -0 "$training" 2>/dev/null || training_ended_early
    sleep 0.05
  done
  stop_training
  killed_at=$(last_step)
  cp "$run_dir/metrics.jsonl" "$run_dir/metrics_before_kill.jsonl"
  checkpoint=$(newest_checkpoint)
  say ""
  say "killed with kill -9 after step $killed_at; the newest checkpoint is of step $((10#${checkpoint##*_}))"
}

training_ended_early() {
  local status=0
  wait "$training" || status=$?
  training=""
  ((status == 0)) || die "the training failed with exit code $status" "see the message above and $run_dir/logs"
  die "the training ended before it could be killed" "raise QUICKSTART_STEPS, or lower checkpoint.save_interval"
}

check_metrics() { # every step 1..N once, samples without a gap, and the lost steps bit for bit
  "${python[@]}" - "$run_dir" "$(resolved train.max_steps)" "$(resolved train.global_batch_size)" <<'PY'
import json, sys

def lines(path):
    found = []
    for text in open(path, encoding="utf-8"):
        try:
            found.append(json.loads(text))
        except ValueError:  # the last line of a killed process may be torn
            continue
    return found

folder, steps, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
after = lines(f"{folder}/metrics.jsonl")
before = lines(f"{folder}/metrics_before_kill.jsonl")
if [line["step"] for line in after] != list(range(1, steps + 1)):
    sys.exit(f"quickstart: error: {folder}/metrics.jsonl does not hold each of the steps 1..{steps} once")
if any(line["samples_seen"] != line["step"] * batch for line in after):
    sys.exit(f"quickstart: error: samples were lost or repeated, see {folder}/metrics.jsonl")
pairs = list(zip(before, after))
differing = [a["step"] for b, a in pairs if (b["loss"], b["grad_norm"]) != (a["loss"], a["grad_norm"])]
print(f"metrics.jsonl: steps 1..{steps}, none missing, none twice; {batch} samples a step without a gap")
print(f"{len(pairs)} steps ran before the kill; losses and gradient norms on file now: " + (
    "bit-identical" if not differing else f"different from step {differing[0]} on"))
PY
}

evaluate() { # prints the table and stops unless the model beats a table of pairs
  local table loss bigram steps
  local command=("${megascale[@]}" evaluate "$checkpoint" --baselines --nproc "$nproc")
  show "${command[@]}"
  table=$("${command[@]}")
  say "$table" | tee "$run_dir/evaluation.txt"
  loss=$(awk '$1 == "loss" {print $2}' <<<"$table")
  bigram=$(awk '$1 == "bigram_entropy" {print $2}' <<<"$table")
  [[ -n $loss && -n $bigram ]] || die "the evaluation printed no loss or no bigram_entropy" "report this as a bug"
  steps=$(resolved train.max_steps)
  if awk -v loss="$loss" -v bigram="$bigram" 'BEGIN {exit !(loss + 0 < bigram + 0)}'; then
    awk -v loss="$loss" -v bigram="$bigram" 'BEGIN {
      printf "held-out loss %.4f is %.1f %% below the bigram entropy %.4f: ", loss, 100 * (1 - loss / bigram), bigram
      print "the model learnt more than which token follows which"}'
  elif ((steps < gate_from_steps)); then
    say "note: held-out loss $loss is not below the bigram entropy $bigram; $steps steps are too few to ask for it (from $gate_from_steps on)"
  else
    die "held-out loss $loss is not below the bigram entropy $bigram of the training data" \
      "something is wrong with data, model or training: look at the loss in $run_dir/metrics.jsonl"
  fi
}

check_knobs
trap stop_training EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

heading 0 "installing (once; needs a network)"
install
started=$SECONDS
new_run_folder
settings_of_run

heading 1 "training a tokenizer: byte-level BPE with $vocab_size tokens, learnt from $input"
run "${python[@]}" -m data_prep train-tokenizer --input "$input" --vocab-size "$vocab_size" \
  --output "$dir/tokenizer" --overwrite
took

heading 2 "tokenising: text becomes a file of token ids, with an index and a manifest"
run "${python[@]}" -m data_prep tokenize --input "$input" --tokenizer "$dir/tokenizer" \
  --output "$dir/data" --overwrite
took

heading 3 "training on $nproc processes, killed on purpose soon after a checkpoint"
train_until_killed
took

heading 4 "resuming from the newest checkpoint, to the end"
run "${megascale[@]}" train "$config" --nproc "$nproc" --resume "${settings[@]}"
check_metrics
took

heading 5 "evaluating on text that was held out of the training"
checkpoint=$(newest_checkpoint) || die "the training left no checkpoint in $run_dir" "see $run_dir/logs"
evaluate
took

heading 6 "a sample: the model continues 'def '"
run "${megascale[@]}" generate "$checkpoint" --prompt 'def ' --max-new-tokens 120
took

heading 7 "what to do next"
cat <<NEXT
source tools/install.sh                                      # puts megascale on the PATH of this shell
megascale generate $checkpoint --prompt 'class '
tensorboard --logdir $run_dir/tensorboard
python -m data_prep tokenize --input 'my_texts/*.txt' --tokenizer $dir/tokenizer --output data/mine
megascale train $config --nproc $nproc data.path=data/mine run.output_dir=runs/mine parallel.zero_stage=2
NEXT
printf '\ninstallation took %d s, everything else %d s\n' "$install_seconds" $((SECONDS - started))
