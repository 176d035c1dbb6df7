"""The manifest of a checkpoint: what is in it, where, and how to know that it is intact.

docs/checkpoint-format.md describes it for readers in other languages.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megascale.checkpoint.storage import Storage
from megascale.errors import UserError

MANIFEST_NAME = "manifest.json"
RNG_KEY = "rng/torch_cpu"
"""Key of the state of torch's CPU generator in each rank's file."""
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
_MAX_ELEMENTS = 1 << 56  # positions in a tensor are 64-bit integers
_SAFE_FILE = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Size = Annotated[int, Field(ge=0)]


class FileEntry(_Strict):
    """One file of the checkpoint, by a path relative to its folder."""

    path: str = Field(pattern=_SAFE_FILE)
    bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")


class Piece(_Strict):
    """A flat range of one parameter's tensor-parallel box, stored in one file for each kind.

    The tensor's key in the file is "<kind>/<name>".
    """

    file: str
    name: str
    kinds: tuple[str, ...]
    box: tuple[tuple[int, int], ...]
    start: int = Field(ge=0)
    numel: int = Field(ge=1)


class _Open(BaseModel):
    """What more there is in it is let through."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Position(_Strict):
    step: _Size
    updates: _Size
    samples_seen: _Size
    tokens_seen: _Size


class _Stage(_Open):
    from_sample: _Size
    sources: list[Annotated[list[str | int | float], Field(min_length=2, max_length=2)]]


class _Data(_Open):
    stages: list[_Stage]
    paths: dict[str, str]
    order: dict[str, Any]


class _State(_Open):
    """Those values of `state` on whose types readers rely."""

    train: _Position = _Position(step=0, updates=0, samples_seen=0, tokens_seen=0)
    engine: dict[str, int | float] = Field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    data: _Data | None = None
    updates: _Size = 0


class _Known(_Open):
    state: _State


class Manifest(_Strict):
    """Everything that a reader needs beside the tensor files."""

    format: Literal["megascale-checkpoint"] = "megascale-checkpoint"
    version: int = Field(default=FORMAT_VERSION, ge=1)
    written_by: str
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    kinds: tuple[str, ...]
    parameters: dict[str, tuple[_Size, ...]]
    files: tuple[FileEntry, ...]
    pieces: tuple[Piece, ...]
    state: dict[str, Any]


