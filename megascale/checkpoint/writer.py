"""Writing a checkpoint: every rank its fragments, rank 0 the manifest, one rename to commit."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
import xxhash

from megascale import __version__
from megascale.checkpoint.manifest import (
    MANIFEST_NAME,
    RNG_KEY,
    FileEntry,
    Manifest,
    Piece,
    dump_manifest,
    tensor_key,
)
from megascale.checkpoint.ranks import Ranks, agree
from megascale.checkpoint.storage import SPARE_NAME, WRITING_PREFIX, Storage
from megascale.checkpoint.tensor_file import (
    BACKGROUND_CHUNK,
    TensorStream,
    write_streams,
    write_tensors,
)
from megascale.errors import UserError
from megascale.parallel.fragment import Box, Fragment, whole_box


@dataclass(frozen=True)
class Content:
    """What one rank puts into a checkpoint.

    Attributes:
        step: optimizer steps done.
        fragments: what this rank writes; no element on two ranks.
        rng: state of torch's CPU generator on this rank.
        state: JSON values that are the same on all ranks (trainer, schedule, data position).
        attachments: small files to store beside the tensors (config, tokenizer), by path; only
            rank 0's are written.
        in_background: whether training goes on in another thread meanwhile.
    """

    step: int
    fragments: Sequence[Fragment]
    rng: torch.Tensor
    state: Mapping[str, Any]
    attachments: Mapping[str, bytes]
    in_background: bool = False


def write_checkpoint(
    storage: Storage,
    name: str,
    content: Content,
    ranks: Ranks,
    leaders: Sequence[int] | None = None,
) -> Manifest | None:
    """Write the checkpoint `name` below `storage`. Collective; all ranks return or raise together.

    On a local disk everything is written into a folder of another name and committed by one
    rename. An object store has no rename: there the manifest, written last, is the commit.

    Args:
        leaders: for each rank the one that makes and commits the folder on its disk, where
            `storage` is on several; None: rank 0, for all.

    Returns:
        On rank 0 what it wrote.

    Raises:
        UserError: some rank could not write (disk full, no permission). What was complete before
            is untouched.
    """
    rank, leaders = ranks.rank, leaders or [0] * ranks.size
    leads, several = leaders[rank] == rank, any(leaders)
    working = working_name(storage, name)
    made: list[Manifest] = []

    def describe(written: list[str]) -> str:
        """The manifest, on rank 0; it alone reads what the others wrote."""
        if rank:
            return ""
        small = content.attachments.items()
        files = [_write_attachment(storage, working, *item) for item in small]
        rows = [json.loads(text) for text in written]
        made.append(_merge(rows, files, content.step, content.state))
        if storage.is_local:
            storage.remove_folder(SPARE_NAME)  # what no rank had a use for
        return dump_manifest(made[0]).decode()

    def commit(described: str) -> None:
        if leads:
            with storage.open_write(working, MANIFEST_NAME) as stream:
                stream.write(described.encode())
            if working != name:
                storage.commit_folder(working, name)

    try:
        agree(ranks, lambda: _start_folder(storage, working) if leads else None)
        rows = agree(ranks, lambda: _write_rank_file(storage, working, rank, content))
        if several:
            described = agree(ranks, lambda: describe(rows))[0]
            agree(ranks, lambda: commit(described))
        else:
            agree(ranks, lambda: commit(describe(rows)))
    except BaseException:
        if leads:
            with contextlib.suppress(UserError, OSError):  # what came first is what is told
                storage.remove_folder(working)
        raise
    return made[0] if made else None


def write_weights(
    root: str,
    name: str,
    tensors: Iterable[TensorStream],
    state: Mapping[str, Any],
    attachments: Mapping[str, bytes],
    file_bytes: int,
) -> None:
    """Write a checkpoint of step 0 that holds master weights only. By one process, streaming.

    Args:
        root: folder of the checkpoints. name: this one's folder name.
        tensors: one a parameter, keyed by the parameter's name, in any floating type.
        state: JSON values for the manifest. attachments: small files by path.
        file_bytes: a file is closed when the next tensor would make it larger.

    Raises:
        UserError: the folder cannot be written.
    """
    storage = Storage(root)
    with _new_folder(storage, name) as working:
        written = [
            _write_weight_file(storage, working, f"weights_{number:05d}.safetensors", group)
            for number, group in enumerate(grouped_by_size(tensors, file_bytes))
        ]
        files = [_write_attachment(storage, working, *item) for item in attachments.items()]
        manifest = _merge(written, files, 0, state).model_copy(update={"world_size": 1})
        with storage.open_write(working, MANIFEST_NAME) as stream:
            stream.write(dump_manifest(manifest))


def working_name(storage: Storage, name: str) -> str:
    """Name of the folder while it is written: its own where there is no rename."""
    return f"{WRITING_PREFIX}{name}" if storage.is_local else name


@contextlib.contextmanager
def _new_folder(storage: Storage, name: str) -> Iterator[str]:
    """A folder to write into, the manifest last; committed on a clean exit, else removed."""
    working = working_name(storage, name)
    try:
        _start_folder(storage, working)
        yield working
        if working != name:
            storage.commit_folder(working, name)
    except BaseException:
        with contextlib.suppress(UserError, OSError):  # what came first is what is told
            storage.remove_folder(working)
        raise


@dataclass(frozen=True)
class StreamedFile:
    """One tensor file to write: its tensors, and (parameter, kind, box) of those that are state."""

    tensors: list[TensorStream]
    pieces: list[tuple[str, str, Box]]


def write_streamed(
    storage: Storage,
    name: str,
    files: Sequence[StreamedFile],
    like: Manifest,
    attachments: Mapping[str, bytes],
) -> None:
    """Write a checkpoint of whole tensors, with step, parameters and state of `like`.

    Raises:
        UserError: the folder cannot be written.
    """
    entries: list[FileEntry] = []
    pieces: list[Piece] = []
    with _new_folder(storage, name) as working:
        for number, file in enumerate(files):
            path = f"rank_{number:05d}.safetensors"
            with storage.open_write(working, path) as stream:
                size, digest = write_streams(stream, file.tensors)
            entries.append(FileEntry(path=path, bytes=size, xxh3_128=digest))
            for parameter, kind, box in file.pieces:
                numel = math.prod(end - begin for begin, end in box)
                pieces.append(
                    Piece(file=path, name=parameter, kinds=(kind,), box=box, start=0, numel=numel)
                )
        entries += [_write_attachment(storage, working, *item) for item in attachments.items()]
        changes = {"world_size": len(files), "files": tuple(entries), "pieces": tuple(pieces)}
        with storage.open_write(working, MANIFEST_NAME) as stream:
            stream.write(dump_manifest(like.model_copy(update=changes)))


def grouped_by_size(tensors: Iterable[TensorStream], limit: int) -> list[list[TensorStream]]:
    """Cut a list of tensors into runs of at most `limit` bytes, of at least one tensor each."""
    groups: list[list[TensorStream]] = []
    filled = limit
    for tensor in tensors:
        if filled + tensor.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    return groups


def _write_weight_file(
    storage: Storage, working: str, file: str, tensors: list[TensorStream]
) -> dict[str, Any]:
    """Write one file of whole parameters; returns its rows of the manifest as JSON values."""
    keyed = [
        replace(each, key=tensor_key("master", each.key), shape=(math.prod(each.shape),))
        for each in tensors
    ]
    with storage.open_write(working, file) as stream:
        size, digest = write_streams(stream, keyed)
    pieces = [
        {
            "file": file,
            "name": tensor.key,
            "kinds": ["master"],
            "box": whole_box(tensor.shape),
            "start": 0,
            "numel": math.prod(tensor.shape),
        }
        for tensor in tensors
    ]
    return {
        "file": {"path": file, "bytes": size, "xxh3_128": digest},
        "pieces": pieces,
        "shapes": {tensor.key: tensor.shape for tensor in tensors},
    }


def _start_folder(storage: Storage, working: str) -> None:
    # left by a run that was killed while saving; without its manifest it is no checkpoint at once
    storage.remove_file(working, MANIFEST_NAME)
    storage.remove_folder(working)
    storage.make_folder(working)


def _write_rank_file(storage: Storage, working: str, rank: int, content: Content) -> str:
    """Write this rank's tensors; returns its rows of the manifest as JSON."""
    file = f"rank_{rank:05d}.safetensors"
    tensors = {tensor_key(f.kind, f.name): f.tensor for f in content.fragments}
    assert len(tensors) == len(content.fragments), "a rank has one range of a parameter"
    tensors[RNG_KEY] = content.rng
    chunk = {"chunk": BACKGROUND_CHUNK} if content.in_background else {}
    spare = (SPARE_NAME, file) if storage.is_local else ()
    with storage.open_write(working, file, over=spare) as stream:
        size, digest = write_tensors(stream, tensors, **chunk)
    pieces: dict[Any, dict[str, Any]] = {}
    for f in content.fragments:
        piece = pieces.setdefault(
            (f.name, f.box, f.start, f.numel),
            {"file": file, "name": f.name, "kinds": [], "box": f.box, "start": f.start},
        )
        piece["kinds"].append(f.kind)
        piece["numel"] = f.numel
    rows = {
        "file": {"path": file, "bytes": size, "xxh3_128": digest},
        "pieces": list(pieces.values()),
        "shapes": {f.name: f.global_shape for f in content.fragments},
    }
    return json.dumps(rows)


