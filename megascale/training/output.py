"""Where a run writes: its folders, locked, and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megascale.checkpoint.lock import RunLock
from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.storage import Storage
from megascale.config.schema import Config
from megascale.errors import UserError


def run_manager(
    config: Config, ranks: Ranks | None = None, locks: Sequence[RunLock] = ()
) -> CheckpointManager:
    """The checkpoints of the config's run."""
    saving = config.checkpoint
    return CheckpointManager(
        saving.folder or f"{config.run.output_dir}/checkpoints",
        saving.keep_last,
        saving.keep_every,
        asynchronous=saving.async_save,
        staging=saving.staging_dir,
        reuse=saving.reuse_files,
        ranks=ranks,
        locks=locks,
    )


def open_output(config: Config, ranks: Ranks) -> list[RunLock]:
    """Create the run's folders and lock them, so that what cannot work is refused at once.

    Returns:
        The locks, on rank 0.
    """
    held: list[RunLock] = []

    def open_it() -> None:
        if ranks.rank:
            return
        output, saving = Path(config.run.output_dir), config.checkpoint
        try:
            (output / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to run.output_dir {output}: {error.strerror}",
                rule="a run needs a folder that it may write to",
                remedy="choose another run.output_dir, or free space",
            ) from error
        held.append(RunLock(str(output)))
        for folder, setting in (
            (saving.folder, "checkpoint.folder"),
            (saving.staging_dir, "checkpoint.staging_dir"),
        ):
            if folder is not None and Storage(folder).is_local:
                place = os.path.realpath(Storage(folder).root)
                if place not in {os.path.realpath(lock.folder) for lock in held}:
                    held.append(RunLock(place, setting))

    try:
        agree(ranks, open_it)
    except BaseException:
        for lock in held:
            lock.release()
        raise
    return held
