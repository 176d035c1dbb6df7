#!/usr/bin/env bash
# From raw text to a pretrained BERT on this machine:
#
#   bash launch/quickstart.sh bert
#
# Installs into .venv (the only part that needs a network), then: WordPiece tokenizer -> sentences
# -> training with masked tokens and next-sentence prediction on several processes -> evaluation
# against the majority baseline. A few minutes on 2 cores. It can be run again: tokenizer and
# dataset are reused, and each run gets a folder of its own.
#
# Environment: as for quickstart.sh, with these defaults:
#   QUICKSTART_DIR     runs/quickstart_bert in the repository
#   QUICKSTART_INPUT   python-stdlib-prose: docstrings and help texts of the standard library
#   QUICKSTART_CONFIG  configs/bert_tiny.yaml

set -euo pipefail
# shellcheck source=launch/quickstart_parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/quickstart_parts.sh"

vocab_size=4096
gate_from_steps=200 # a shorter training is not expected to be twice as good as the majority
input=${QUICKSTART_INPUT:-python-stdlib-prose}
config=${QUICKSTART_CONFIG:-configs/bert_tiny.yaml}
nproc=${NPROC:-2}
dir=${QUICKSTART_DIR:-$root/runs/quickstart_bert}

evaluate() { # prints the table and stops unless the model is twice as often right as the majority
  local table accuracy majority steps
  show "${megascale[@]}" evaluate "$checkpoint" --baselines
  table=$("${megascale[@]}" evaluate "$checkpoint" --baselines)
  say "$table" | tee "$run_dir/evaluation.txt"
  accuracy=$(awk '$1 == "masked_lm_accuracy" {print $2}' <<<"$table")
  majority=$(awk '$1 == "majority_accuracy" {print $2}' <<<"$table")
  [[ -n $accuracy && -n $majority ]] ||
    die "the evaluation printed no masked_lm_accuracy or no majority_accuracy" "report this as a bug"
  steps=$(resolved train.max_steps)
  if awk -v a="$accuracy" -v m="$majority" 'BEGIN {exit !(a > 2 * m)}'; then
    awk -v a="$accuracy" -v m="$majority" 'BEGIN {
      printf "of the masked tokens of held-out text %.1f %% are found, %.1f times as many as by ", 100 * a, a / m
      print "always naming the most frequent one"}'
  elif ((steps < gate_from_steps)); then
    say "note: masked-LM accuracy $accuracy is not above twice the majority's $majority; $steps steps are too few to ask for it (from $gate_from_steps on)"
  else
    die "masked-LM accuracy $accuracy on held-out text is not above twice the majority's $majority" \
      "something is wrong with data, model or training: look at the loss in $run_dir/metrics.jsonl"
  fi
}

check_knobs

heading 0 "installing (once; needs a network)"
install
started=$SECONDS
new_run_folder
settings_of_run

heading 1 "training a tokenizer: WordPiece with $vocab_size tokens, learnt from $input"
run "${python[@]}" -m data_prep train-tokenizer --input "$input" --kind wordpiece \
  --vocab-size "$vocab_size" --output "$dir/tokenizer" --overwrite
took

heading 2 "tokenising: one sequence a sentence, with an index and a manifest"
run "${python[@]}" -m data_prep tokenize --bert --input "$input" --tokenizer "$dir/tokenizer" \
  --output "$dir/data" --overwrite
took

heading 3 "training on $nproc processes"
run "${megascale[@]}" train "$config" --nproc "$nproc" "${settings[@]}"
took

heading 4 "evaluating on text that was held out of the training"
checkpoint=$(newest_checkpoint) || die "the training left no checkpoint in $run_dir" "see $run_dir/logs"
evaluate
took

heading 5 "what to do next"
cat <<NEXT
source tools/install.sh                                      # puts megascale on the PATH of this shell
tensorboard --logdir $run_dir/tensorboard
python -m data_prep tokenize --bert --input 'my_texts/*.txt' --tokenizer $dir/tokenizer --output data/mine
megascale train $config --nproc $nproc data.path=data/mine run.output_dir=runs/mine data.masking=whole_word
NEXT
printf '\ninstallation took %d s, everything else %d s\n' "$install_seconds" $((SECONDS - started))
