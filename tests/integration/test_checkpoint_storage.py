"""Checkpoints on a real S3 server (moto's), and staged on a local disk first."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.ranks import OneRank
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.upload import upload
from megascale.errors import UserError
from megascale.parallel.fragment import Box, Fragment, whole_box
from tests.integration import runs
from tests.object_store import s3_bucket

SHAPE = (300, 7)
MATRIX = (12, 56)
SMALL = {"config.yaml": b"a: 1\n", "tokenizer/vocab.json": b"{}"}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a new bucket; the environment names the server, as for a user."""
    with s3_bucket("checkpoints") as url:
        yield url


def _fragments(step: int) -> list[Fragment]:
    tensor = torch.arange(2100.0) + step
    return [Fragment("w", "master", SHAPE, whole_box(SHAPE), 0, tensor)]


def _save(manager: CheckpointManager, step: int) -> None:
    manager.save(step, _fragments(step), {"step": step}, SMALL)
    manager.finish()


def _newest(manager: CheckpointManager) -> tuple[int, str, list[str]]:
    reader, notes = manager.open_newest_intact()
    assert reader is not None
    part = torch.zeros(100)
    reader.fill(Fragment("w", "master", SHAPE, whole_box(SHAPE), 1000, part))
    assert torch.equal(part, _fragments(reader.manifest.step)[0].tensor[1000:1100])
    where = reader.storage.url
    reader.close()
    return reader.manifest.step, where, notes


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_saved_found_damaged_and_pruned_on_s3(bucket: str, tmp_path: Path, staged: bool) -> None:
    root = f"{bucket}/{'staged' if staged else 'direct'}/run"
    stage = str(tmp_path / "stage")
    manager = CheckpointManager(root, keep_last=2, staging=stage if staged else None)
    for step in (2, 4, 6):
        _save(manager, step)
    assert manager.steps() == [4, 6]
    assert _newest(CheckpointManager(root)) == (6, f"{root}/step_00000006", [])
    storage = Storage(root)
    storage.fs.pipe_file(storage.path("step_00000006", "config.yaml"), b"b: 1\n")
    step, where, notes = _newest(CheckpointManager(root))
    assert (step, where) == (4, f"{root}/step_00000004")
    assert "config.yaml has another checksum" in notes[0]
    # with its manifest gone it is what an interrupted upload leaves
    storage.remove_file("step_00000006", "manifest.json")
    step, _, notes = _newest(CheckpointManager(root))
    assert step == 4
    assert "manifest.json is missing" in notes[0]
    _save(CheckpointManager(root, asynchronous=True), 6)
    assert _newest(CheckpointManager(root))[0] == 6


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each answer of the S3 server."""
    import s3fs

    sizes: list[int] = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        answer = await call(self, method, *arguments, **options)
        if method == "get_object":
            sizes.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    return sizes


def _cuts(kind: str, ranks: int) -> list[tuple[Box, int, int]]:
    """(box, start, numel) of each rank: flat parts, or parts of each row or column."""
    rows, columns = MATRIX
    if kind == "flat":
        part = rows * columns // ranks
        return [(whole_box(MATRIX), rank * part, part) for rank in range(ranks)]
    rows, columns = (rows // ranks, columns) if kind == "rows" else (rows, columns // ranks)
    boxes = [
        ((rank * rows, (rank + 1) * rows), (0, columns))
        if kind == "rows"
        else ((0, rows), (rank * columns, (rank + 1) * columns))
        for rank in range(ranks)
    ]
    return [(box, 0, rows * columns) for box in boxes]


@pytest.mark.parametrize(
    ("kind", "ranks"), [("flat", 7), ("rows", 4), ("columns", 2), ("columns", 7)]
)
def test_each_rank_fetches_its_own_bytes_of_an_object_store(
    bucket: str, fetched: list[int], kind: str, ranks: int
) -> None:
    """Over all ranks each byte at most twice, however the layouts lie to each other."""
    root, values = f"{bucket}/ranges_{kind}_{ranks}", torch.arange(12.0 * 56)
    held = [
        Fragment(name, "master", MATRIX, whole_box(MATRIX), 0, values + 1000 * number)
        for number, name in enumerate("uvw")
    ]
    CheckpointManager(root).save(2, held, {}, {})
    state = sum(fragment.tensor.nbytes for fragment in held)
    fetched.clear()
    readers = [CheckpointReader(f"{root}/step_00000002") for _ in range(ranks)]
    beside = sum(fetched)  # the manifests
    for reader, (box, start, numel) in zip(readers, _cuts(kind, ranks), strict=True):
        for fragment in held:
            part = torch.zeros(numel)
            reader.fill(Fragment(fragment.name, fragment.kind, MATRIX, box, start, part))
            local = fragment.tensor.view(MATRIX)[tuple(slice(*interval) for interval in box)]
            assert torch.equal(part, local.reshape(-1)[start : start + numel])
    headers = ranks * 2000
    assert state <= sum(fetched) - beside <= 2 * state + headers
    assert sum(reader.bytes_read for reader in readers) <= 2 * state
    if kind == "flat":
        assert sum(fetched) - beside <= state + headers


def test_the_newest_intact_copy_is_taken_wherever_it_is(tmp_path: Path) -> None:
    root, stage = str(tmp_path / "kept"), str(tmp_path / "stage")
    manager = CheckpointManager(root, staging=stage)
    for step in (2, 4):
        _save(manager, step)
    assert runs.files(Path(root) / "step_00000004") == runs.files(Path(stage) / "step_00000004")
    assert _newest(manager)[:2] == (4, f"{stage}/step_00000004")  # the near one
    (Path(stage) / "step_00000004" / "rank_00000.safetensors").write_bytes(b"")
    step, where, notes = _newest(manager)
    assert (step, where) == (4, f"{root}/step_00000004")
    assert f"{stage}/step_00000004 passed over" in notes[0]
    shutil.rmtree(Path(root) / "step_00000004")  # as if the upload had not happened yet
    assert _newest(manager)[:2] == (2, f"{stage}/step_00000002")
    shutil.rmtree(stage)  # another machine
    assert _newest(manager)[:2] == (2, f"{root}/step_00000002")


def test_a_staged_file_that_changed_is_not_uploaded(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path / "stage"))
    _save(manager, 2)
    (tmp_path / "stage" / "step_00000002" / "config.yaml").write_bytes(b"a: 2\n")
    target = Storage(str(tmp_path / "kept"))
    with pytest.raises(UserError, match=r"config\.yaml has another checksum"):
        upload(manager.storage, target, "step_00000002", OneRank())
    assert target.folders() == []


def test_a_staged_file_that_cannot_be_read_is_not_called_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(str(tmp_path / "stage"))
    _save(manager, 2)
    target = Storage(str(tmp_path / "kept"))

    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def missing(*parts: str) -> Any:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    opened = manager.storage.open_read
    for fault, reason in ((lambda *parts: Broken(), "Input/output error"), (missing, "No such")):
        monkeypatch.setattr(
            manager.storage,
            "open_read",
            lambda *parts, fault=fault: (
                fault(*parts) if parts[-1] == "rank_00000.safetensors" else opened(*parts)
            ),
        )
        with pytest.raises(UserError, match=f"cannot read .*rank_00000.safetensors: {reason}"):
            upload(manager.storage, target, "step_00000002", OneRank())
        assert target.folders() == []


def test_a_whole_run_with_checkpoints_on_s3(bucket: str, tmp_path: Path) -> None:
    data = runs.make_dataset(tmp_path, runs.make_tokenizer(tmp_path))
    tree: dict[str, Any] = runs.settings(data, tmp_path / "run", train__max_steps=4)
    tree["checkpoint"] |= {"folder": f"{bucket}/whole", "async_save": True}
    config = runs.write_config(tmp_path / "c.yaml", tree)
    assert (
        runs.call(
            "train", config, "train.max_steps=3", "schedule.name=constant", "schedule.min_lr=0"
        ).code
        == 0
    )
    refused = runs.call("train", config).refusal()
    assert f"{bucket}/whole already holds checkpoints" in refused
    done = runs.call("train", config, "--resume")
    assert done.code == 0, done.output
    assert "resumed from" in done.stdout
    done = runs.call("checkpoint", "verify", f"{bucket}/whole")
    assert done.code == 0
    assert done.stdout.count("intact") == 3
    done = runs.call("evaluate", f"{bucket}/whole/step_00000004", "--json")
    assert done.code == 0, done.output


def test_a_url_that_nothing_serves_is_refused() -> None:
    with pytest.raises(UserError, match="cannot open nowhere://x"):
        CheckpointReader("nowhere://x")


def test_an_import_to_s3_is_committed_by_its_manifest(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its final name, the manifest last: a rename would copy the files one by one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    changes: list[str] = []

    def announced(root: str) -> Storage:
        return Storage(root, lambda change, path: changes.append(f"{change} {path}"))

    monkeypatch.setattr("megascale.checkpoint.writer.Storage", announced)
    small = GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=2, n_positions=8)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "source")
    out = f"{bucket}/imported"
    done = runs.call("convert", "from-hf", tmp_path / "source", out)
    assert done.code == 0, done.output
    assert not [change for change in changes if change.startswith("rename")]
    assert changes[-1] == "write checkpoints/imported/checkpoints/step_00000000/manifest.json"
    reader = CheckpointReader(f"{out}/checkpoints/step_00000000")
    assert reader.damage() is None
    reader.close()
    text = Storage(out).open_read("config.yaml").read().decode()
    assert f"init_from: {out}/checkpoints/step_00000000" in text


def test_a_server_that_does_not_know_us_is_a_users_mistake(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused = runs.call("checkpoint", "list", f"{bucket}/direct/run").refusal()
    assert "NoCredentialsError" in refused
