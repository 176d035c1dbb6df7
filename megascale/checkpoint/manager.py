"""The checkpoints of one run: saving, finding the newest intact one, pruning old ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megascale.checkpoint.background import BackgroundTask, Snapshot, mark_ready
from megascale.checkpoint.lock import RunLock
from megascale.checkpoint.manifest import MANIFEST_NAME, Manifest
from megascale.checkpoint.ranks import Ranks, agree, make_ranks
from megascale.checkpoint.reader import CheckpointReader, sizes_differ
from megascale.checkpoint.retention import steps_to_remove
from megascale.checkpoint.sharing import Shares
from megascale.checkpoint.staging import Staged, disk_leaders, staged_checkpoints
from megascale.checkpoint.storage import (
    REMOVING_PREFIX,
    RETIRED_PREFIX,
    SPARE_NAME,
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


_NO_MANIFEST = f"{MANIFEST_NAME} is missing: it was never complete, or is damaged"
_NOT_WHOLE = "the staging folders lack some of its files, or these have another size"


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint to resume from: in the run's folder, or staged.

    Attributes:
        reason: why it cannot be taken; "" where it may be.
        staged: where its files are; None in the run's folder, and for what is not whole.
    """

    step: int
    path: str
    is_staged: bool
    reason: str = ""
    staged: Staged | None = None


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
            elif name == SPARE_NAME or name.startswith((WRITING_PREFIX, REMOVING_PREFIX)):
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
        asynchronous: `save` returns at once, see there.
        staging: a folder on this machine where checkpoints are written first; from there they
            are copied to `root` in the background.
        reuse: a save writes over the files of the checkpoint that was pruned last, where they lie
            on a file system of this machine alone.
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
        reuse: bool = False,
        storage: Storage | None = None,
        ranks: Ranks | None = None,
        locks: Iterable[RunLock] = (),
    ) -> None:
        super().__init__(root, storage)
        self._retention = Retention(keep_last, keep_every)
        self._asynchronous = asynchronous
        self._staging = CheckpointFolder(staging) if staging else None
        self._reuse = reuse and self.storage.is_local and staging is None
        self._given_ranks = ranks
        self._locks = list(locks)
        self._leaders: list[int] | None = None
        self._shares = Shares()
        self._snapshot = Snapshot()
        self._committed: Manifest | None = None
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

        Asynchronous: first waits for the save before. Then the fragments, which are listed in the
        background, and their data must not change until `wait_until_copied` returns; everything
        else may.

        Args:
            fragments: what this rank owns; each element is on one rank.
            keep: a step whose checkpoint is not pruned however old it is.
            replicas: all that this rank holds, so that ranks that hold the same share the work.

        Raises:
            UserError: this save, or the one before in the background, failed on some rank.
        """
        self.finish()
        ranks = self._ranks
        frozen = json.loads(json.dumps(state))
        content = Content(
            step, (), torch.get_rng_state(), frozen, dict(attachments), self._asynchronous
        )
        kept = [] if keep is None else [keep]

        def mine() -> list[Fragment]:
            return self._shares.own(list(fragments), list(replicas), ranks)

        if self._asynchronous:
            ready = mark_ready()
            self._task.start(
                lambda: self._snapshot.take(mine(), ready),
                lambda copies: self._write(replace(content, fragments=copies), kept),
            )
            return self.path(step)
        content = replace(content, fragments=mine())
        if self._staging is not None:
            self._write_to(self._staging, content)
            self._task.start(lambda: step, lambda staged: self._upload(staged, kept))
        else:
            self._write(content, kept)
        return self.path(step)

    def wait_until_copied(self) -> None:
        """Wait until the data of the last `save` is in host memory: then it may change.

        A failure is told by `finish`.
        """
        self._task.wait_until_prepared()

    def is_busy(self) -> bool:
        """Whether a save goes on in the background of this rank."""
        return self._task.is_busy()

    def writes_over(self) -> bool:
        """Whether the next save finds the files of a pruned checkpoint."""
        return self._reuse and self.storage.exists(SPARE_NAME)

    def has_failed(self) -> bool:
        """Whether this rank can save no more, or did not; `finish` tells why."""
        return self._task.failed() or any(lock.is_lost() for lock in self._locks)

    def finish(self) -> None:
        """Wait until nothing is being saved in the background.

        Raises:
            UserError: the save failed; told once. The checkpoints before it are untouched. Or
                the folder is another attempt's by now, or gone.
        """
        self._task.wait()
        for lock in self._locks:
            lock.require_held()

    def _write(self, content: Content, keep: list[int]) -> None:
        if self._staging is not None:
            self._write_to(self._staging, content)
            self._upload(content.step, keep)
            return
        self._write_to(self, content)
        agree(self._ranks, lambda: self._prune_all(keep))

    def _write_to(self, folder: CheckpointFolder, content: Content) -> None:
        leaders = self._staging_leaders() if folder is self._staging else None
        name = step_name(content.step)
        self._committed = write_checkpoint(folder.storage, name, content, self._ranks, leaders)

    def _staging_leaders(self) -> list[int]:
        """For each rank the lowest one with the same staging folder; collective at first."""
        assert self._staging is not None
        if self._leaders is None:
            self._leaders = disk_leaders(self._staging.storage, self._ranks)
        return self._leaders

    def _upload(self, step: int, keep: list[int]) -> None:
        """Copy a staged checkpoint to the run's folder, then prune both."""
        assert self._staging is not None
        upload(self._staging.storage, self.storage, step_name(step), self._ranks)
        agree(self._ranks, lambda: self._prune_all(keep))

    def remove(self, step: int) -> None:
        """See `CheckpointFolder.remove`; with `reuse` its files wait for the next save."""
        if not (self._reuse and self.storage.is_of_one_machine()):
            super().remove(step)
            return
        self.storage.remove_folder(SPARE_NAME)
        self.storage.rename_folder(step_name(step), SPARE_NAME)

    def _damage(self, step: int, thorough: bool) -> str | None:
        """The manifest of the step that was just saved is known: its files are looked at only."""
        known = self._committed
        if known is None or known.step != step or thorough:
            return super()._damage(step, thorough)
        return sizes_differ(Storage(self.path(step)), known)

    def _prune_all(self, keep: list[int]) -> None:
        if self._ranks.rank == 0:
            self.prune(self._retention, keep)
        if self._staging is not None and self._leads_staging():
            for step in self._staging.steps()[:-_STAGED]:  # all are in the run's folder by now
                self._staging.remove(step)

    def _leads_staging(self) -> bool:
        return self._staging_leaders()[self._ranks.rank] == self._ranks.rank

    def open_newest_intact(self) -> tuple[CheckpointReader | None, list[str]]:
        """Open the newest checkpoint whose every file is intact; collective.

        Where a checkpoint is also in the staging folder, that copy is tried first. One that only
        the staging folders of several machines hold together is copied to the run's folder first.

        Returns:
            (reader, notes): the reader is None when there is no checkpoint at all; the notes say
            which newer ones were passed over and why.

        Raises:
            UserError: there are checkpoints, but none is intact.
        """
        notes: list[str] = []
        damaged = False
        for candidate in self._candidates():
            reason = candidate.reason
            if not reason:
                reader, reason = self._open_candidate(candidate)
                if reader is not None:
                    return reader, notes
            damaged = damaged or reason != _NO_MANIFEST
            notes.append(f"{candidate.path} passed over: {reason}")
        if damaged:
            raise UserError(
                "no intact checkpoint to resume from:\n    " + "\n    ".join(notes),
                rule="every file must have the size and checksum that its manifest records",
                remedy="restore one of them, or start anew in another run.output_dir",
            )
        return None, notes

    def _open_candidate(self, candidate: _Candidate) -> tuple[CheckpointReader | None, str]:
        """See `_open_intact`; what no rank sees whole is brought together before."""
        path, staged = candidate.path, candidate.staged
        if staged is not None and not staged.is_near:
            assert self._staging is not None
            source, path = self._staging.storage, self.storage.location(staged.name)
            try:
                upload(source, self.storage, staged.name, self._ranks, staged.holders)
            except UserError as error:
                return None, error.what
        return _open_intact(path, self._ranks)

    def _candidates(self) -> list[_Candidate]:
        """Newest first, the same on all ranks."""

        def kept() -> list[list[Any]]:
            if self._ranks.rank:
                return []
            self.recover()
            return [[step, self.is_complete(step)] for step in self.all_steps()]

        rows = agree(self._ranks, kept)[0]
        whole = {step for step, complete in rows if complete}
        found = [
            _Candidate(step, self.path(step), False, "" if step in whole else _NO_MANIFEST)
            for step, _ in rows
        ]
        for each in self._staged_candidates():
            # what lies apart on several machines is brought together only where it is missed
            if each.staged is None or each.staged.is_near or each.step not in whole:
                found.append(each)
        return sorted(found, key=lambda each: (-each.step, not each.is_staged))

    def _staged_candidates(self) -> list[_Candidate]:
        if self._staging is None:
            return []
        folder, leads = self._staging, self._leads_staging()
        agree(self._ranks, lambda: folder.recover() if leads else None)
        steps = {step: folder.is_complete(step) for step in folder.all_steps()}
        names = [step_name(step) for step, complete in steps.items() if complete]
        staged = {
            each.name: each for each in staged_checkpoints(folder.storage, names, self._ranks)
        }
        seen: dict[int, bool] = {}
        for rows in self._ranks.exchange(list(steps.items())):
            for step, complete in rows:
                seen[step] = seen.get(step, False) or complete
        found = []
        for step, complete in seen.items():
            whole = staged.get(step_name(step))
            reason = "" if whole else _NOT_WHOLE if complete else _NO_MANIFEST
            found.append(_Candidate(step, folder.path(step), True, reason, whole))
        return found

    def close(self) -> None:
        """Wait for the background, whatever comes of it, and give the folder free."""
        self._task.abandon()
        if self._reuse and self._locks:  # this process is the one that prunes
            with contextlib.suppress(UserError, OSError):
                self.storage.remove_folder(SPARE_NAME)
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
