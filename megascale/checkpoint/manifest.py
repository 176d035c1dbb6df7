"""The manifest of a checkpoint: what is in it, where, and how to know that it is intact.

docs/checkpoint-format.md describes it for readers in other languages.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megascale.checkpoint.storage import Storage
from megascale.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_SAFE_FILE = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class Manifest(_Strict):
    """Everything that a reader needs beside the tensor files."""

    format: Literal["megascale-checkpoint"] = "megascale-checkpoint"
    version: int = FORMAT_VERSION
    written_by: str
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    kinds: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    files: tuple[FileEntry, ...]
    pieces: tuple[Piece, ...]
    state: dict[str, Any]


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with a checksum over all that it says."""
    content = json.loads(manifest.model_dump_json())
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode()


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
    with storage.open_read(MANIFEST_NAME) as stream:
        raw = stream.read()
    manifest = _parse(raw, where)
    _check_pieces(manifest, where)
    return manifest


def _parse(raw: bytes, where: str) -> Manifest:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(where, "not a JSON object")
    # The version comes first: a newer format may have other fields and another checksum.
    version = content.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}",
            rule=f"this megascale reads versions up to {FORMAT_VERSION}",
            remedy="use the megascale that wrote it, or a newer one",
        )
    recorded = content.pop("checksum", None)
    if recorded != _checksum(content):
        raise _damaged(where, "its own checksum does not fit: its bytes changed")
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _damaged(where, f"{at}: {first['msg']}") from error


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


def _check_pieces(manifest: Manifest, where: str) -> None:
    files = {entry.path for entry in manifest.files}
    for piece in manifest.pieces:
        shape = manifest.parameters.get(piece.name)
        legal = (
            shape is not None
            and piece.file in files
            and len(piece.box) == len(shape)
            and all(
                0 <= begin < end <= size
                for (begin, end), size in zip(piece.box, shape, strict=True)
            )
            and piece.start + piece.numel <= math.prod(end - begin for begin, end in piece.box)
        )
        if not legal:
            raise UserError(
                f"{where}: the piece of {piece.name!r} in {piece.file!r} is not legal",
                rule="a piece lies inside its parameter and in a listed file",
                remedy="use another checkpoint; this manifest is damaged",
            )
