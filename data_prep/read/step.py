"""The step `read`: files of any kind into shards of documents."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.documents import no_documents
from data_prep.input_shards import cut_inputs
from data_prep.progress import Advance
from data_prep.read.formats import read_items
from data_prep.read.options import FormatOptions, Item
from data_prep.records import SHARD_SUFFIX, Document, ShardWriter
from data_prep.shard_runner import RunOutcome, ShardResult, ShardTask
from data_prep.skips import SkipReport
from data_prep.sources import COMPRESSED_SUFFIXES, InputFile, find_inputs, unreadable
from data_prep.step import Counts, Step, sum_nested
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION_KEYS = ("ETag", "etag", "md5", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class NamedInput:
    """An input and the name under which reports count it."""

    name: str
    path: str


@dataclass(frozen=True)
class ReadOptions:
    """What decides the shards, beside the content of the files.

    Args:
        format: how documents lie in the files.
        shard_bytes: a shard is closed when its texts have this many UTF-8 bytes.

    Raises:
        UserError: a size is not positive.
    """

    format: FormatOptions = field(default_factory=FormatOptions)
    shard_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, size in (
            ("shard size", self.shard_bytes),
            ("largest document", self.format.max_document_bytes),
        ):
            if size < 1:
                raise UserError(
                    f"a {name} of {size} bytes",
                    rule="sizes are at least one byte",
                    remedy="leave it out, or raise it",
                )


@dataclass(frozen=True)
class _Files:
    """Files of one source: the content of a task."""

    source: str
    root: str
    files: tuple[InputFile, ...]

    def label(self, file: InputFile) -> str:
        """The file's name below the root, the same wherever the input lies."""
        return f"{self.source}/{file.name.removeprefix(self.root).lstrip('/')}"


def named_inputs(inputs: Sequence[str]) -> list[NamedInput]:
    """`NAME=PATH` or `PATH`, which is then named after its last part.

    Raises:
        UserError: two inputs have one name.
    """
    found = [_named_input(item) for item in inputs]
    for name, count in Counter(item.name for item in found).items():
        if count > 1:
            raise UserError(
                f"{count} inputs are named {name}",
                rule="reports count documents by the name of their input",
                remedy="give names: --input NAME=PATH",
            )
    return found


def _named_input(item: str) -> NamedInput:
    name, equals, path = item.partition("=")
    if equals and path and _NAME.fullmatch(name) and not os.path.exists(item):
        return NamedInput(name, path)
    parts = [part for part in item.rstrip("/").split("/") if part and not set("*?[") & set(part)]
    stem = parts[-1] if parts else item
    for suffix in COMPRESSED_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return NamedInput(os.path.splitext(stem)[0] or stem, item)


def prepare_read(inputs: Sequence[NamedInput], output: Path, options: ReadOptions) -> Step:
    """Find the files and deal them out to tasks.

    A task is consecutive files of one source, or a piece of a larger one: see `cut_inputs`.

    Raises:
        UserError: an input names nothing or cannot be used.
    """
    tasks: list[ShardTask] = []
    digest = xxhash.xxh3_128()
    for item in inputs:
        files = find_inputs([item.path])
        root = _common_folder(files)
        for file in files:
            size, version = _size_and_version(file)
            name = file.name.removeprefix(root)
            digest.update(f"{item.name}\n{name}\n{file.kind}\n{size}\n{version}\n".encode())
        for task in cut_inputs(files, options.format.unit, options.shard_bytes):
            name, content = f"shard_{len(tasks):05d}", _Files(item.name, root, task.content)
            tasks.append(ShardTask(name, task.size, content))
    identity = {"inputs": digest.hexdigest(), "options": _recorded(options)}
    return Step("read", output, identity, tasks, _Read(options), _summary)


def _recorded(options: ReadOptions) -> dict[str, Any]:
    chosen = asdict(options)
    form = chosen["format"]
    form["unit"] = options.format.unit.value
    tokenizer = options.format.tokenizer
    form["tokenizer"] = load_tokenizer(tokenizer).fingerprint if tokenizer else None
    return chosen


def _common_folder(files: Sequence[InputFile]) -> str:
    """The folder that all files lie in, "" for things without a path."""
    paths = [file.name for file in files if file.path and file.path == file.name]
    if len(paths) < len(files):
        return ""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _size_and_version(file: InputFile) -> tuple[int, str]:
    """Bytes of a file, and what changes when its content does."""
    if file.kind == "inline":
        content = file.text.encode("utf-8", "surrogatepass")
        return len(content), xxhash.xxh3_128_hexdigest(content)
    try:
        info = file.filesystem.info(file.path)
    except OSError as error:
        raise unreadable(file.name, error) from error
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
    return int(info.get("size") or 0), version


@dataclass(frozen=True)
class _Read:
    """The work on one task; writes further shards `NAME_00001`, ... when the first is full."""

    options: ReadOptions

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        content: _Files = task.content
        result = ShardResult()
        writer: ShardWriter | None = None
        parts = documents = text_bytes = 0
        with ExitStack() as stack:
            for document in self._documents(content, result.skips, advance):
                if writer is None:
                    suffix = f"_{parts:05d}" if parts else ""
                    path = folder / f"{task.name}{suffix}{SHARD_SUFFIX}"
                    writer = stack.enter_context(ShardWriter(path))
                writer.write(document)
                if writer.text_bytes >= self.options.shard_bytes:
                    stack.close()
                    documents, text_bytes = (
                        documents + writer.documents,
                        text_bytes + writer.text_bytes,
                    )
                    writer, parts = None, parts + 1
        if writer is not None:
            documents, text_bytes = documents + writer.documents, text_bytes + writer.text_bytes
        result.counts = {"documents": documents, "text_bytes": text_bytes}
        result.details = {"sources": {content.source: dict(result.counts)}}
        return result

    def _documents(
        self, content: _Files, skips: SkipReport, advance: Advance
    ) -> Iterator[Document]:
        for file in content.files:
            label = content.label(file)
            for _, item in read_items([file], self.options.format, skips):
                yield Document(item.text, _id(item, label), content.source, dict(item.meta))
            if len(content.files) > 1:
                advance(_size_and_version(file)[0])


def _id(item: Item, label: str) -> str:
    if item.id:
        return item.id
    return f"{label}:{item.position}" if item.position else label


def _summary(outcome: RunOutcome) -> Counts:
    if not outcome.counts["documents"]:
        raise no_documents(outcome.skips)
    return sum_nested(result.details for result in outcome.results.values())
