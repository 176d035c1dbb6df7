"""The one kind of error a user may see: what was wrong, the rule it broke, and the remedy."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake in what the user gave (config, files, cluster), never a bug of ours.

    The command line prints it without a traceback and exits with code 2.

    Args:
        what: what was found, with the value or path that is wrong.
        rule: the rule that it breaks.
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, rule: str = "", remedy: str = "") -> None:
        lines = [what]
        if rule:
            lines.append(f"  rule:   {rule}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))
        self.what, self.rule, self.remedy = what, rule, remedy


class NumericalError(UserError):
    """A run that ends because its numbers are no longer finite."""


class DiskFullError(UserError):
    """A file that cannot be written because the disk or a quota is full."""

    NUMBERS = (errno.ENOSPC, errno.EDQUOT)
    """What the system calls it."""


class NodeError(UserError):
    """A run that does not start because of a machine that is not as the others."""


class TakenOverError(UserError):
    """A run that ends because Slurm took its machine for lost and goes on elsewhere."""


class PeerError(UserError):
    """A run that ends because of another rank, whose own error says more."""
