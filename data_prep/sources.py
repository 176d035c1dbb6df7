"""Where text comes from: files, folders and globs, and the standard library.

Finding the files is here; reading documents out of them is in `data_prep.read`.
"""

from __future__ import annotations

import ast
import difflib
import io
import os
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import fsspec
import orjson
import xxhash
from fsspec.implementations.local import LocalFileSystem

from data_prep.byte_range import open_range
from data_prep.outputs import RUN_NAME
from data_prep.records import SHARD_SUFFIX, unfinished_folder
from data_prep.report import REPORT_NAME
from data_prep.zstd_stream import open_zstd
from megascale.errors import UserError

PYTHON_STDLIB = "python-stdlib"
PYTHON_STDLIB_PROSE = "python-stdlib-prose"
FileKind = Literal["text", "jsonl", "html", "parquet", "arrow", "tokens", "inline"]
_KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".html": "html",
    ".htm": "html",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".bin": "tokens",
}
_HF_STATE = "state.json"  # of a dataset that was saved by Hugging Face's save_to_disk
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_STDLIB_SUFFIXES = (".py", ".txt", ".rst")
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS_FILE = "pydoc_data/topics.py"
_CHUNK_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 16  # lines cost less than half of what they cost with the usual 8 kB
_SHORTEST_PROSE = 80  # characters of a docstring


