"""The checkpoints of one run: saving, finding the newest intact one, pruning old ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megascale.checkpoint.background import BackgroundTask, Snapshot
from megascale.checkpoint.lock import RunLock
from megascale.checkpoint.manifest import MANIFEST_NAME
from megascale.checkpoint.ranks import Ranks, agree, make_ranks
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.retention import steps_to_remove
from megascale.checkpoint.sharing import own
from megascale.checkpoint.storage import (
    REMOVING_PREFIX,
    RETIRED_PREFIX,
    WRITING_PREFIX,
    Storage,
)
from megascale.checkpoint.upload import upload
from megascale.checkpoint.writer import Content, write_checkpoint
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment

_NAME = re.compile(r"^step_(\d{8,})$")
_STAGED = 2  # checkpoints kept in the staging folder


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, see `steps_to_remove`."""

    keep_last: int | None = None
    keep_every: int | None = None


class CheckpointFolder:
    """Checkpoints below one folder, seen by one process.

    Args:
        root: local path or fsspec URL; it need not exist.
        storage: of `root`; by default a new one.
    """

    def __init__(self, root: str, storage: Storage | None = None) -> None:
        self.root = root
        self.storage = storage or Storage(root)

    def path(self, step: int) -> str:
        """What opens the checkpoint at `step`."""
        return self.storage.location(step_name(step))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [step for step in self.all_steps() if self.is_complete(step)]

    def all_steps(self) -> list[int]:
        """Steps of the folders with a checkpoint's name, complete or not, ascending."""
        matches = map(_NAME.match, self.storage.folders())
        return sorted(int(match.group(1)) for match in matches if match)

    def is_complete(self, step: int) -> bool:
        """Whether the manifest, which is written last, is there."""
        return self.storage.exists(step_name(step), MANIFEST_NAME)

    def recover(self) -> None:
        """Tidy what a kill left: names of replaced folders, halves of saves and of removals.

        Only for a process that knows that no other one is writing here.
        """
        for name in self.storage.folders():
            original = name.removeprefix(RETIRED_PREFIX)
            if original != name and _NAME.match(original):
                if self.storage.exists(original, MANIFEST_NAME):
                    self.storage.remove_folder(name)
                else:
                    self.storage.commit_folder(name, original)
            elif name.startswith((WRITING_PREFIX, REMOVING_PREFIX)):
                self.storage.remove_folder(name)

    def remove(self, step: int) -> None:
        """Remove a checkpoint; at no moment does a half of it look like a whole one."""
        name = step_name(step)
        if not self.storage.is_local:
            self.storage.remove_file(name, MANIFEST_NAME)
            self.storage.remove_folder(name)
            return
        removing = f"{REMOVING_PREFIX}{name}"
        self.storage.remove_folder(removing)
        self.storage.rename_folder(name, removing)
        self.storage.remove_folder(removing)

    def prune(
        self, retention: Retention, keep: Iterable[int] = (), *, thorough: bool = False
    ) -> list[int]:
        """Remove what no rule keeps, but only while the newest one is whole. Returns the steps.

        Args:
            thorough: compare the newest one's checksums, not only the sizes of its files.
        """
        steps = self.steps()
        doomed = steps_to_remove(steps, retention.keep_last, retention.keep_every, keep)
        if not doomed or self._damage(steps[-1], thorough):
            return []
        for step in doomed:
            self.remove(step)
        return doomed

    def _damage(self, step: int, thorough: bool) -> str | None:
        try:
            reader = CheckpointReader(self.path(step))
        except UserError as error:
            return error.what
        reason = reader.damage() if thorough else reader.sizes_differ()
        reader.close()
        return reason


