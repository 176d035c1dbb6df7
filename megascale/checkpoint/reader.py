"""Reading a checkpoint into any layout: each rank reads the byte ranges that it owns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
import xxhash

from megascale.checkpoint.manifest import (
    RNG_KEY,
    FileEntry,
    Manifest,
    Piece,
    read_manifest,
    tensor_key,
)
from megascale.checkpoint.name_lists import folded
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorFile
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment, global_runs, whole_box

_BLOCK = 1 << 20  # elements
_CHUNK = 256 * 1024  # small enough to be hashed from the processor's cache


class CheckpointReader:
    """One complete checkpoint folder, opened for reading.

    Args:
        path: the folder (local or any fsspec URL).

    Raises:
        UserError: the folder is not a complete checkpoint, or its manifest is damaged.
    """

    def __init__(self, path: str) -> None:
        self.storage = Storage(path)
        self.manifest = read_manifest(self.storage)
        self._open: dict[str, TensorFile] = {}
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        for piece in self.manifest.pieces:
            for kind in piece.kinds:
                self._pieces[piece.name, kind].append(piece)
        self.bytes_read = 0

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files of share `part` of `parts`, or None: sizes and checksums.

        At scale every rank checks its share, so the whole is read once over all ranks.
        """
        for entry in self.manifest.files[part::parts]:
            reason = self._damage_of(entry)
            if reason:
                return f"{entry.path} {reason}"
        return None

    def _damage_of(self, entry: FileEntry) -> str | None:
        if not self.storage.exists(entry.path):
            return "is missing"
        if self.storage.is_link(entry.path):
            return "is a link, and may show something else tomorrow"
        size = self.storage.size(entry.path)
        if size != entry.bytes:
            return f"has {size} bytes, the manifest says {entry.bytes}"
        digest = xxhash.xxh3_128()
        block = memoryview(bytearray(_CHUNK))
        try:
            with self.storage.open_read(entry.path) as stream:
                while got := stream.readinto(block):  # type: ignore[attr-defined]
                    digest.update(block[:got])
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        if digest.hexdigest() != entry.xxh3_128:
            return "has another checksum than the manifest: its bytes changed"
        return None

    def sizes_differ(self) -> str | None:
        """What is wrong with the files' presence and sizes, or None; reads none of them."""
        return sizes_differ(self.storage, self.manifest)

    def require_intact(self) -> None:
        """Raise a UserError when any file is damaged; reads every byte."""
        reason = self.damage()
        if reason:
            raise UserError(
                f"checkpoint {self.storage.root} is damaged: {reason}",
                rule="every file must have the size and checksum that the manifest records",
                remedy="use another checkpoint of the run",
            )

    def check_parameters(self, shapes: dict[str, tuple[int, ...]], kinds: tuple[str, ...]) -> None:
        """Raise a UserError unless the checkpoint holds exactly these parameters and kinds."""
        ours, theirs = set(shapes), set(self.manifest.parameters)
        lines = [f"missing in the checkpoint: {name}" for name in sorted(ours - theirs)]
        lines += [f"not in the model: {name}" for name in sorted(theirs - ours)]
        for name in sorted(ours & theirs):
            if tuple(shapes[name]) != tuple(self.manifest.parameters[name]):
                theirs_shape = tuple(self.manifest.parameters[name])
                lines.append(f"{name}: model {tuple(shapes[name])}, checkpoint {theirs_shape}")
        lines += [
            f"no optimizer state {kind!r}" for kind in kinds if kind not in self.manifest.kinds
        ]
        if lines:
            shown = "\n    ".join(folded(lines))
            raise UserError(
                f"checkpoint {self.storage.root} does not fit this config:\n    {shown}",
                rule="model and optimizer must be those that wrote it "
                f"({len(lines)} differences; layout, ZeRO stage and engine may change)",
                remedy="use the model and optimizer sections of the checkpoint's config.yaml",
            )

    def fill(self, fragment: Fragment) -> None:
        """Read a fragment's values into its tensor, from whatever layout wrote them.

        Raises:
            UserError: some element is in no piece.
        """
        wanted = global_runs(fragment.global_shape, fragment.box, fragment.start, fragment.numel)
        filled = 0
        for piece in self._pieces[fragment.name, fragment.kind]:
            filled += self._copy_overlap(fragment, wanted, piece)
        if filled != fragment.numel:
            raise UserError(
                f"checkpoint {self.storage.root}: {fragment.kind} of {fragment.name} is incomplete",
                rule=f"{fragment.numel} elements are needed, its pieces hold {filled} of them",
                remedy="use another checkpoint; this one's manifest is damaged",
            )

    def state_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of one kind of a parameter's state, None where it has none.

        That of the parameter, but for states that are reduced over a dimension.
        """
        pieces = self._pieces.get((name, kind))
        if not pieces:
            return None
        shape = tuple(self.manifest.parameters[name])
        held = sum(piece.numel for piece in pieces)
        if held == math.prod(shape):
            return shape
        ends = [max(piece.box[dim][1] for piece in pieces) for dim in range(len(shape))]
        return tuple(ends)

    def blocks(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        """One kind of a parameter's state, flat, in fp32 blocks of bounded size; none has none."""
        shape = self.state_shape(name, kind)
        total = 0 if shape is None else math.prod(shape)
        box = whole_box(shape or ())
        for start in range(0, total, _BLOCK):
            block = torch.empty(min(_BLOCK, total - start))
            self.fill(
                Fragment(name, kind, tuple(self.manifest.parameters[name]), box, start, block)
            )
            yield block

    def rng_state(self, rank: int) -> torch.Tensor | None:
        """torch's CPU generator state that `rank` had when the checkpoint was written.

        None where it has none: an import, or one that was dealt to another number of files.
        """
        path = f"rank_{rank:05d}.safetensors"
        if all(entry.path != path for entry in self.manifest.files):
            return None
        file = self._file(path)
        return file.read(RNG_KEY) if RNG_KEY in file.keys() else None  # noqa: SIM118

    def attachment(self, path: str) -> bytes:
        """Contents of a small file stored with the checkpoint."""
        with self.storage.open_read(path) as stream:
            return stream.read()

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, path: str) -> TensorFile:
        if path not in self._open:
            missing = not self.storage.exists(path)
            if missing or self.storage.is_link(path):
                raise self._not_a_file(path, "is missing" if missing else "is a link")
            try:
                stream = self.storage.open_ranges(path)
            except FileNotFoundError as error:
                raise self._not_a_file(path, "was removed meanwhile") from error
            name = self.storage.path(path)
            self._open[path] = TensorFile(stream, name, self.storage.size(path))
        return self._open[path]

    def _not_a_file(self, path: str, reason: str) -> UserError:
        return UserError(
            f"checkpoint {self.storage.root} is damaged: {path} {reason}",
            rule="every file that the manifest lists must be there, and be a file",
            remedy="use another checkpoint of the run",
        )

    def _copy_overlap(
        self, fragment: Fragment, wanted: tuple[np.ndarray, np.ndarray], piece: Piece
    ) -> int:
        """Copy what `piece` has of `fragment`; returns the number of elements copied."""
        if piece.box == fragment.box:  # one run each, in the box's own coordinates
            shape = tuple(end - begin for begin, end in piece.box)
            whole = whole_box(shape)
            wanted = global_runs(shape, whole, fragment.start, fragment.numel)
            held = global_runs(shape, whole, piece.start, piece.numel)
        else:
            held = global_runs(fragment.global_shape, piece.box, piece.start, piece.numel)
        into, source, lengths = _overlaps(wanted, held)
        file = self._file(piece.file)
        key = tensor_key(fragment.kind, fragment.name)
        runs = list(zip(into.tolist(), source.tolist(), lengths.tolist(), strict=True))
        self.bytes_read += file.read_runs(key, runs, fragment.tensor)
        return int(lengths.sum())


