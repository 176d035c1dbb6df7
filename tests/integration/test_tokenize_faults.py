"""tokenize under bad text, large documents, a full disk and changes between two starts."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.documents import DocumentUnit
from data_prep.encoders import Backend
from data_prep.shard_runner import ShardTask
from data_prep.sources import find_inputs
from data_prep.token_shards import TokenizeShard
from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize
from data_prep.train_tokenizer import TokenizerKind, TrainTokenizerOptions, train_tokenizer
from megascale.data.corpus import TokenCorpus
from megascale.data.token_file import TokenFileWriter
from megascale.errors import UserError

LINE = "The clocks were striking thirteen. Nobody looked up. It was a bright cold day in April."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, and tokenizers bpe/, other/ and wordpiece/."""
    root = tmp_path_factory.mktemp("faults")
    (root / "text.txt").write_text("\n".join(f"{number} {LINE}" for number in range(400)))
    for name, kind, size in (
        ("bpe", TokenizerKind.BPE, 300),
        ("other", TokenizerKind.BPE, 290),
        ("wordpiece", TokenizerKind.WORDPIECE, 300),
    ):
        options = TrainTokenizerOptions(size, kind, documents=DocumentUnit.LINE)
        train_tokenizer([str(root / "text.txt")], root / name, options)
    return root


def files(path: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    del found["report.json"]
    return found


def run(
    source: Path,
    output: Path,
    tokenizer: Path,
    shard_bytes: int | None = 8000,
    bert: bool = False,
    workers: int = 1,
    backend: Backend = Backend.AUTO,
) -> TokenCorpus:
    options = TokenizeOptions(DocumentUnit.LINE, bert=bert, shard_bytes=shard_bytes)
    tokenize([str(source)], output, tokenizer, options, RunOptions(workers, backend))
    return TokenCorpus.open(output, verify=True)


@pytest.mark.parametrize("bert", [False, True])
def test_workers_back_ends_and_shards_change_no_token(
    folder: Path, tmp_path: Path, bert: bool
) -> None:
    text, tokenizer = folder / "text.txt", folder / ("wordpiece" if bert else "bpe")
    one = run(text, tmp_path / "one", tokenizer, bert=bert)
    run(text, tmp_path / "two", tokenizer, bert=bert, workers=2, backend=Backend.TOKENIZERS)
    assert len(one.token_files) == 5
    assert files(tmp_path / "one") == files(tmp_path / "two")
    whole = run(text, tmp_path / "whole", tokenizer, None, bert)
    assert len(whole.token_files) == 1
    assert whole.read(0, whole.num_tokens).tolist() == one.read(0, one.num_tokens).tolist()
    assert whole.document_starts.tolist() == one.document_starts.tolist()
    assert whole.utf8_bytes == one.utf8_bytes == text.stat().st_size - 399


def test_a_full_disk_keeps_shards_and_another_tokenizer_does_not_join_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, output = folder / "text.txt", tmp_path / "out"
    written = []
    real = TokenFileWriter.add_documents

    def full_at_the_third(self: TokenFileWriter, *arguments: np.ndarray) -> None:
        written.append(self)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(TokenFileWriter, "add_documents", full_at_the_third)
        with pytest.raises(UserError, match="no space to write"):
            run(text, output, folder / "bpe")
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    left = sorted(path.name for path in (tmp_path / ".out.unfinished").iterdir())
    pairs = [f"shard_0000{i}.{suffix}" for i in (0, 1) for suffix in ("bin", "idx")]
    assert left == [".done", ".run.json", *pairs]
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: 300 before, now 290"):
        run(text, output, folder / "other")
    run(text, output, folder / "bpe")
    report = json.loads((output / "report.json").read_text())
    assert report["shards"] == {"all": 5, "made_by_this_run": 3}
    run(text, tmp_path / "whole", folder / "bpe")
    assert files(output) == files(tmp_path / "whole")


def test_a_tokenizer_that_changes_during_the_run_is_seen(folder: Path, tmp_path: Path) -> None:
    work = TokenizeShard(folder / "bpe", "0" * 32, Backend.AUTO, DocumentUnit.LINE, "text")
    task = ShardTask("shard_00000", 1, tuple(find_inputs([str(folder / "text.txt")])))
    with pytest.raises(UserError, match="must not change"):
        work(task, tmp_path, lambda done: None)


def test_odd_text_is_kept_or_counted(folder: Path, tmp_path: Path) -> None:
    lines = [b"null \x00 bytes", b"broken \xff", b"", b"  ", "größe 東京 👍🏽".encode(), b"\x1b[0m"]
    (tmp_path / "odd.txt").write_bytes(b"\n".join(lines))
    corpus = run(tmp_path / "odd.txt", tmp_path / "out", folder / "bpe", None)
    assert corpus.tokenizer is not None
    assert corpus.manifest is not None
    text = corpus.tokenizer.decode(corpus.read(0, corpus.num_tokens).tolist())
    assert text.split("<|endoftext|>")[:-1] == ["null \x00 bytes", "größe 東京 👍🏽", "\x1b[0m"]
    assert corpus.manifest.skipped == {"line that is not UTF-8": 1}
    report = json.loads((tmp_path / "out/report.json").read_text())
    example = report["skipped"]["line that is not UTF-8"]["examples"]
    assert example == [f"{tmp_path}/odd.txt:2 (byte 7)"]


def test_a_large_document_is_the_same_for_every_back_end(folder: Path, tmp_path: Path) -> None:
    document = (f"{LINE} " * 12_100).strip()  # 1.06 MB, over the pieces that the reference gets
    (tmp_path / "large.jsonl").write_text(json.dumps({"text": document}) + '\n{"text": "small"}\n')
    fast = run(tmp_path / "large.jsonl", tmp_path / "fast", folder / "bpe")
    reference = [tmp_path / "large.jsonl", tmp_path / "reference", folder / "bpe"]
    run(*reference, backend=Backend.TOKENIZERS)  # type: ignore[arg-type]
    assert files(tmp_path / "fast") == files(tmp_path / "reference")
    assert (fast.num_documents, len(fast.token_files)) == (2, 2)
    assert fast.tokenizer is not None
    ids = fast.read(0, int(fast.document_starts[1]) - 1).tolist()
    assert fast.tokenizer.decode(ids) == document


def test_a_shard_without_documents_has_no_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.txt").write_bytes(b"\n".join([b"\xff" * 50] * 20 + [b"good text here"] * 20))
    corpus = run(tmp_path / "mixed.txt", tmp_path / "out", folder / "bpe", 300)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert len(names) == len(corpus.token_files) < 5
    assert "shard_00000.bin" not in names
    assert corpus.num_documents == 20
