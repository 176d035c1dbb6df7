"""What a person can get wrong with a run: a message with value, rule and remedy, nothing damaged.

Each case ends with exit code 2 and without a traceback, and leaves every file as it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint import storage
from megascale.checkpoint.reader import CheckpointReader
from tests.integration import runs


@dataclass(frozen=True)
class Trained:
    """A finished run of four steps with checkpoints of steps 2 and 4, in a folder of its own."""

    folder: Path
    data: Path
    config: Path
    output: Path
    tokenizer: Path

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"step_{step:08d}"

    def resume(self, *overrides: object) -> runs.Done:
        return runs.call("train", self.config, *overrides, "--resume")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("original")
    tokenizer = runs.make_tokenizer(folder)
    data = runs.make_dataset(folder, tokenizer)
    config = runs.write_config(folder / "tiny.yaml", runs.settings(data, folder / "run"))
    done = runs.call("train", config)
    assert done.code == 0, done.output
    return Trained(folder, data, config, folder / "run", tokenizer)


@pytest.fixture
def trained(original: Trained, tmp_path: Path) -> Trained:
    """A copy that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(original.folder, folder)
    tree = runs.settings(folder / "data", folder / "run")
    config = runs.write_config(folder / "tiny.yaml", tree)
    return Trained(folder, folder / "data", config, folder / "run", folder / "tokenizer")


def _unchanged(folder: Path, action: Callable[[], runs.Done]) -> str:
    """The message of an action that is refused and leaves every file below `folder` alone."""
    before = runs.files(folder)
    message = action().refusal()
    assert runs.files(folder) == before
    assert "remedy" in message or "hint" in message
    return message


