"""Slurm's own commands, called so that a controller that is away for a moment is waited for.

Only sbatch, squeue, scontrol, scancel and sinfo: no accounting database is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megascale.errors import UserError

_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes were|"
    r"Transport endpoint is not connected|Communication connection failure|backup controller",
    re.I,
)
_PAUSES_S = (1, 2, 4, 8, 15, 30)
_COMMAND_S = 60
_OVER = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY", "REVOKED"),
)
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class Job:
    """A job as squeue shows it.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, ...
        reason: why it waits.
        comment: megascale:RUN for a job of ours, RUN its output folder.
    """

    number: str
    name: str
    user: str
    state: str
    reason: str
    nodes: str
    comment: str
    restarts: int = 0

    @property
    def run(self) -> str:
        """run.output_dir; "" for a job that is not ours."""
        return self.comment.removeprefix("megascale:") if "megascale:" in self.comment else ""

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor waits; any other state (held, suspended) may go on."""
        return self.state in _OVER


class Slurm:
    """Slurm's commands.

    Args:
        sleep: between two tries; replaced in tests.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep

    def call(
        self,
        *command: str,
        errors_in: Callable[[str], str] = lambda text: "",
        heard: Callable[[], str] = lambda: "",
    ) -> str:
        """Run a command until the controller answers; returns what it printed.

        Args:
            errors_in: finds in its output why it could not ask; "" if it could. For a command whose
                exit code is 0 all the same.
            heard: asked before a further try: what the command would have printed, if it was
                carried out although its answer was lost; else "".

        Raises:
            UserError: there is no such program, it refuses, or the controller stays away.
        """
        if shutil.which(command[0]) is None:
            raise UserError(
                f"there is no {command[0]} here",
                rule="submitting and looking at jobs needs Slurm's client programs",
                remedy="run this on a login node of the cluster",
            )
        for pause in (*_PAUSES_S, None):
            done = subprocess.run(
                command,
                env=outside_of_jobs(os.environ),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMMAND_S,
            )
            problem = done.stderr.strip() if done.returncode else errors_in(done.stdout)
            if done.returncode == 0 and not problem:
                return done.stdout
            if done.returncode and not _AWAY.search(problem):
                break
            if pause is not None:
                self._sleep(pause)
                if answer := heard():
                    return answer
        raise UserError(
            f"{command[0]}: {problem or f'exit code {done.returncode}'}",
            rule=f"asked was: {' '.join(command)}",
            remedy="if the controller is away, try again later; else correct the request",
        )

    def jobs(self) -> list[Job]:
        """All jobs that the controller remembers, newest last."""
        found = json.loads(self.call("squeue", "--json", errors_in=_json_errors))["jobs"]
        return sorted((_job(entry) for entry in found), key=lambda job: int(job.number))

    def partitions(self) -> dict[str, Mapping[str, str]]:
        """What `scontrol show partition` says, by name."""
        text = self.call("scontrol", "show", "partition", "--oneliner")
        parts = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines()]
        return {part["PartitionName"]: part for part in parts if "PartitionName" in part}

    def nodes(self, partition: str) -> list[Mapping[str, str]]:
        """Nodes of a partition: name, state, cpus, memory in MB, gres."""
        names = ("name", "state", "cpus", "memory", "gres")
        text = self.call("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%T|%c|%m|%G")
        return [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]

    def submit(self, script: str, *options: str, run: str = "", known: Sequence[str] = ()) -> str:
        """Queue a batch script; returns the job's number.

        A controller whose answer comes too late has queued the job all the same.

        Args:
            run: the run's folder; before a further try its jobs are looked at.
            known: numbers of its jobs that were queued before.
        """

        def heard() -> str:
            new = [job.number for job in self.jobs() if job.run == run and not job.is_over]
            return next((number for number in new if number not in known), "")

        looked = heard if run else lambda: ""
        text = self.call("sbatch", "--parsable", *options, script, heard=looked)
        return text.strip().split(";")[0]

    def cancel(self, numbers: Sequence[str]) -> None:
        """End jobs, waiting ones too."""
        self.call("scancel", *numbers)


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without a surrounding job's variables, which sbatch takes for options."""
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI"))
    }


def _json_errors(text: str) -> str:
    """What squeue says went wrong: without a controller it lists no job, and its exit code is 0."""
    errors = json.loads(text).get("errors") or []
    return "; ".join(f"{e.get('source', '')}: {e.get('description', '')}" for e in errors)


def _job(entry: Mapping[str, Any]) -> Job:
    """From squeue's JSON, whose state became a list and whose numbers became objects with time."""
    state = entry.get("job_state", "")
    return Job(
        number=str(entry["job_id"]),
        name=str(entry.get("name", "")),
        user=str(entry.get("user_name") or entry.get("user_id", "")),
        state=str(state[0] if isinstance(state, list) else state),
        reason=str(entry.get("state_reason", "")),
        nodes=str(entry.get("nodes", "")),
        comment=str(entry.get("comment", "")),
        restarts=int(entry.get("restart_cnt", 0)),
    )
