"""Where an import reads from: a folder of transformers, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorFile
from megascale.errors import UserError

BLOCK_ELEMENTS = 1024 * 1024
"""Elements that are in memory at once of a tensor that is copied as it is."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)


class TensorSource(Protocol):
    """Weights under transformers' names, with a config.json."""

    config: Mapping[str, Any]
    where: str

    def names(self) -> list[str]:
        """The tensors' names, in the order in which they are stored."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        ...

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's elements in order, a block at a time."""
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name; empty without one."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


def read_model_folder(path: str) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """config.json and the tokenizer's files of a model whose weights are elsewhere.

    Args:
        path: its folder, or the config.json alone.

    Raises:
        UserError: no such file, or not the JSON of transformers.
    """
    folder, _, name = path.rpartition("/")
    alone = name == "config.json" or name.endswith(".json")
    storage = Storage((folder or ".") if alone else path)
    config = _read_json(storage, name if alone else "config.json")
    names = [] if alone else [name for name in _TOKENIZER_FILES if storage.exists(name)]
    return config, {name: _read_bytes(storage, name) for name in names}


def _read_bytes(storage: Storage, name: str) -> bytes:
    with storage.open_read(name) as stream:
        return stream.read()


def _read_json(storage: Storage, name: str) -> dict[str, Any]:
    if not storage.exists(name):
        raise UserError(
            f"{storage.root} has no {name}",
            rule="a Hugging Face model is a folder with config.json and safetensors files, "
            "or a .gguf file",
            remedy="give the folder that save_pretrained wrote; nothing is downloaded by name",
        )
    try:
        content = json.loads(_read_bytes(storage, name))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{storage.path(name)} is not JSON: {error}",
            rule="it must be the JSON object that transformers wrote",
            remedy="copy the folder again",
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{storage.path(name)} holds no JSON object",
            rule="it must be the JSON object that transformers wrote",
            remedy="copy the folder again",
        )
    return content


class SafetensorsFolder:
    """What `save_pretrained` wrote: config.json, one or several safetensors files, a tokenizer.

    Args:
        path: local folder or any fsspec URL.

    Raises:
        UserError: no such folder, no config.json, no safetensors, or an index that names files
            that are missing.
    """

    def __init__(self, path: str) -> None:
        self._storage = Storage(path)
        self.where = self._storage.root
        self.config: Mapping[str, Any] = _read_json(self._storage, "config.json")
        self._open: dict[str, TensorFile] = {}
        self._files: dict[str, str] = {}
        for file in self._weight_files():
            stream = self._storage.open_read(file)
            name = self._storage.path(file)
            self._open[file] = TensorFile(stream, name, self._storage.size(file))
            self._files.update(dict.fromkeys(self._open[file].keys(), file))

    def names(self) -> list[str]:
        """See `TensorSource.names`."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return self._file(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource.dtype`."""
        return self._file(name).dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource.read`."""
        return self._file(name).read(name).view(self.shape(name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource.blocks`."""
        file = self._file(name)
        total = file.numel(name)
        for start in range(0, total, BLOCK_ELEMENTS):
            yield file.read(name, start, min(BLOCK_ELEMENTS, total - start))

    def tokenizer_files(self) -> dict[str, bytes]:
        """See `TensorSource.tokenizer_files`."""
        present = [name for name in _TOKENIZER_FILES if self._storage.exists(name)]
        return {name: _read_bytes(self._storage, name) for name in present}

    def close(self) -> None:
        """See `TensorSource.close`."""
        for file in self._open.values():
            file.close()

    def _file(self, name: str) -> TensorFile:
        return self._open[self._files[name]]

    def _weight_files(self) -> list[str]:
        if self._storage.exists(_SINGLE):
            return [_SINGLE]
        if not self._storage.exists(_INDEX):
            raise self._no_safetensors()
        index = _read_json(self._storage, _INDEX).get("weight_map")
        files = sorted(set(index.values())) if isinstance(index, dict) else []
        missing = [name for name in files if not self._storage.exists(name)]
        if missing or not files:
            raise UserError(
                f"{self.where}: files that {_INDEX} names are missing: {', '.join(missing)}",
                rule="every file of the index must be there",
                remedy="copy the folder again",
            )
        return files

    def _no_safetensors(self) -> UserError:
        entries = self._storage.fs.ls(self.where, detail=False)
        names = sorted(entry.rstrip("/").split("/")[-1] for entry in entries)
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if not pickled:
            return UserError(
                f"{self.where} has no weights: there are {', '.join(names) or 'no files'}",
                rule=f"weights are read from {_SINGLE}, from the files of {_INDEX}, or from .gguf",
                remedy="copy the weights, too",
            )
        new = f"{self.where.rstrip('/')}-safetensors"
        return UserError(
            f"{self.where} holds pickled weights: {', '.join(pickled)}",
            rule="pickles can run any code when they are read; only safetensors and GGUF are read",
            remedy='where you trust the file, rewrite it once with\n    python -c "import '
            f"transformers as t; p = '{self.where}'; M = getattr(t, "
            "t.AutoConfig.from_pretrained(p).architectures[0]); T = t.AutoTokenizer; "
            f"M.from_pretrained(p).save_pretrained('{new}'); "
            f"T.from_pretrained(p).save_pretrained('{new}')\"\n  and give {new}",
        )
