"""Where an output is made: beside its name on a disk, or under its name in an object store.

On a disk all is written to `.OUT.unfinished`, which becomes OUT by one rename. A store of objects
cannot rename, so there OUT fills up:

    OUT/.run.json           the identity of the run, created by the first process that comes
    OUT/SHARD*              files of finished shards; each appears whole, by one upload
    OUT/.done/SHARD.json    marker, uploaded after the shard's files
    OUT/report.json, ...    what concerns all shards; the marker of the output (manifest.json, or
                            report.json) is the last object, and without it nothing reads OUT

Shards are made in a local scratch folder and removed when they are uploaded.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from data_prep.outputs import RUN_NAME
from data_prep.report import REPORT_NAME
from megascale.data.atomic_files import (
    disk_errors,
    fsync_path,
    full_disk_errors,
    move_into_place,
    new_folder,
    sync_tree,
    write_file,
)
from megascale.data.places import (
    as_path,
    claim,
    is_remote,
    put_bytes,
    put_file,
    remote_errors,
    remove_file,
    remove_tree,
    size_of,
)
from megascale.errors import UserError
from megascale.file_lock import FileLock

DONE_FOLDER = ".done"
_MARKERS = ("manifest.json", REPORT_NAME)


@dataclass(frozen=True)
class ShardStore:
    """Keeps finished shards and their markers; picklable, each worker has a copy.

    Attributes:
        kept: URL or path of the folder where shards are kept.
        scratch: local folder in which shards are made; on a disk the same as `kept`.
        aside: files named `ASIDE_NAME` are kept as `ASIDE/NAME`, out of the way of the next step.
    """

    kept: str
    scratch: Path
    aside: str = ""

    @property
    def folder(self) -> Path:
        """Where shards are kept."""
        return as_path(self.kept)

    def scratch_for(self, name: str) -> Path:
        """The local folder that this process makes a shard in."""
        return self.scratch / f".{name}.{os.getpid()}.tmp"

    def path_of(self, file: str) -> Path:
        """Where a shard's file is kept."""
        if self.aside and file.startswith(f"{self.aside}_"):
            return self.folder / self.aside / file.removeprefix(f"{self.aside}_")
        return self.folder / file

    def keep(self, file: Path) -> None:
        """Move a finished file from the scratch folder to its final name."""
        target = self.path_of(file.name)
        if is_remote(target):
            put_file(file, target)
            return
        fsync_path(file)
        if target.parent != self.scratch:
            target.parent.mkdir(exist_ok=True)
        os.replace(file, target)

    def put_marker(self, name: str, content: bytes) -> None:
        """Write the marker of a shard whose files are all kept."""
        marker = self.folder / DONE_FOLDER / f"{name}.json"
        if is_remote(marker):
            put_bytes(content, marker)
            return
        fsync_path(self.scratch)
        write_file(marker, content)

    def marker(self, name: str) -> bytes:
        """The content of a marker.

        Raises:
            OSError: there is none.
        """
        return (self.folder / DONE_FOLDER / f"{name}.json").read_bytes()

    def size(self, file: str) -> int | None:
        """Bytes of a kept file, None where it is missing."""
        return size_of(self.path_of(file))

    def has_markers(self) -> bool:
        """Whether any shard is finished."""
        return any((self.folder / DONE_FOLDER).glob("*.json"))


class Workplace(Protocol):
    """An output that is being made.

    Attributes:
        output: its path or URL.
        folder: local folder for files that concern all shards.
        store: of the shards.
        where: the unfinished output, for messages.
    """

    output: Path
    folder: Path
    store: ShardStore
    where: Path

    def lock(self, taken: Callable[[str], UserError]) -> FileLock:
        """Keep other processes out until it is released; makes `taken` of who holds it."""

    def identity(self) -> Any:
        """What an unfinished output was begun with, None where there is none."""

    def begin(self, identity: Any, anew: bool) -> Any:
        """Make an unfinished output; `anew` drops what is there. Returns the identity it has."""

    def clear(self) -> None:
        """Remove what killed processes left half done."""

    def leave(self) -> None:
        """Remove what a run that did not finish leaves and cannot be continued."""

    def publish(self, last: str, replaceable: Callable[[Path], bool]) -> None:
        """Complete the output; `last` is the file that tells that it is."""


def workplace_of(output: Path, aside: str = "") -> Workplace:
    """Where to make an output: a disk, or a store."""
    return _Remote(output, aside) if is_remote(output) else _Local(output, aside)


def tidy_output(output: Path) -> None:
    """Remove what only an unfinished run needs; a run killed right after its last step has it."""
    remove_tree(output / DONE_FOLDER)
    remove_file(output / RUN_NAME)