_LEGAL = "pieces lie in their parameter and in a listed file, each weight in one piece"


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with a checksum over all that it says.

    Raises:
        UserError: it breaks a rule that readers apply: what no one could read is not committed.
    """
    reason = _illegal(manifest)
    if reason:
        raise UserError(
            f"the checkpoint of step {manifest.step} was not committed: {reason}",
            rule=_LEGAL,
            remedy="this is a mistake of megascale, please report it; checkpoints before are whole",
        )
    content = json.loads(manifest.model_dump_json())
    return _in_lines({**content, "checksum": _checksum(content)}).encode()


def _in_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each file, piece and parameter; the `indent` of json is slow."""

    def spelt(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",".join(f"\n  {json.dumps(item)}" for item in value) + "]"
        if isinstance(value, dict):
            items = (f"\n  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            return "{" + ",".join(items) + "}"
        return json.dumps(value)

    lines = (f"\n {json.dumps(key)}: {spelt(value)}" for key, value in content.items())
    return "{" + ",".join(lines) + "\n}\n"


def tensor_key(kind: str, name: str) -> str:
    """Key of a piece's tensor in its safetensors file."""
    return f"{kind}/{name}"


def read_manifest(storage: Storage) -> Manifest:
    """Read and check the manifest of the checkpoint folder `storage`.

    Raises:
        UserError: no manifest (not a complete checkpoint), not JSON, a newer version, or contents
            that break the format.
    """
    where = storage.path(MANIFEST_NAME)
    if not storage.exists(MANIFEST_NAME):
        raise UserError(
            f"{storage.root} is not a complete checkpoint: {MANIFEST_NAME} is missing",
            rule="a checkpoint is a folder step_XXXXXXXX with a manifest.json",
            remedy="give the path of such a folder (they lie in <run.output_dir>/checkpoints)",
        )
    if storage.is_link(MANIFEST_NAME):
        raise _damaged(where, "it is a link")
    try:
        with storage.open_read(MANIFEST_NAME) as stream:
            raw = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise _damaged(where, f"it cannot be read ({error.strerror or error})") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise _damaged(where, f"it has more than {MAX_MANIFEST_BYTES} bytes")
    manifest = _parse(raw, where)
    reason = _illegal(manifest)
    if reason:
        raise UserError(
            f"{where}: {reason}",
            rule=_LEGAL,
            remedy="use another checkpoint; this manifest is damaged",
        )
    return manifest


def _parse(raw: bytes, where: str) -> Manifest:
    try:
        content = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(where, "not a JSON object")
    # The version comes first: a newer format may have other fields and another checksum.
    version = content.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}, newer than {FORMAT_VERSION}",
            rule=f"this megascale reads versions up to {FORMAT_VERSION}",
            remedy="use the megascale that wrote it, or a newer one",
        )
    recorded = content.pop("checksum", None)
    if recorded != _checksum(content):
        raise _damaged(where, "its own checksum does not fit: its bytes changed")
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
        _Known.model_validate({"state": manifest.state})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _damaged(where, f"{at}: {first['msg']}") from error
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    """xxh3_128 of the manifest's values in one canonical spelling, without the checksum itself."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _damaged(where: str, what: str) -> UserError:
    return UserError(
        f"{where} is damaged: {what}",
        rule="it must be the JSON that megascale wrote",
        remedy="use another checkpoint",
    )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are told apart by every reader: for `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _illegal(manifest: Manifest) -> str:
    """What no writer writes: "" when all pieces are as the format says."""
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    if len(sizes) != len(manifest.files):
        return "a file is listed twice"
    for name, shape in manifest.parameters.items():
        if math.prod(shape) > _MAX_ELEMENTS:
            return f"the parameter {name!r} has the impossible shape {list(shape)}"
    held: dict[tuple[str, str], list[Piece]] = defaultdict(list)
    for piece in manifest.pieces:
        if not _is_legal(piece, manifest.parameters.get(piece.name), sizes):
            return f"the piece of {piece.name!r} in {piece.file!r} is not legal"
        sizes[piece.file] -= piece.numel * len(piece.kinds)  # of at least one byte each
        if sizes[piece.file] < 0:
            return f"the pieces in {piece.file!r} are larger than the file"
        for kind in piece.kinds:
            held[piece.name, kind].append(piece)
    return _gap_or_overlap(held, manifest.parameters)


def _gap_or_overlap(
    held: dict[tuple[str, str], list[Piece]], parameters: dict[str, tuple[int, ...]]
) -> str:
    """What is wrong with the pieces of some (name, kind), "" when nothing is."""
    looked_at: list[int] = []
    masters: dict[str, int] = {}
    count = 0
    for (name, kind), pieces in held.items():
        if looked_at != [id(piece) for piece in pieces]:  # moments lie as their weight does
            boxes: dict[Any, list[Piece]] = defaultdict(list)
            for piece in pieces:
                boxes[piece.box].append(piece)
            if _overlap(boxes):
                return f"pieces of {kind} of {name!r} overlap"
            count, whole = _covered(boxes)
            if count != whole:
                return f"the pieces of {kind} of {name!r} hold {count} of its {whole} elements"
            looked_at = [id(piece) for piece in pieces]
        if kind == "master":
            masters[name] = count
    for name, shape in parameters.items():
        there, size = masters.get(name, 0), math.prod(shape)
        if there != size:
            return f"the pieces of {name!r} hold {there} of its {size} elements"
    return ""


def _covered(boxes: dict[Any, list[Piece]]) -> tuple[int, int]:
    """(elements in pieces, elements of the smallest tensor that holds their boxes).

    That tensor is smaller than the parameter for a state that is reduced over a dimension.
    """
    count = sum(piece.numel for pieces in boxes.values() for piece in pieces)
    ends = (max(end for _, end in dim) for dim in zip(*boxes, strict=True))
    return count, math.prod(ends)


def _is_legal(piece: Piece, shape: tuple[int, ...] | None, sizes: dict[str, int]) -> bool:
    return (
        shape is not None
        and piece.file in sizes
        and len(piece.box) == len(shape)
        and all(
            0 <= begin < end <= size for (begin, end), size in zip(piece.box, shape, strict=True)
        )
        and piece.start + piece.numel <= math.prod(end - begin for begin, end in piece.box)
        and len(set(piece.kinds)) == len(piece.kinds)
    )


def _overlap(boxes: dict[Any, list[Piece]]) -> bool:
    """Whether an element lies in two pieces; boxes of different cuts may not meet at all."""
    for pieces in boxes.values():
        ends = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if piece.start < ends:
                return True
            ends = piece.start + piece.numel
    # sweep along one dimension: only boxes whose intervals meet there are compared
    ordered = sorted(boxes)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if not one or other[0][0] >= one[0][1]:
                break
            if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True)):
                return True
    return False
