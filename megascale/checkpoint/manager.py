"""The checkpoints of one run: naming, finding the newest intact one, pruning old ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from megascale.checkpoint.manifest import MANIFEST_NAME
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.storage import RETIRED_PREFIX, Storage
from megascale.checkpoint.writer import write_checkpoint
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment

_NAME = re.compile(r"^step_(\d{8,})$")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


class CheckpointManager:
    """Saves, finds and prunes the checkpoints below one folder.

    Args:
        root: the run's checkpoint folder (local path or fsspec URL).
        keep_last: how many complete checkpoints to keep; None keeps all.
    """

    def __init__(self, root: str, keep_last: int | None = None) -> None:
        self.root = root
        self._storage = Storage(root)
        self._keep_last = keep_last

    def recover(self) -> None:
        """Give back its name to a checkpoint that a kill caught between a replacement's renames."""
        for name in self._storage.folders():
            original = name.removeprefix(RETIRED_PREFIX)
            if original == name or not _NAME.match(original):
                continue
            if self._storage.exists(original, MANIFEST_NAME):
                self._storage.remove_folder(name)
            else:
                self._storage.commit_folder(name, original)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = []
        for name in self._storage.folders():
            match = _NAME.match(name)
            if match and self._storage.exists(name, MANIFEST_NAME):
                found.append(int(match.group(1)))
        return sorted(found)

    def path(self, step: int) -> str:
        """Path of the checkpoint at `step`."""
        return self._storage.path(step_name(step))

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: Mapping[str, Any],
        attachments: Mapping[str, bytes],
        keep: int | None = None,
    ) -> str:
        """Write the checkpoint of `step`, then prune; collective. Returns its path.

        Args:
            keep: a step whose checkpoint is not pruned however old it is.
        """
        write_checkpoint(self.root, step_name(step), step, fragments, state, attachments)
        if dist.get_rank() == 0:
            self._prune(keep)
        return self.path(step)

    def open_newest_intact(self) -> tuple[CheckpointReader | None, list[str]]:
        """Open the newest checkpoint whose every file is intact; collective.

        Returns:
            (reader, notes): the reader is None when there is no checkpoint at all; the notes say
            which newer ones were passed over and why.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        notes: list[str] = []
        for step in reversed(self._shared_steps()):
            reader, reason = _open_intact(self.path(step))
            if reader is not None:
                return reader, notes
            notes.append(f"{self.path(step)} passed over: {reason}")
        if notes:
            raise UserError(
                "no intact checkpoint to resume from:\n    " + "\n    ".join(notes),
                rule="every file must have the size and checksum that its manifest records",
                remedy="restore one of them, or start anew in another run.output_dir",
            )
        return None, notes

    def _shared_steps(self) -> list[int]:
        """Rank 0's view of the steps, so that all ranks try the same ones."""
        if dist.get_rank() == 0:
            self.recover()
        shared = [self.steps() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared, src=0)
        return shared[0] or []

    def _prune(self, keep: int | None) -> None:
        if self._keep_last is None:
            return
        for step in self.steps()[: -self._keep_last]:
            if step == keep:
                continue
            self._storage.remove_folder(step_name(step))


def open_intact(path: str) -> CheckpointReader:
    """Open one checkpoint whose every file is intact; collective.

    Raises:
        UserError: not a complete checkpoint, or a damaged one; on all ranks alike.
    """
    reader, reason = _open_intact(path)
    if reader is None:
        raise UserError(
            f"checkpoint {path} cannot be used: {reason}",
            rule="it must be a complete folder step_XXXXXXXX whose every file is intact",
            remedy="give the path of such a folder",
        )
    return reader


def _open_intact(path: str) -> tuple[CheckpointReader | None, str]:
    """(reader, "") if all ranks agree that it is intact, else (None, first reason)."""
    reader, reason = None, ""
    try:
        reader = CheckpointReader(path)
        reason = reader.damage(dist.get_rank(), dist.get_world_size()) or ""
    except UserError as error:
        reason = error.what
    reasons: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    first = next((text for text in reasons if text), "")
    if first and reader is not None:
        reader.close()
    return (None, first) if first else (reader, "")
