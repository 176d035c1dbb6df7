"""A recipe as a sequence of phases: what is done by many processes, and what by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.shard_runner import Share
from data_prep.step import Step, StepResult, run_step


@dataclass(frozen=True)
class RunAs:
    """How a phase is run: none of it changes what comes out.

    Attributes:
        workers: processes on this machine.
        overwrite: replace finished outputs that were made otherwise.
        share: make some shards only, beside other processes; the phase is then run once more
            without, to finish it.
    """

    workers: int = 1
    overwrite: bool = False
    share: Share | None = None


class Phase(Protocol):
    """One phase; does nothing when its output is there.

    Raises:
        UserError: it cannot be done.
        ShareDone: a share was asked for, and is done.
    """

    def __call__(self, run_as: RunAs) -> StepResult: ...


@dataclass(frozen=True)
class NamedPhase:
    """A phase of a recipe.

    Attributes:
        name: for messages, unique in the recipe.
        shared: whether it goes by shards that several machines can share.
        report: key of the recipe's report; "" for a phase that prepares another.
    """

    name: str
    run: Phase
    shared: bool = True
    report: str = ""


def step_phase(prepare: Callable[[], Step]) -> Phase:
    """A phase that is one run of the frame, prepared when its turn comes."""

    def run(run_as: RunAs) -> StepResult:
        return run_step(prepare(), run_as.workers, run_as.overwrite, run_as.share)

    return run


@dataclass
class Flow:
    """What steps hand on while a recipe is put together.

    Attributes:
        root: folder of the recipe.
        documents: the newest folder of documents.
        tokenizer: the tokenizer that was trained last.
    """

    root: Path
    documents: Path | None = None
    tokenizer: Path | None = None
