"""The batch script of a run on a Slurm cluster: one text, filled in by `megascale submit`.

`launch/slurm/pretrain.sbatch` is this text with examples filled in, for those who submit by hand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BatchJob:
    """What a batch script needs to know.

    Attributes:
        name: of the job; runs are found by it.
        submission: names what was submitted together; "" takes the job's number.
        config, overrides: as for `megascale train`.
        run: run.output_dir.
        checkpoints: the folder of the run's checkpoints.
        tasks_per_node: ranks on each machine.
        options: further sbatch options by their long name, e.g. {"time": "2:00:00"}; None: a flag.
        lead_s: seconds before the time limit at which the run saves and ends.
        most_attempts: attempts without a newer checkpoint after which the run is given up.
        requeue_at_limit: whether the time limit leads to another attempt of this job.
        spare_nodes: machines that are allocated beside `nodes`, from which the worst are left out.
        python: runs the bookkeeping of the batch script; train_python the ranks, which may be
            another one, inside a container.
        container: srun options that start a task inside a container.
        environment_file: sourced before anything is started.
        launcher: "srun" (a task a rank) or "torchrun" (a task a machine).
    """

    name: str
    config: str
    run: str
    checkpoints: str
    nodes: int
    tasks_per_node: int
    python: str = "python"
    train_python: str = "python"
    submission: str = ""
    overrides: Sequence[str] = ()
    options: Mapping[str, str | None] = field(default_factory=dict)
    cpus_per_task: int = 1
    lead_s: int = 120
    most_attempts: int = 5
    requeue_at_limit: bool = True
    spare_nodes: int = 0
    container: Sequence[str] = ()
    environment_file: str = ""
    launcher: str = "srun"


def render(job: BatchJob) -> str:
    """The whole batch script."""
    return _HEAD + "\n".join(_directives(job)) + "\n\n" + _settings(job) + _BODY


def _directives(job: BatchJob) -> list[str]:
    one_a_machine = job.launcher == "torchrun"
    options: dict[str, str | None] = {
        "job-name": _quoted(job.name),
        "comment": _quoted(f"megascale:{job.run}"),
        "nodes": str(job.nodes + job.spare_nodes),
        "ntasks-per-node": "1" if one_a_machine else str(job.tasks_per_node),
        "cpus-per-task": str(job.cpus_per_task * (job.tasks_per_node if one_a_machine else 1)),
        "signal": f"B:USR1@{job.lead_s}",
        "output": _quoted(job.run.replace("%", "%%") + "/logs/slurm_%j.out"),
        "open-mode": "append",
        "requeue": None,
        **job.options,
    }
    return [f"#SBATCH --{k}" if v is None else f"#SBATCH --{k}={v}" for k, v in options.items()]


def _quoted(value: str) -> str:
    """A value of a directive, whose quotes are Slurm's own, not the shell's."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _settings(job: BatchJob) -> str:
    def words(parts: Sequence[str]) -> str:
        return "(" + " ".join(map(shlex.quote, parts)) + ")"

    values = {
        "config": shlex.quote(job.config),
        "overrides": words(job.overrides),
        "run": shlex.quote(job.run),
        "checkpoints": shlex.quote(job.checkpoints),
        "nodes": str(job.nodes),
        "tasks_per_node": str(job.tasks_per_node),
        "launcher": job.launcher,
        "python": shlex.quote(job.python),
        "train_python": shlex.quote(job.train_python),
        "container": words(job.container),
        "environment_file": shlex.quote(job.environment_file),
        "submission": shlex.quote(job.submission) if job.submission else '"$SLURM_JOB_ID"',
        "most_attempts": str(job.most_attempts),
        "requeue_at_limit": "1" if job.requeue_at_limit else "0",
        "spare_nodes": str(job.spare_nodes),
    }
    lines = [f"{name}={value}" for name, value in values.items()]
    return "\n".join(["# ---- what runs, and how", *lines, ""])


_HEAD = """\
#!/usr/bin/env bash
# A training on several machines: saved before the time limit, continued after failures.
# docs/launch.md tells what happens when; `megascale submit` fills in and submits this script.
# By hand: edit the settings, mkdir -p RUN/logs, sbatch this file in the folder of its paths.
"""

