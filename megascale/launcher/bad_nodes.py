"""Machines that a run is not to use again: RUN/bad_nodes, a name a line, for people to edit, too.

Without torch and pydantic: the batch script reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megascale.errors import UserError

BAD_NODES = "bad_nodes"


def short(host: str) -> str:
    """A machine's name without its domain: Slurm's name of it, whatever it calls itself."""
    return host.split(".")[0]


def read_bad_nodes(run: Path) -> list[str]:
    """Machines that this run is not to use again, as `megascale doctor` found them."""
    path = run / BAD_NODES
    return path.read_text().split() if path.exists() else []


def add_bad_nodes(run: Path, names: Sequence[str]) -> None:
    """Remember machines that are to be left out of the run's next attempts."""
    known = read_bad_nodes(run)
    new = [name for name in dict.fromkeys(map(short, names)) if name not in known]
    if new:
        run.mkdir(parents=True, exist_ok=True)
        (run / BAD_NODES).write_text("\n".join([*known, *new]) + "\n")


def choose_nodes(
    names: Sequence[str], bad: Sequence[str], seconds: Mapping[str, float], count: int
) -> list[str]:
    """The machines to use, in the allocation's order: the worst are left out.

    Args:
        seconds: of a matrix product on each; {} where nothing was measured. A machine that was
            asked and did not answer is worse than a slow one.
    """

    def rank(name: str) -> tuple[bool, bool, float]:
        return name in bad, bool(seconds) and name not in seconds, seconds.get(name, 0.0)

    best = sorted(names, key=rank)[:count]
    return [name for name in names if name in best]


def nodes_to_exclude(run: Path, partition: Sequence[str], allocated: int, needed: int) -> list[str]:
    """Bad machines that Slurm is not to give to the run's next attempt.

    Slurm holds a job for ever whose wish it can never grant, so spare machines stand in for bad
    ones where the partition has no others.

    Args:
        partition: names of all its machines.
        allocated: machines that the job asks for.
        needed: how many of these train.

    Raises:
        UserError: too few machines are left to train on.
    """
    bad = [name for name in map(short, read_bad_nodes(run)) if name in partition]
    left = len(partition) - len(bad)
    if left < needed:
        raise UserError(
            f"{len(partition)} machines without {', '.join(bad)} are too few for a run on {needed}",
            rule=f"machines in {run / BAD_NODES} are left out",
            remedy="mend them and remove their lines there, or ask for fewer --nodes",
        )
    return bad if left >= allocated else []