def _encoded(identity: Any) -> bytes:
    return (json.dumps(identity, indent=2, ensure_ascii=False) + "\n").encode()


class _Local:
    def __init__(self, output: Path, aside: str) -> None:
        self.output = output
        self.folder = self.where = output.with_name(f".{output.name}.unfinished")
        self.store = ShardStore(os.fspath(self.folder), self.folder, aside)

    def lock(self, taken: Callable[[str], UserError]) -> FileLock:
        with disk_errors(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(self.output.with_name(f".{self.output.name}.lock"), taken)

    def identity(self) -> Any:
        return _read_json(self.folder / RUN_NAME)

    def begin(self, identity: Any, anew: bool) -> Any:
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
        with disk_errors(self.folder):
            (self.folder / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
            write_file(self.folder / RUN_NAME, _encoded(identity))
        return identity

    def clear(self) -> None:
        for entry in self.folder.glob(".*.tmp"):
            shutil.rmtree(entry, ignore_errors=True)
        for entry in self.folder.glob(f"{DONE_FOLDER}/.*.tmp"):
            entry.unlink(missing_ok=True)
        shutil.rmtree(self.folder.with_suffix(".old"), ignore_errors=True)

    def leave(self) -> None:
        if not self.store.has_markers():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.clear()

    def publish(self, last: str, replaceable: Callable[[Path], bool]) -> None:
        with disk_errors(self.output):
            sync_tree(self.folder)
            move_into_place(self.folder, self.output, replaceable)
        tidy_output(self.output)


class _Remote:
    def __init__(self, output: Path, aside: str) -> None:
        self.output = self.where = output
        name = xxhash.xxh3_128_hexdigest(str(output).encode())
        self._scratch = own_temporary_folder() / name
        self.folder = self._scratch / f"common.{os.getpid()}"
        self.store = ShardStore(str(output), self._scratch, aside)

    def lock(self, taken: Callable[[str], UserError]) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._scratch.with_suffix(".lock"), taken)

    def identity(self) -> Any:
        with remote_errors(self.output):
            return _read_json(self.output / RUN_NAME)

    def begin(self, identity: Any, anew: bool) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        if anew:
            for name in _MARKERS:  # first, so that nobody reads a half-removed output
                remove_file(self.output / name)
            remove_tree(self.output)
        if claim(_encoded(identity), self.output / RUN_NAME):
            return identity
        return self.identity()

    def clear(self) -> None:
        for entry in self._scratch.glob(".*.tmp") if self._scratch.is_dir() else ():
            _remove_if_abandoned(entry, entry.name.split(".")[-2])
        for entry in self._scratch.glob("common.*") if self._scratch.is_dir() else ():
            _remove_if_abandoned(entry, entry.suffix[1:])

    def leave(self) -> None:
        with remote_errors(self.output):
            if not self.store.has_markers() and self.identity() is not None:
                remove_file(self.output / RUN_NAME)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.clear()

    def publish(self, last: str, replaceable: Callable[[Path], bool]) -> None:
        upload_folder(self.folder, self.output, last)
        tidy_output(self.output)


def upload_folder(source: Path, target: Path, last: str) -> None:
    """Copy the files of a local folder into a store, the one named `last` after all others."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path == source / last):
        put_file(path, target / path.relative_to(source).as_posix())


@contextmanager
def new_output(output: Path, marker: str, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a local folder that becomes `output` when the block ends well; see `new_folder`.

    In a store its files are uploaded, `marker` last; what is replaced goes first.
    """
    if not is_remote(output):
        with new_folder(output, replaceable) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(dir=own_temporary_folder(), prefix="new-") as name:
        folder = Path(name)
        with full_disk_errors(folder):
            yield folder
        if replaceable(output):
            remove_file(output / marker)
            remove_tree(output)
        upload_folder(folder, output, marker)


def own_temporary_folder() -> Path:
    """This user's folder for scratch files, below the system's temporary folder.

    Raises:
        UserError: another user made it.
    """
    folder = Path(tempfile.gettempdir()) / f"megascale-{os.getuid()}"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(
            f"{folder} belongs to user {folder.stat().st_uid}",
            rule="scratch files lie where only their user can write",
            remedy="remove it, or set TMPDIR to a folder of your own",
        )
    return folder


def _remove_if_abandoned(path: Path, owner: str) -> None:
    import psutil  # only where something lies about

    if owner.isdigit() and not psutil.pid_exists(int(owner)):
        shutil.rmtree(path, ignore_errors=True)


def _read_json(path: Path) -> Any:
    """What a file holds, None where it is missing or was cut off: nothing was finished then."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
