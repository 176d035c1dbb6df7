"""Shards of documents between the steps: zstd-compressed JSON lines.

    FOLDER/shard_00000.jsonl.zst    {"text": ..., "id": ..., "source": ..., "meta": {...}}

`id` is the same in every run. One that `read` made tells a document apart from all others of the
folder; one that the input gave (`--id-key`) is kept as it is, unique or not. `source` is the input
it came from, by which reports count; `meta` is there when it is not empty. The order of the shards
is that of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import zstandard

from data_prep.report import REPORT_NAME
from data_prep.zstd_stream import open_zstd
from megascale.data.places import Place, is_remote, open_binary, remote_errors, unreachable
from megascale.errors import UserError

SHARD_SUFFIX = ".jsonl.zst"
_LEVEL = 1  # read once or twice and removed: 3 packs 10 % better, in more than twice the time
_MAKE_AGAIN = "copy the folder again, or make it again with the step that wrote it"


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    id: str
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        """The JSON line, newline included."""
        content: dict[str, Any] = {"text": self.text, "id": self.id, "source": self.source}
        if self.meta:
            content["meta"] = self.meta
        return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_line(cls, line: bytes) -> Document:
        """Inverse of `to_line`.

        Raises:
            ValueError: the line is not a document.
        """
        content = orjson.loads(line)
        if not isinstance(content, dict) or not isinstance(content.get("text"), str):
            raise ValueError('no object with a string "text"')
        return cls(
            content["text"],
            str(content.get("id", "")),
            str(content.get("source", "")),
            content.get("meta") or {},
        )


class ShardWriter:
    """Write lines to a local shard; the same lines give the same bytes.

    Attributes:
        documents: lines written.
        text_bytes: what `write` was told of their texts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.text_bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self._stream = compressor.stream_writer(self._file, closefd=False)

    def write(self, document: Document) -> None:
        """Append a document."""
        self.write_line(document.to_line(), len(document.text.encode()))

    def write_line(self, line: bytes, text_bytes: int) -> None:
        """Append a line as it was read, newline included."""
        self._stream.write(line)
        self.documents += 1
        self.text_bytes += text_bytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # the file is closed even if the last block does not fit on the disk
        with self._file:
            if kind is None:
                self._stream.close()


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, in order.

    Raises:
        UserError: it is no folder, has none, or lies in a store and is not finished.
    """
    with remote_errors(folder):
        paths = sorted(folder.glob(f"*{SHARD_SUFFIX}"), key=str) if folder.is_dir() else []
        if paths and is_remote(folder) and not (folder / REPORT_NAME).is_file():
            raise unfinished_folder(str(folder))
    if not paths:
        raise UserError(
            f"{folder} holds no shard of documents",
            rule=f"this step reads a folder of *{SHARD_SUFFIX}, as `python -m data_prep read` "
            "writes it",
            remedy="check the path, or run `python -m data_prep read` first",
        )
    return paths


def unfinished_folder(folder: str) -> UserError:
    """The error for shards in a store whose step has not finished."""
    return UserError(
        f"{folder} holds shards and no {REPORT_NAME}",
        rule="a step writes it last, when all of its shards are there",
        remedy="run that step again, which continues it",
    )


def shard_name(path: Path) -> str:
    """`shard_00000` of its path."""
    return path.name.removesuffix(SHARD_SUFFIX)


def read_lines(path: Place) -> Iterator[bytes]:
    """The lines of a shard with their newlines, in the memory of the longest one.

    Raises:
        UserError: the shard is truncated or damaged: our own shards are whole.
    """
    try:
        with open_binary(path) as file, open_zstd(file) as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    raise EOFError("it ends inside a line")
                yield line
    except (zstandard.ZstdError, EOFError, OSError) as error:
        raise damaged_shard(path, str(error)) from error
    except Exception as error:
        if is_remote(path):
            raise unreachable(path, error) from error
        raise


def read_documents(path: Place) -> Iterator[tuple[bytes, Document]]:
    """Each line of a shard and the document in it.

    Raises:
        UserError: the shard is damaged, or a line is no document.
    """
    for number, line in enumerate(read_lines(path), start=1):
        try:
            document = Document.from_line(line)
        except ValueError as error:
            raise damaged_shard(path, f"line {number}: {error}") from error
        yield line, document


def damaged_shard(path: Place, problem: str) -> UserError:
    """The error for a shard that is not what a step of ours wrote."""
    return UserError(
        f"{path} is no whole shard of documents: {problem}",
        rule='a shard is zstd-compressed JSON lines with "text", "id" and "source"',
        remedy=_MAKE_AGAIN,
    )
