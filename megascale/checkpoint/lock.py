"""One run writes one folder."""

from __future__ import annotations

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

    def was_taken_over(self) -> bool:
        """Whether the folder is a later attempt's: this one is lost, and must write no more."""
        return self._lock.was_taken_over()

    def require_held(self) -> None:
        """Refuse to go on in a folder that is another attempt's by now.

        Raises:
            TakenOverError: it is.
        """
        if self.was_taken_over():
            raise TakenOverError(
                f"a later attempt at this run has taken {self.folder} over",
                rule="Slurm took this machine for lost and started the run elsewhere",
                remedy="nothing needs to be done: the later attempt goes on",
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
