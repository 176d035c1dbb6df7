"""`manifest.json`: what is in a prepared dataset, and how to tell that it is still that.

DIR/manifest.json        written last
DIR/tokenizer/           the tokenizer the ids belong to
DIR/shard_00000.bin/.idx token files (megascale.data.token_file)

Version 2 is version 1 with shards that lie in other folders; it is written only where there are
such shards.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megascale.data.atomic_files import file_checksum, write_file
from megascale.data.places import as_path, below, remote_errors, size_of
from megascale.data.token_file import bin_path, idx_path
from megascale.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT: Literal["megascale-dataset"] = "megascale-dataset"
VERSION = 2
PREPARE_AGAIN = (
    "copy the dataset again, prepare it with `python -m data_prep tokenize`, or save its whole "
    "documents with `python -m data_prep repair`"
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """The tokenizer that made the ids."""

    folder: str = "tokenizer"
    """Folder inside the dataset's folder."""
    fingerprint: str
    vocab_size: int = Field(gt=0)
    eod_id: int | None = Field(default=None, ge=0)
    """Put after each document in mode "gpt"; None in mode "bert"."""
    special_ids: dict[str, int] = {}
    """Mode "bert": the ids of "cls", "sep", "mask" and "pad"."""


class ShardRecord(_Record):
    """One pair of token files, with sizes for a cheap check and checksums for a full one."""

    prefix: str = Field(pattern=r"^[^/\\]+$")
    """File name inside the dataset's folder, without `.bin`."""
    bin_bytes: int = Field(ge=0)
    idx_bytes: int = Field(ge=0)
    bin_xxh3: str
    idx_xxh3: str
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    utf8_bytes: int = Field(ge=0)
    """UTF-8 bytes of the documents' text, for bits per byte."""
    folder: str = ""
    """Where the files are if not in the dataset's folder: relative to it, absolute, or a URL."""

    def path(self, dataset: str | os.PathLike[str]) -> Path:
        """Path of the files without `.bin`, for the dataset's folder, which may be a URL."""
        return below(as_path(dataset), *filter(None, (self.folder, self.prefix)))

    @classmethod
    def of_files(
        cls, folder: Path, prefix: str, documents: int, tokens: int, utf8_bytes: int
    ) -> ShardRecord:
        """Measure and checksum the two finished files."""
        binary, index = bin_path(folder / prefix), idx_path(folder / prefix)
        return cls(
            prefix=prefix,
            bin_bytes=binary.stat().st_size,
            idx_bytes=index.stat().st_size,
            bin_xxh3=file_checksum(binary),
            idx_xxh3=file_checksum(index),
            documents=documents,
            tokens=tokens,
            utf8_bytes=utf8_bytes,
        )


class DatasetManifest(_Record):
    """The content of `manifest.json`."""

    format: Literal["megascale-dataset"] = FORMAT
    version: int = 1
    mode: Literal["gpt", "bert"] = "gpt"
    """gpt: a sequence is a document and ends with `eod_id`; bert: a sequence is a sentence, and
    no special token is stored."""
    tokenizer: TokenizerRecord
    shards: list[ShardRecord] = Field(min_length=1)
    source: dict[str, Any] = {}
    """What was read: inputs, number of files, bytes, fingerprint of the content."""
    recipe: dict[str, Any] = {}
    """The options that were used."""
    skipped: dict[str, int] = {}
    """Documents left out, by reason."""

    @property
    def fingerprint(self) -> str:
        """xxh3_128 over the checksums of all shards and the tokenizer's fingerprint, in hex."""
        digest = xxhash.xxh3_128(self.tokenizer.fingerprint.encode())
        for shard in self.shards:
            digest.update(f"\n{shard.bin_xxh3} {shard.idx_xxh3}".encode())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into `folder`, atomically."""
        record = self.model_dump()
        for shard in record["shards"]:
            if not shard["folder"]:
                del shard["folder"]  # as version 1 has it
        record["version"] = 2 if any(shard.folder for shard in self.shards) else 1
        content = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_file(as_path(folder) / MANIFEST_NAME, content.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DatasetManifest:
        """Read and check a manifest, and that its shards exist with the sizes it gives.

        Raises:
            UserError: no manifest, not JSON, written by a newer megascale, a field is wrong, a
                shard is missing or of another size.
        """
        path = as_path(folder) / MANIFEST_NAME
        manifest = cls.read(folder)
        for shard in manifest.shards:
            for file, expected in (
                (bin_path(shard.path(path.parent)), shard.bin_bytes),
                (idx_path(shard.path(path.parent)), shard.idx_bytes),
            ):
                _check_size(file, expected, path)
        return manifest

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> DatasetManifest:
        """As `load`, without a look at the shards."""
        path = as_path(folder) / MANIFEST_NAME
        try:
            with remote_errors(path):
                raw = path.read_bytes()
            content = json.loads(raw)
        except FileNotFoundError as error:
            raise UserError(
                f"no file {path}",
                rule=f"a prepared dataset's folder holds {MANIFEST_NAME}",
                remedy="check the path, or prepare it with `python -m data_prep tokenize`",
            ) from error
        except ValueError as error:
            raise _malformed(path, f"not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise _malformed(path, f'no "format": "{FORMAT}"')
        version = content.get("version")
        if isinstance(version, int) and version > VERSION:
            raise UserError(
                f"{path} has version {version}",
                rule=f"this megascale reads versions up to {VERSION}",
                remedy="install the megascale that wrote it, or a newer one",
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise _malformed(path, problems) from error


def _check_size(file: Path, expected: int, manifest_path: Path) -> None:
    with remote_errors(file):
        found = size_of(file)
    if found is None:
        raise UserError(
            f"{file} is missing",
            rule=f"{manifest_path} lists it",
            remedy=PREPARE_AGAIN,
        )
    if found != expected:
        raise UserError(
            f"{file} is truncated or changed: {found} bytes",
            rule=f"{manifest_path} says {expected} bytes",
            remedy=PREPARE_AGAIN,
        )


def _malformed(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} is no dataset manifest: {problem}",
        rule="manifest.json is written by `python -m data_prep tokenize` and never by hand",
        remedy="copy the dataset again, prepare it with `python -m data_prep tokenize`, or make a "
        "manifest for its .bin/.idx with `python -m data_prep adopt`",
    )