def _write_attachment(storage: Storage, working: str, path: str, content: bytes) -> FileEntry:
    parent = PurePosixPath(path).parent
    if str(parent) != ".":
        storage.make_folder(working, str(parent))
    with storage.open_write(working, path) as stream:
        stream.write(content)
    digest = xxhash.xxh3_128_hexdigest(content)
    return FileEntry(path=path, bytes=len(content), xxh3_128=digest)


def _piece(values: dict[str, Any]) -> Piece:
    """A piece from JSON values, which know lists only."""
    box = tuple((begin, end) for begin, end in values["box"])
    return Piece(**{**values, "kinds": tuple(values["kinds"]), "box": box})


def _merge(
    written: list[dict[str, Any]], files: list[FileEntry], step: int, state: Mapping[str, Any]
) -> Manifest:
    pieces = [_piece(piece) for part in written for piece in part["pieces"]]
    parameters: dict[str, tuple[int, ...]] = {}
    for part in written:
        parameters.update({name: tuple(shape) for name, shape in part["shapes"].items()})
    return Manifest(
        written_by=f"megascale {__version__}",
        step=step,
        world_size=len(written),
        kinds=tuple(dict.fromkeys(kind for piece in pieces for kind in piece.kinds)),
        parameters=parameters,
        files=(*(FileEntry(**part["file"]) for part in written), *files),
        pieces=tuple(pieces),
        state=dict(state),
    )
