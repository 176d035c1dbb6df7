"""A recipe on many machines, by the executors of datatrove (https://github.com/huggingface/datatrove).

Each phase becomes two executors, one waiting for the other: one with as many tasks as asked for, in
which task R of N makes every N-th shard, and one with a single task that finishes the phase. What
cannot be shared has the single task only. The shards, their markers and so the results are those of
`run` on one machine. datatrove starts, repeats and logs the tasks; nothing here schedules.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.choices import Executor as Executor
from data_prep.recipe.load import Recipe, load_recipe
from data_prep.recipe.phases import NamedPhase, RunAs
from data_prep.recipe.run import finish_report, phase_by_name
from data_prep.shard_runner import Share, ShareDone
from megascale.data.places import as_path, location
from megascale.errors import UserError

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

LOGS = "logs"


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm needs to know of a task."""

    partition: str | None = None
    time: str = "04:00:00"
    memory_gb: int = 4
    qos: str | None = None


@dataclass(frozen=True)
class PhaseTask:
    """What a task of datatrove does; travels to it pickled, so it holds names and no data.

    Attributes:
        recipe: path of the YAML file, which every machine can read.
        output: folder of the recipe.
        phase: its name; "" writes the report at the end.
        shared: make the task's share of the shards; else finish the phase.
    """

    recipe: str
    output: str
    phase: str
    shared: bool

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Run as task `rank` of `world_size`, in the form that datatrove calls."""
        recipe = load_recipe(Path(self.recipe), as_path(self.output))
        share = Share(rank, world_size) if self.shared else None
        run_as = RunAs(1, share=share)
        if not self.phase:
            finish_report(recipe, run_as)
            return data
        with suppress(ShareDone):
            phase_by_name(recipe, self.phase).run(run_as)
        return data


def run_on_datatrove(
    recipe_path: Path,
    recipe: Recipe,
    executor: Executor,
    tasks: int,
    workers: int,
    slurm: SlurmOptions = SlurmOptions(),
    overwrite: bool = False,
) -> None:
    """Run the phases here, or submit them to Slurm, each waiting for the one before.

    Args:
        recipe_path, recipe: the file, and what it holds.
        tasks: of each phase that can be shared.
        workers: processes at a time: on this machine, or in all of Slurm.

    Raises:
        UserError: datatrove or Slurm is not there, or an option is missing.
    """
    if tasks < 1:
        raise UserError(
            f"--tasks {tasks}", rule="a phase has at least one task", remedy="give 1 or more"
        )
    if overwrite:
        raise UserError(
            "--overwrite with --executor",
            rule="tasks on several machines cannot agree on when to remove an output",
            remedy="remove the folders of the recipe's output that are to be made again",
        )
    last = make_executors(recipe_path, recipe, executor, tasks, workers, slurm)
    last.run()


def make_executors(
    recipe_path: Path,
    recipe: Recipe,
    executor: Executor,
    tasks: int,
    workers: int,
    slurm: SlurmOptions = SlurmOptions(),
) -> PipelineExecutor:
    """The chain of executors; running the last one runs those that it depends on first.

    Raises:
        UserError: see `run_on_datatrove`.
    """
    _check_installed(executor, slurm)
    paths = (os.path.abspath(recipe_path), location(recipe.output))
    chain = [
        (_job_name(phase, shared), PhaseTask(*paths, phase.name, shared), tasks if shared else 1)
        for phase in recipe.phases()
        for shared in ((True, False) if phase.shared else (False,))
    ]
    chain.append(("report", PhaseTask(*paths, "", shared=False), 1))
    last: Any = None
    for name, task, count in chain:
        kind, settings = _local() if executor is Executor.LOCAL else _slurm(slurm, name)
        last = kind(
            pipeline=[task],
            tasks=count,
            workers=min(workers, count),
            logging_dir=location(recipe.output / LOGS / name),
            depends=last,
            # Our own markers say what is done, and know of a changed input.
            skip_completed=False,
            **settings,
        )
    return last


def _job_name(phase: NamedPhase, shared: bool) -> str:
    return f"{phase.name.replace(' ', '_')}_{'shards' if shared else 'finish'}"


def _local() -> tuple[type[PipelineExecutor], dict[str, Any]]:
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor, {}


def _slurm(slurm: SlurmOptions, name: str) -> tuple[type[PipelineExecutor], dict[str, Any]]:
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor, {
        "time": slurm.time,
        "partition": slurm.partition,
        "mem_per_cpu_gb": slurm.memory_gb,
        "qos": slurm.qos or "",
        "env_command": _environment(),
        "job_name": name,
        "mail_type": "NONE",
    }


def _environment() -> str:
    """Shell lines that give a task this process's Python, packages and working folder."""
    root = Path(__file__).resolve().parents[1]
    paths = {"PATH": os.path.dirname(sys.executable), "PYTHONPATH": str(root)}
    lines = [f"cd {shlex.quote(os.getcwd())}"]
    for name, path in paths.items():
        lines.append(f"export {name}={shlex.quote(path)}${{{name}:+:${name}}}")
    return "\n".join(lines)


def _check_installed(executor: Executor, slurm: SlurmOptions) -> None:
    try:
        import datatrove.executor  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--executor {executor.value} needs datatrove, which cannot be loaded: {error}",
            rule="tasks on many machines are started by datatrove's executors",
            remedy="pip install 'megascale[data]', or leave --executor out",
        ) from error
    if executor is Executor.SLURM and not slurm.partition:
        raise UserError(
            "--executor slurm without --partition",
            rule="Slurm runs a job in a partition",
            remedy="give one of those that `sinfo` lists",
        )