@dataclass(frozen=True)
class InputFile:
    """One thing to read documents from.

    Attributes:
        name: how reports call it.
        kind: how documents lie in it.
        path: its path in `filesystem`; empty where `text` is the content.
        text: the content itself, one document.
        start, stop: bytes of the file that are meant, for a piece of a file that is not packed;
            stop None: to its end.
    """

    name: str
    kind: FileKind
    filesystem: Any = None
    path: str = ""
    text: str = ""
    start: int = 0
    stop: int | None = None

    def open(self, decompress: bool = True) -> BinaryIO:
        """Open for reading bytes; `.gz`, `.zst`, `.bz2` and `.xz` are unpacked on the way."""
        if self.stop is not None:
            return open_range(self._plain(), self.start, self.stop)
        if decompress and self.path.endswith(".zst"):
            return open_zstd(self._plain())
        if decompress and self.path.endswith(COMPRESSED_SUFFIXES):
            return self.filesystem.open(self.path, "rb", compression="infer")
        return self._plain()

    def _plain(self) -> BinaryIO:
        """The bytes as they lie there."""
        if isinstance(self.filesystem, LocalFileSystem):
            return open(self.path, "rb", buffering=_BUFFER_BYTES)
        stream: Any = self.filesystem.open(self.path, "rb")
        # files of stores read lines without a limit only, and byte by byte
        buffered = isinstance(stream, io.BufferedIOBase)
        return cast(BinaryIO, stream if buffered else io.BufferedReader(stream))


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Every file that the inputs name, in the order given and sorted within each.

    Args:
        inputs: paths, folders (read recursively), prefixes of .bin/.idx, globs, fsspec URLs,
            `python-stdlib` (sources and documentation) or `python-stdlib-prose` (docstrings and
            help texts only).

    Raises:
        UserError: an input names nothing, or its file system cannot be used.
    """
    words = {PYTHON_STDLIB: _stdlib_files, PYTHON_STDLIB_PROSE: _stdlib_prose}
    found: list[InputFile] = []
    for item in inputs:
        found.extend(words[item]() if item in words else _named_files(item))
    return found


def describe_source(inputs: Sequence[str], files: Iterable[InputFile]) -> dict[str, Any]:
    """What a manifest keeps of the source; its `fingerprint` covers every name and byte.

    Raises:
        UserError: a file cannot be read.
    """
    digest, count, size = xxhash.xxh3_128(), 0, 0
    for file in files:
        content, file_size = _content_hash(file)
        digest.update(f"{file.name}\n{file.kind}\n{content}\n".encode("utf-8", "surrogateescape"))
        count, size = count + 1, size + file_size
    description: dict[str, Any] = {
        "inputs": list(inputs),
        "files": count,
        "bytes": size,
        "fingerprint": digest.hexdigest(),
    }
    if {PYTHON_STDLIB, PYTHON_STDLIB_PROSE} & set(inputs):
        description["python"] = platform.python_version()
    return description


def _content_hash(file: InputFile) -> tuple[str, int]:
    if file.kind == "inline":
        content = file.text.encode()
        return xxhash.xxh3_128_hexdigest(content), len(content)
    digest, size = xxhash.xxh3_128(), 0
    try:
        with file.open(decompress=False) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise unreadable(file.name, error) from error
    return digest.hexdigest(), size


def unreadable(name: str, error: Exception) -> UserError:
    """The error for an input that exists and cannot be read."""
    return UserError(
        f"{name} cannot be read: {error}",
        rule="every input file must be readable",
        remedy="change its permissions, or leave it out",
    )


def _named_files(item: str) -> list[InputFile]:
    try:
        # A listing that is remembered does not show what another process wrote.
        options = {"use_listings_cache": False} if "://" in item else {}
        filesystem, path = fsspec.core.url_to_fs(item, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"--input {item} needs a file system that is not installed: {error}",
            rule="paths are opened through fsspec",
            remedy="install the package it names, or copy the files to this machine",
        ) from error
    try:
        paths = _matching_files(filesystem, path, item)
    except UserError:
        raise
    except Exception as error:  # every remote file system has errors of its own
        raise UserError(
            f"--input {item} cannot be looked at: {error!r}",
            rule="an input lies where this process may list and read it",
            remedy="check the address, the network and the credentials of that file system",
        ) from error
    if not paths:
        raise UserError(
            f"--input {item} names no file",
            rule="an input is a file, a folder with files, or a glob that matches some",
            remedy="check the path; put a glob in quotes",
        )
    return [InputFile(found, _kind(found), filesystem, found) for found in paths]


def _matching_files(filesystem: Any, path: str, item: str) -> list[str]:
    if filesystem.isfile(path):
        return [path]
    if filesystem.isdir(path):
        return _folder_files(filesystem, path.rstrip("/"))
    if any(character in path for character in "*?["):
        return sorted(found for found in filesystem.glob(path) if filesystem.isfile(found))
    if filesystem.isfile(path + ".bin") and filesystem.isfile(path + ".idx"):
        return [path + ".bin"]  # a prefix, as in data.path
    raise _missing_input(item)


def _hidden(path: str, folder: str) -> bool:
    return any(part.startswith(".") for part in path[len(folder) :].split("/"))


def _folder_files(filesystem: Any, folder: str) -> list[str]:
    """The files of a folder that hold documents, in order.

    Of the folder that a step of ours wrote its shards; of Hugging Face datasets the data files
    that `state.json` lists, or all arrow files but the caches of transforms; of token files the
    .bin, and nothing that lies beside them.
    """
    found = [path for path in sorted(filesystem.find(folder)) if not _hidden(path, folder)]
    names = set(found)
    own = [p for p in found if p.endswith(SHARD_SUFFIX) and p.rpartition("/")[0] == folder]
    if own and f"{folder}/{REPORT_NAME}" in names:
        return own
    if filesystem.isfile(f"{folder}/{RUN_NAME}"):
        raise unfinished_folder(filesystem.unstrip_protocol(folder))
    tokens = [p for p in found if p.endswith(".bin") and p.removesuffix(".bin") + ".idx" in names]
    if tokens:
        return tokens
    states = [path for path in found if path.rpartition("/")[2] == _HF_STATE]
    if states:
        return [path for state in states for path in _hf_data_files(filesystem, state)]
    tables = [path for path in found if _kind(path) == "arrow"]
    return [p for p in tables if not p.rpartition("/")[2].startswith("cache-")] or found


def _hf_data_files(filesystem: Any, state: str) -> list[str]:
    folder = state.rpartition("/")[0]
    try:
        content = orjson.loads(filesystem.cat_file(state))
        return [f"{folder}/{entry['filename']}" for entry in content["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state} does not list the dataset's files: {error!r}",
            rule="a Hugging Face dataset on disk is a folder that save_to_disk wrote",
            remedy="save it again, or give its .arrow files as inputs",
        ) from error


def _kind(path: str) -> FileKind:
    for suffix in COMPRESSED_SUFFIXES:
        path = path.removesuffix(suffix)
    return _KINDS.get(os.path.splitext(path)[1].lower(), "text")


def _missing_input(item: str) -> UserError:
    folder = Path(item).parent
    names = [PYTHON_STDLIB, PYTHON_STDLIB_PROSE]
    if folder.is_dir():
        names += [os.fspath(entry) for entry in folder.iterdir()]
    close = difflib.get_close_matches(item, names, n=1)
    return UserError(
        f"--input {item} does not exist",
        rule=f"an input is a file, a folder, a glob, or one of the words "
        f"{PYTHON_STDLIB} and {PYTHON_STDLIB_PROSE}",
        remedy=f"did you mean {close[0]}?" if close else "check the path",
    )


def _stdlib_files() -> list[InputFile]:
    """Sources and documentation of the running Python, without its tests.

    Ordered by a hash of the relative name: a contiguous split would otherwise hold out the end of
    the alphabet. The help texts of `pydoc_data` are read as prose, one document each.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    local = fsspec.filesystem("file")
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if path.suffix in _STDLIB_SUFFIXES and relative != _TOPICS_FILE and path.is_file():
                files.append(InputFile(relative, "text", local, os.fspath(path)))
    if not files:
        raise UserError(
            f"no source of the Python standard library in {root}",
            rule=f"{PYTHON_STDLIB} reads the .py files that a Python installation ships",
            remedy="use a Python with its sources, or give --input with text of your own",
        )
    files.extend(_help_topics())
    return sorted(files, key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode()), file.name))


def _stdlib_prose() -> list[InputFile]:
    """The English of the standard library: help texts, and the docstrings of each module.

    One document a module, its docstrings of at least a line's length in their order; in the order
    of `_stdlib_files`.
    """
    prose = []
    for file in _stdlib_files():
        text = file.text if file.kind == "inline" else _docstrings(file)
        if text:
            prose.append(InputFile(file.name, "inline", text=text))
    return prose


def _docstrings(file: InputFile) -> str:
    """The longer docstrings of a Python file, "" for other files and what does not parse."""
    if not file.path.endswith(".py"):
        return ""
    try:
        tree = ast.parse(Path(file.path).read_bytes())
    except (SyntaxError, ValueError):  # templates and samples of other versions
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text and len(text) >= _SHORTEST_PROSE)


def _help_topics() -> list[InputFile]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    return [
        InputFile(f"{_TOPICS_FILE}:{name}", "inline", text=text) for name, text in topics.items()
    ]
