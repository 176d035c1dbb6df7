"""Copies of datasets in an object store (memory://): checked, made once, taken up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megascale.data.corpus import TokenCorpus
from megascale.data.dataset_cache import cached_dataset
from megascale.data.manifest import DatasetManifest
from megascale.data.places import as_path
from megascale.errors import UserError
from tests.unit.test_data_corpus import _dataset

URL = "memory://bucket/set"


@pytest.fixture
def uploaded(tmp_path: Path) -> Iterator[Path]:
    """A dataset of two shards, and the same below `URL`."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    local = _dataset(tmp_path / "set", [[10, 5], [7, 3]])
    for path in local.rglob("*"):
        if path.is_file():
            as_path(f"{URL}/{path.relative_to(local).as_posix()}").write_bytes(path.read_bytes())
    yield local
    system.store.clear()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that are copied here."""
    names: list[str] = []
    system = type(fsspec.filesystem("memory"))
    get = system.get_file

    def noted(self: Any, remote: str, local: str, **more: Any) -> Any:
        names.append(remote.rpartition("/")[2])
        return get(self, remote, local, **more)

    monkeypatch.setattr(system, "get_file", noted)
    return names


def test_a_copy_is_the_dataset_and_is_made_once(
    uploaded: Path, fetched: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        corpus = TokenCorpus.open(URL, cache=tmp_path / "cache", verify=True)
        assert corpus.fingerprint == TokenCorpus.open(uploaded).fingerprint
        assert corpus.read(0, 25).tolist() == list(range(25))
        assert str(corpus.path) == URL
        assert corpus.tokenizer is not None
    assert sorted(fetched) == [
        *("shard_00000.bin", "shard_00000.idx", "shard_00001.bin", "shard_00001.idx"),
        "tokenizer.json",
    ]
    with pytest.raises(UserError, match=r"set data\.cache_dir"):
        TokenCorpus.open(URL)


def test_a_copy_that_was_cut_off_is_taken_up(
    uploaded: Path, fetched: list[str], tmp_path: Path
) -> None:
    whole = as_path(f"{URL}/shard_00001.idx").read_bytes()
    as_path(f"{URL}/shard_00001.idx").write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match=r"shard_00001\.idx has the checksum"):
        cached_dataset(as_path(URL), tmp_path / "cache")
    assert all(path.name.startswith(".") for path in (tmp_path / "cache").iterdir())
    as_path(f"{URL}/shard_00001.idx").write_bytes(whole)
    fetched.clear()
    copy = cached_dataset(as_path(URL), tmp_path / "cache")
    assert "shard_00000.bin" not in fetched
    assert "shard_00001.idx" in fetched
    assert not list(copy.glob(".*"))
    DatasetManifest.load(copy)
    del fsspec.filesystem("memory").store["/bucket/set/shard_00000.bin"]
    with pytest.raises(UserError, match=r"shard_00000\.bin is missing"):
        cached_dataset(as_path(URL), tmp_path / "other")


def test_a_prefix_is_copied_again_when_it_changes(uploaded: Path, tmp_path: Path) -> None:
    prefix = f"{URL}/shard_00001"
    first = TokenCorpus.open(f"{prefix}.bin", cache=tmp_path / "cache")
    assert first.read(0, 10).tolist() == list(range(15, 25))
    as_path(f"{prefix}.bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    second = TokenCorpus.open(prefix, cache=tmp_path / "cache")
    assert second.read(0, 10).tolist() == list(range(10))
    assert first.fingerprint != second.fingerprint
    with pytest.raises(UserError, match="no dataset at memory://bucket/nothing"):
        TokenCorpus.open("memory://bucket/nothing", cache=tmp_path / "cache")


def test_a_prefix_and_the_dataset_that_it_became_are_known_as_the_same(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "set", [[10, 5]])
    prefix = TokenCorpus.open(dataset / "shard_00000")
    assert TokenCorpus.open(dataset).was_prefix(prefix.fingerprint)
    assert not prefix.was_prefix(prefix.fingerprint)
    two = TokenCorpus.open(_dataset(tmp_path / "two", [[10, 5], [1]]))
    assert not two.was_prefix(prefix.fingerprint)
