"""A checkpoint of each format version, stored with the tests, keeps loading; the document's own
reader reads it too."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascale.checkpoint.manifest import FORMAT_VERSION
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.tensor_file import TensorStream
from megascale.checkpoint.writer import write_weights
from megascale.parallel.fragment import Fragment, whole_box

DATA = Path(__file__).resolve().parents[1] / "data"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoint-format.md"
KINDS = ("master", "exp_avg", "exp_avg_sq")
# name -> shape and what its first element is; kinds are 1000 apart
PARAMETERS: dict[str, tuple[tuple[int, ...], float]] = {
    "model.layers.0.mlp.down.weight": ((5, 6), 0.0),
    "model.embedding.weight": ((7, 3), 500.0),
    "scale": ((), 900.0),
}


def _expected(name: str, kind: str) -> np.ndarray:
    shape, first = PARAMETERS[name]
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    return values + first + 1000 * KINDS.index(kind)


def _stored(version: int) -> Path:
    return DATA / f"checkpoint_v{version}" / "step_00000003"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_stored_checkpoint_of_each_version_loads(version: int) -> None:
    reader = CheckpointReader(str(_stored(version)))
    assert reader.damage() is None
    assert reader.manifest.state["train"]["samples_seen"] == 12
    for name, (shape, _) in PARAMETERS.items():
        for kind in KINDS:
            tensor = torch.zeros(int(np.prod(shape, dtype=int)))
            reader.fill(Fragment(name, kind, shape, whole_box(shape), 0, tensor))
            assert np.array_equal(tensor.numpy().reshape(shape), _expected(name, kind))
    assert reader.state_shape("model.layers.0.mlp.down.weight", "row_var") == (5, 1)
    random = reader.rng_state(1)
    assert random is not None
    assert random.dtype == torch.uint8
    reader.close()


def test_stored_checkpoints_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 100_000


def _reader_of_the_document() -> Any:
    text = DOCUMENT.read_text().partition("## A reader in Python")[2]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert re.search(r"^def read\(", code, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names["read"]


def test_the_reader_of_the_document_reads_it() -> None:
    read = _reader_of_the_document()
    for kind in KINDS:
        tensors = read(_stored(FORMAT_VERSION), kind)
        assert set(tensors) == set(PARAMETERS)
        for name, values in tensors.items():
            assert np.array_equal(values, _expected(name, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reader_of_the_document_reads_imports(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {"a.weight": torch.arange(15.0).view(3, 5), "b": torch.tensor(2.0)}
    streams = [
        TensorStream(name, dtype, tuple(values.shape), partial(_as_blocks, values.to(dtype)))
        for name, values in weights.items()
    ]
    write_weights(str(tmp_path), "step_00000000", streams, {}, {}, file_bytes=8)
    tensors = _reader_of_the_document()(tmp_path / "step_00000000")
    assert set(tensors) == set(weights)
    for name, values in weights.items():
        assert np.array_equal(tensors[name], values.numpy())


def _as_blocks(values: torch.Tensor) -> list[torch.Tensor]:
    return [values]
