"""One run writes one folder."""

from __future__ import annotations

import os
from pathlib import Path

from megascale.checkpoint.storage import explain_write_errors
from megascale.errors import TakenOverError, UserError
from megascale.file_lock import FileLock

LOCK_NAME = ".run.lock"


class RunLock:
    """Holds a local folder for one run until `release` or the end of the process.

    Args:
        folder: a local folder; made when it is not there.
        setting: which setting named it, for the refusal.

    Raises:
        UserError: another run holds it, or the folder cannot be written to.
    """

    def __init__(self, folder: str, setting: str = "run.output_dir") -> None:
        path = Path(folder) / LOCK_NAME
        with explain_write_errors(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.folder = str(path.parent)
        with explain_write_errors(str(path)):
            self._lock = FileLock(path, lambda holder: _taken(path.parent, holder, setting))

    def is_lost(self) -> bool:
        """Whether this run must write no more: the folder is a later attempt's, or is gone."""
        return self._lock.was_taken_over() or not os.path.isdir(self.folder)

    def require_held(self) -> None:
        """Refuse to go on in a folder that is another attempt's by now, or is gone.

        Raises:
            TakenOverError: it is another attempt's.
            UserError: it is gone.
        """
        if self._lock.was_taken_over():
            raise TakenOverError(
                f"a later attempt at this run has taken {self.folder} over",
                rule="Slurm took this machine for lost and started the run elsewhere",
                remedy="nothing needs to be done: the later attempt goes on",
            )
        if self.is_lost():
            raise UserError(
                f"{self.folder} is gone",
                rule="a run's folder stays where it is while the run goes on",
                remedy="bring it back and start the run again with --resume",
            )

    def release(self) -> None:
        """Give the folder free; more than once does nothing."""
        self._lock.release()


def _taken(folder: Path, holder: str, setting: str) -> UserError:
    return UserError(
        f"another run is writing to {folder}: {holder}",
        rule="two runs in one folder would overwrite each other's checkpoints",
        remedy=f"wait for it or end it, or choose another {setting}",
    )