def _flip(path: Path, at: float) -> None:
    """Flip one bit; `at` is a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(bytes(content))


# Data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_dataset(trained: Trained, cut: int) -> None:
    binary = trained.data / "shard_00000.bin"
    content = binary.read_bytes()
    binary.write_bytes(content[:-cut])
    for action in (
        lambda: runs.call("train", trained.config, f"run.output_dir={trained.folder / 'new'}"),
        lambda: runs.call("evaluate", trained.checkpoint(4), "--data", trained.data),
        trained.resume,
    ):
        message = _unchanged(trained.folder, action)
        assert f"shard_00000.bin is truncated or changed: {len(content) - cut} bytes" in message
    prefix = f"data.path={trained.data / 'shard_00000'}"
    message = _unchanged(trained.folder, lambda: trained.resume(prefix, "model.vocab_size=270"))
    assert "truncated" in message


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "megascale-dataset", "version": 1}'])
def test_a_damaged_dataset_manifest(trained: Trained, damage: str) -> None:
    (trained.data / "manifest.json").write_text(damage)
    assert "manifest.json is no dataset manifest" in _unchanged(trained.folder, trained.resume)


def test_a_dataset_that_is_not_there(trained: Trained) -> None:
    wrong = f"data.path={trained.folder / 'dat'}"
    message = _unchanged(trained.folder, lambda: trained.resume(wrong))
    assert "no dataset at" in message
    assert "did you mean" in message


def test_a_dataset_of_another_tokenizer(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = runs.make_tokenizer(other, vocab_size=280)
    data = runs.make_dataset(other, tokenizer)

    named = f"data.tokenizer={tokenizer}"
    message = _unchanged(trained.folder, lambda: trained.resume(named))
    assert "was tokenised with" in message
    blend = f"data.path=[{{path: {trained.data}, weight: 1}}, {{path: {data}, weight: 1}}]"
    message = _unchanged(trained.folder, lambda: trained.resume(blend))
    assert "one tokenizer" in message
    message = _unchanged(
        trained.folder, lambda: runs.call("evaluate", trained.checkpoint(4), "--data", data)
    )
    assert "data's tokenizer is" in message
    message = _unchanged(trained.folder, lambda: trained.resume("model.vocab_size=260"))
    assert "ids up to 269" in message


def test_resume_on_other_data_or_another_order(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = runs.make_dataset(other, trained.tokenizer, shift=1)
    message = _unchanged(trained.folder, lambda: trained.resume(f"data.path={data}"))
    assert "fingerprint" in message
    message = _unchanged(trained.folder, lambda: trained.resume("run.seed=6"))
    assert "run.seed 6" in message
    assert "run.seed=5" in message


# Checkpoints ----------------------------------------------------------------------------------

FILES = (
    "rank_00000.safetensors",
    "manifest.json",
    "config.yaml",
    "tokenizer/tokenizer.json",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint(trained: Trained, file: str, damage: str) -> None:
    path = trained.checkpoint(4) / file
    if damage == "flip":
        _flip(path, 0.6)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    message = _unchanged(
        trained.folder, lambda: runs.call("evaluate", trained.checkpoint(4), "--json")
    )
    assert file in message
    prompt = ("--prompt", "the", "--max-new-tokens", 1)
    message = _unchanged(
        trained.folder, lambda: runs.call("generate", trained.checkpoint(4), *prompt)
    )
    assert file in message

    done = trained.resume("train.max_steps=4")
    assert done.code == 0, done.output
    if file != "manifest.json" or damage != "remove":  # without one it is not a checkpoint at all
        assert "warning:" in done.stdout
        assert "step_00000004 passed over" in done.stdout
        assert file in done.stdout
    assert "step_00000002 at step 2" in done.stdout
    assert [line["step"] for line in runs.metrics(trained.output)] == [1, 2, 3, 4]
    reader = CheckpointReader(str(trained.checkpoint(4)))  # written anew, over the damaged one
    assert reader.damage() is None


def test_the_header_of_a_tensor_file(trained: Trained) -> None:
    for at in (0.0, 0.02):
        _flip(trained.checkpoint(4) / "rank_00000.safetensors", at)
        message = _unchanged(trained.folder, lambda: runs.call("evaluate", trained.checkpoint(4)))
        assert "checksum" in message


def test_no_intact_checkpoint(trained: Trained) -> None:
    _flip(trained.checkpoint(4) / "manifest.json", 0.3)
    (trained.checkpoint(2) / "rank_00000.safetensors").unlink()
    message = _unchanged(trained.folder, trained.resume)
    assert "no intact checkpoint" in message
    assert "step_00000004 passed over" in message
    assert "step_00000002 passed over" in message


def test_a_path_that_is_no_checkpoint(trained: Trained) -> None:
    for path in (trained.output, trained.folder / "nowhere", trained.config, trained.data):
        for arguments in (("evaluate", path), ("evaluate", path, "--nproc", 2)):
            message = _unchanged(trained.folder, lambda given=arguments: runs.call(*given))
            assert str(path) in message
        generate = ("generate", path, "--prompt", "x")
        message = _unchanged(trained.folder, lambda given=generate: runs.call(*given))
        assert str(path) in message


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("model.hidden_size=32", "model (270, 32), checkpoint (270, 16)"),
        ("model.num_layers=3", "missing in the checkpoint: "),
        ("model.num_layers=1", "not in the model: "),
        ("model.tie_word_embeddings=false", "missing in the checkpoint: "),
        ("optimizer.name=sgd", "no optimizer state 'momentum_buffer'"),
    ],
)
def test_a_config_of_another_model_on_resume(trained: Trained, override: str, found: str) -> None:
    message = _unchanged(trained.folder, lambda: trained.resume(override))
    assert "does not fit this config" in message
    assert found in message


def test_parts_and_sampling_that_do_not_exist(trained: Trained) -> None:
    checkpoint = trained.checkpoint(4)
    message = _unchanged(
        trained.folder, lambda: runs.call("evaluate", checkpoint, "--split", "test")
    )
    assert "train, valid" in message
    for wrong in (("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.5"), ("--top-k", "-2")):
        arguments = ("generate", checkpoint, "--prompt", "x", *wrong)
        message = _unchanged(trained.folder, lambda given=arguments: runs.call(*given))
        assert wrong[1] in message


# Sizes and places -----------------------------------------------------------------------------


def test_batch_sizes_that_do_not_divide(trained: Trained) -> None:
    message = _unchanged(trained.folder, lambda: trained.resume("train.global_batch_size=5"))
    assert "train.global_batch_size: 5" in message
    message = _unchanged(trained.folder, lambda: trained.resume("train.micro_batch_size=3"))
    assert "train.global_batch_size: 4" in message
    assert "train.micro_batch_size" in message


def test_a_world_size_that_does_not_fit(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    message = _unchanged(trained.folder, lambda: trained.resume("--nproc", 3))
    assert "4 = 2 * 3 *" in message
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "4 = 2 * 3 *" in _unchanged(trained.folder, trained.resume)
    message = _unchanged(trained.folder, lambda: trained.resume("--nproc", 2))
    assert "WORLD_SIZE=3" in message
    monkeypatch.setenv("RANK", "3")
    assert "0 <= RANK < WORLD_SIZE" in _unchanged(trained.folder, trained.resume)
    monkeypatch.delenv("WORLD_SIZE")
    assert "WORLD_SIZE must both be set" in _unchanged(trained.folder, trained.resume)


def test_a_rendezvous_port_in_use(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        message = _unchanged(trained.folder, trained.resume)
    assert f"127.0.0.1:{port} is in use" in message


@pytest.mark.parametrize("nproc", [(), ("--nproc", 2)])
def test_an_output_folder_that_cannot_be_made(trained: Trained, nproc: tuple[object, ...]) -> None:
    in_the_way = trained.folder / "file"
    in_the_way.write_text("a person's own")
    for path in (in_the_way, in_the_way / "below"):
        arguments = ("train", trained.config, f"run.output_dir={path}", *nproc)
        message = _unchanged(trained.folder, lambda given=arguments: runs.call(*given))
        assert str(path) in message


# A full disk ----------------------------------------------------------------------------------


class _FullDisk:
    """Lets `calls` flushes to the disk pass and then is full."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _OsOf:
    """The module `os` with another fsync."""

    def __init__(self, fsync: Callable[[int], None]) -> None:
        self.fsync = fsync

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# rank file, config, two tokenizer files, manifest, the folder, its parent
@pytest.mark.parametrize("writes", range(6))
def test_a_disk_that_fills_up_in_a_checkpoint(
    trained: Trained, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = runs.files(trained.checkpoint(2))
    shutil.rmtree(trained.checkpoint(4))
    monkeypatch.setattr(storage, "os", _OsOf(_FullDisk(writes)))
    done = trained.resume()
    message = done.refusal()
    assert "No space left on device" in message
    assert "free space" in message
    names = [path.name for path in (trained.output / "checkpoints").iterdir()]
    assert names == ["step_00000002"]
    assert runs.files(trained.checkpoint(2)) == kept
    monkeypatch.undo()
    assert trained.resume().code == 0
    assert [line["step"] for line in runs.metrics(trained.output)] == [1, 2, 3, 4]


@pytest.fixture
def full_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk on which no run can write config.yaml or metrics.jsonl."""
    from megascale.data import atomic_files

    monkeypatch.setattr(atomic_files, "os", _OsOf(_FullDisk(0)))
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("full_files")
def test_a_disk_that_is_full_before_the_first_step(trained: Trained) -> None:
    message = _unchanged(trained.folder, lambda: trained.resume("train.max_steps=9"))
    assert "no space to write" in message
    assert "config.yaml" in message


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(
    trained: Trained,
) -> None:
    overrides = (f"run.output_dir={trained.folder / 'hot'}", "optimizer.lr=1e30")
    done = runs.call("train", trained.config, *overrides, "schedule.min_lr=0")
    assert "the loss of step" in done.refusal()
    lines = (trained.folder / "hot" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] < 1e30 for line in lines)