_BODY = """
# ---- nothing below needs editing
set -uo pipefail # not -e: how an attempt ended is judged from its markers, not from exit codes
log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
[[ -e $log ]] || log=$run/logs/slurm_$SLURM_JOB_ID.out # some versions do not fill in %j
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it from sbatch since 22.05
cpus=$((SLURM_CPUS_PER_TASK * SLURM_NTASKS_PER_NODE)) # of this job on each machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / tasks_per_node))}
export PYTHONUNBUFFERED=1 # what a rank printed before it was killed is in the log
# shellcheck source=/dev/null
[[ -z $environment_file ]] || source "$environment_file"
# ranks and addresses are this job's, whatever the submitting shell had
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT

attempt() { "$python" -m megascale.launcher.attempt "$@"; }

settings=$(attempt begin "$run" --submission "$submission" --checkpoints "$checkpoints" \\
  --most-attempts "$most_attempts" --nodes "$nodes" --log "$log")
code=$?
case $code in
  0) eval "$settings" ;; # MEGASCALE_ATTEMPT_DIR, MASTER_ADDR, and the machines to use: use_nodes
  10) exit 0 ;;          # the run is over
  *) exit "$code" ;;
esac

asked() { echo "$1" >"$MEGASCALE_ATTEMPT_DIR/asked"; }

is_last() { # a machine that was cut off may be back when the job runs elsewhere
  local all=("${MEGASCALE_ATTEMPT_DIR%/*}"/[0-9]*)
  [[ ${all[-1]} == "$MEGASCALE_ATTEMPT_DIR" ]]
}

at_limit() { # a trigger file reaches ranks in containers and under torchrun too
  asked "time limit"
  echo "by the batch script: time limit" >"$run/STOP"
}
trap at_limit USR1
term=0
trap 'term=1' TERM # of scancel and of `scontrol requeue`: there is something left to do

if ((spare_nodes > 0)); then # measure every machine, each by itself; the worst are left out
  timeout 300 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=60 "${container[@]}" \\
    "$train_python" -m megascale doctor --record "$MEGASCALE_ATTEMPT_DIR/machines"
  settings=$(attempt choose "$MEGASCALE_ATTEMPT_DIR" --nodes "$nodes") && eval "$settings"
fi

train=("$train_python" -m megascale train "$config" --resume "run.output_dir=$run")
train+=("${overrides[@]}")
options=(--nodes="$nodes" --nodelist="$use_nodes" --kill-on-bad-exit=1 --wait=60 --label)
options+=(--distribution=block) # neighbours share matrices, whatever the site's default
case $launcher in
  srun) command=(--ntasks="$((nodes * tasks_per_node))" --ntasks-per-node="$tasks_per_node"
    "${container[@]}" "${train[@]}") ;;
  torchrun) command=(--ntasks="$nodes" --ntasks-per-node=1 "${container[@]}"
    "$train_python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$tasks_per_node"
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$torchrun_port"
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "${train[@]:1}") ;;
esac
[[ $launcher == srun ]] || unset MASTER_ADDR # torchrun tells its ranks
echo "megascale: $(date '+%F %T') attempt ${MEGASCALE_ATTEMPT_DIR##*/} of $run on $use_nodes"
srun "${options[@]}" "${command[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do # a trap interrupts wait
  wait "$step"
  code=$?
done

state="" restarts="" # both stay so while the controller is away
read -r state restarts < <(squeue --noheader --jobs="$SLURM_JOB_ID" --Format=State:30,RestartCnt)
# a preemption without grace, an administrator: Slurm ended the ranks, and starts the job again
((${restarts:-0} <= ${SLURM_RESTART_COUNT:-0})) || state=REQUEUED
attempt end "$MEGASCALE_ATTEMPT_DIR" "$code" --state "$state"
code=$?
((code == 75)) || exit "$code"
[[ -z $state || $state == RUNNING ]] || exit 0 # Slurm has requeued or ended it already
if ((!requeue_at_limit)) && [[ -e $MEGASCALE_ATTEMPT_DIR/outcome.json ]]; then
  exit 0 # the next job of the chain goes on
fi
# a machine that differs is left out, unless there is no other to take its place
exclude=$(attempt exclude "$run" --nodes "$nodes")
code=$?
((code != 76)) || exit "$code"
for pause in 1 2 5 10 20 40 60 0; do # the controller may be away
  is_last || exit 0
  # its own TERM may end the command before it has told of its success
  scontrol requeue "$SLURM_JOB_ID" || ((term)) && break
  sleep "$pause"
done
for _ in 1 2 3 4 5; do # the next attempt goes elsewhere; Slurm's TERM may hit this command too
  [[ -n $exclude ]] || break
  scontrol update "jobid=$SLURM_JOB_ID" "excnodelist=$exclude" && break
  sleep 1
done
sleep 60 # Slurm ends this shell
"""
