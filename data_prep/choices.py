"""What options let one choose from, apart from the steps, which take long to import."""

from __future__ import annotations

from enum import Enum


class Action(str, Enum):
    """What happens to a document that holds text of an evaluation set."""

    DROP = "drop"
    CUT = "cut"


class Executor(str, Enum):
    """Who starts the tasks of a recipe."""

    LOCAL = "local"
    SLURM = "slurm"