class CheckpointManager(CheckpointFolder):
    """Saves, finds and prunes the checkpoints of a run; its collective methods on every rank.

    Args:
        root: the run's checkpoint folder (local path or fsspec URL).
        keep_last: how many complete checkpoints to keep; None keeps all.
        keep_every: multiples of it are kept too.
        asynchronous: `save` returns when the state is copied to host memory.
        staging: a folder on this machine where checkpoints are written first; from there they
            are copied to `root` in the background.
        storage, ranks: of `root` and of the run; by default new ones.
        locks: the run's, which `close` releases.
    """

    def __init__(
        self,
        root: str,
        keep_last: int | None = None,
        keep_every: int | None = None,
        *,
        asynchronous: bool = False,
        staging: str | None = None,
        storage: Storage | None = None,
        ranks: Ranks | None = None,
        locks: Iterable[RunLock] = (),
    ) -> None:
        super().__init__(root, storage)
        self._retention = Retention(keep_last, keep_every)
        self._asynchronous = asynchronous
        self._staging = CheckpointFolder(staging) if staging else None
        self._given_ranks = ranks
        self._locks = list(locks)
        self._snapshot = Snapshot()
        self._task = BackgroundTask()

    @property
    def _ranks(self) -> Ranks:
        if self._given_ranks is None:  # not before: making them is collective
            self._given_ranks = make_ranks()
        return self._given_ranks

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: Mapping[str, Any],
        attachments: Mapping[str, bytes],
        keep: int | None = None,
        replicas: Iterable[Fragment] = (),
    ) -> str:
        """Write the checkpoint of `step`, then prune; collective. Returns its path.

        Asynchronous: first waits for the save before, then for the copy to host memory only.

        Args:
            fragments: what this rank owns; each element is on one rank.
            keep: a step whose checkpoint is not pruned however old it is.
            replicas: all that this rank holds, so that ranks that hold the same share the work.

        Raises:
            UserError: this save, or the one before in the background, failed on some rank.
        """
        self.finish()
        owned = own(list(fragments), list(replicas), self._ranks)
        if self._asynchronous:
            owned = self._snapshot.take(owned)
        frozen = json.loads(json.dumps(state))
        content = Content(step, owned, torch.get_rng_state(), frozen, dict(attachments))
        kept = [] if keep is None else [keep]
        if self._asynchronous:
            self._task.start(lambda: self._write(content, kept))
        elif self._staging is not None:
            self._write_to(self._staging, content)
            self._task.start(lambda: self._upload(content.step, kept))
        else:
            self._write(content, kept)
        return self.path(step)

    def is_busy(self) -> bool:
        """Whether a save goes on in the background of this rank."""
        return self._task.is_busy()

    def has_failed(self) -> bool:
        """Whether this rank's save in the background has failed; `finish` tells why."""
        return self._task.failed()

    def finish(self) -> None:
        """Wait until nothing is being saved in the background.

        Raises:
            UserError: the save failed; told once. The checkpoints before it are untouched.
        """
        self._task.wait()

    def _write(self, content: Content, keep: list[int]) -> None:
        if self._staging is not None:
            self._write_to(self._staging, content)
            self._upload(content.step, keep)
            return
        self._write_to(self, content)
        agree(self._ranks, lambda: self._prune_all(keep))

    def _write_to(self, folder: CheckpointFolder, content: Content) -> None:
        write_checkpoint(folder.storage, step_name(content.step), content, self._ranks)

    def _upload(self, step: int, keep: list[int]) -> None:
        """Copy a staged checkpoint to the run's folder, then prune both."""
        assert self._staging is not None
        upload(self._staging.storage, self.storage, step_name(step), self._ranks)
        agree(self._ranks, lambda: self._prune_all(keep))

    def _prune_all(self, keep: list[int]) -> None:
        if self._ranks.rank == 0:
            self.prune(self._retention, keep)
            if self._staging is not None:
                self._staging.prune(Retention(_STAGED))

    def open_newest_intact(self) -> tuple[CheckpointReader | None, list[str]]:
        """Open the newest checkpoint whose every file is intact; collective.

        Where a checkpoint is also in the staging folder, that copy is tried first.

        Returns:
            (reader, notes): the reader is None when there is no checkpoint at all; the notes say
            which newer ones were passed over and why.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        notes: list[str] = []
        damaged = False
        for path, complete in self._shared_candidates():
            reason = f"{MANIFEST_NAME} is missing: it was never complete, or is damaged"
            if complete:
                reader, reason = _open_intact(path, self._ranks)
                if reader is not None:
                    return reader, notes
                damaged = True
            notes.append(f"{path} passed over: {reason}")
        if damaged:
            raise UserError(
                "no intact checkpoint to resume from:\n    " + "\n    ".join(notes),
                rule="every file must have the size and checksum that its manifest records",
                remedy="restore one of them, or start anew in another run.output_dir",
            )
        return None, notes

    def _shared_candidates(self) -> list[tuple[str, bool]]:
        """(path, has a manifest), newest first: rank 0's view, so that all try the same ones."""

        def look() -> list[tuple[str, bool]]:
            if self._ranks.rank:
                return []
            found: list[tuple[int, int, str, bool]] = []
            for order, folder in enumerate([self._staging, self]):
                if folder is not None:
                    folder.recover()
                    rows = (
                        (s, -order, folder.path(s), folder.is_complete(s))
                        for s in folder.all_steps()
                    )
                    found += rows
            return [(path, complete) for _, _, path, complete in sorted(found, reverse=True)]

        return [(path, complete) for path, complete in agree(self._ranks, look)[0]]

    def close(self) -> None:
        """Wait for the background, whatever comes of it, and give the folder free."""
        self._task.abandon()
        for lock in self._locks:
            lock.release()


def open_intact(path: str) -> CheckpointReader:
    """Open one checkpoint whose every file is intact; collective.

    Raises:
        UserError: not a complete checkpoint, or a damaged one; on all ranks alike.
    """
    reader, reason = _open_intact(path, make_ranks())
    if reader is None:
        raise UserError(
            f"checkpoint {path} cannot be used: {reason}",
            rule="it must be a complete folder step_XXXXXXXX whose every file is intact",
            remedy="give the path of such a folder",
        )
    return reader


def _open_intact(path: str, ranks: Ranks) -> tuple[CheckpointReader | None, str]:
    """(reader, "") if all ranks agree that it is intact, else (None, first reason)."""
    reader, reason = None, ""
    try:
        reader = CheckpointReader(path)
        reason = reader.damage(ranks.rank, ranks.size) or ""
    except UserError as error:
        reason = error.what
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
    first = next((text for text in ranks.exchange(reason) if text), "")
    if first and reader is not None:
        reader.close()
    return (None, first) if first else (reader, "")