def sizes_differ(storage: Storage, manifest: Manifest) -> str | None:
    """What is wrong with the presence and sizes of a checkpoint's files, or None; reads none."""
    for entry in manifest.files:
        if not storage.exists(entry.path):
            return f"{entry.path} is missing"
        if storage.size(entry.path) != entry.bytes:
            return f"{entry.path} does not have the {entry.bytes} bytes of the manifest"
    return None


def _overlaps(
    wanted: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Common parts of two ascending lists of (global begin, length) runs.

    Returns:
        (position in the wanted fragment, position in the held piece, length) of each common part.
    """
    (w_begin, w_len), (h_begin, h_len) = wanted, held
    w_at = np.cumsum(w_len) - w_len  # position of each run inside its own fragment
    h_at = np.cumsum(h_len) - h_len
    first = np.searchsorted(h_begin + h_len, w_begin, side="right")
    last = np.searchsorted(h_begin, w_begin + w_len, side="left")
    counts = np.maximum(last - first, 0)
    w = np.repeat(np.arange(len(w_begin)), counts)
    h = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[w]
    begin = np.maximum(w_begin[w], h_begin[h])
    end = np.minimum(w_begin[w] + w_len[w], h_begin[h] + h_len[h])
    return w_at[w] + begin - w_begin[w], h_at[h] + begin - h_begin[h], end - begin
