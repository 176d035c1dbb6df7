"""`python -m data_prep` as a person runs it: results, second runs, and every kind of bad input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.documents import DocumentUnit, iterate_documents
from data_prep.skips import SkipReport
from data_prep.sources import describe_source, find_inputs
from megascale.data.corpus import TokenCorpus
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError
from tests.integration.runs import ROOT, run_data_prep

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen.\n"


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"  # it holds times
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(PROSE * 20 + "\n" + "def f(x):\n\treturn x + 1\n" * 20)
    (folder / "b.txt").write_text("Größe 東京\r\n" * 30)
    return folder


@pytest.fixture(scope="module")
def bpe(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bpe") / "tokenizer"
    run_data_prep("train-tokenizer", "--input", texts, "--output", output, "--vocab-size", 300)
    return output


def test_tokenized_text_decodes_to_the_files(texts: Path, bpe: Path, tmp_path: Path) -> None:
    output = run_data_prep(
        "tokenize", "--input", texts, "--output", tmp_path / "set", "--tokenizer", bpe
    )
    assert "2 documents" in output
    corpus = TokenCorpus.open(tmp_path / "set", verify=True)
    assert corpus.tokenizer is not None
    expected = [(texts / name).read_bytes().decode() for name in ("a.txt", "b.txt")]
    stops = [*corpus.document_starts[1:].tolist(), corpus.num_tokens]
    for start, stop, text in zip(corpus.document_starts.tolist(), stops, expected, strict=True):
        ids = corpus.read(start, stop - start).tolist()
        assert ids[-1] == corpus.eod_id
        assert corpus.tokenizer.decode(ids[:-1]) == text
    assert corpus.utf8_bytes == sum(len(text.encode()) for text in expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_a_second_run_is_a_no_op_and_others_need_overwrite(
    texts: Path, bpe: Path, tmp_path: Path
) -> None:
    command = ["tokenize", "--input", texts, "--output", tmp_path / "set", "--tokenizer", bpe]
    run_data_prep(*command)
    before, changed_at = _files(tmp_path / "set"), (tmp_path / "set").stat().st_mtime_ns
    assert "already prepared" in run_data_prep(*command)
    assert "--overwrite" in run_data_prep(*command, "--documents", "line", expect=2)
    assert _files(tmp_path / "set") == before
    assert (tmp_path / "set").stat().st_mtime_ns == changed_at
    assert "90 documents" in run_data_prep(*command, "--documents", "line", "--overwrite")
    assert _files(tmp_path / "set") != before
    run_data_prep(*command, "--overwrite")
    assert _files(tmp_path / "set") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_a_foreign_folder_is_never_replaced(texts: Path, bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    for command in (["tokenize", "--tokenizer", bpe], ["train-tokenizer", "--vocab-size", 300]):
        output = run_data_prep(
            *command, "--input", texts, "--output", tmp_path, "--overwrite", expect=2
        )
        assert "not an output of this command" in output
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "bpe", "--vocab-size", "300"],
        ["--kind", "sentencepiece", "--vocab-size", "330"],
        ["--kind", "sentencepiece", "--sentencepiece-model", "unigram", "--vocab-size", "300"],
    ],
)
def test_training_is_deterministic_and_idempotent(
    texts: Path, tmp_path: Path, options: list[str]
) -> None:
    for name in ("one", "two"):
        run_data_prep("train-tokenizer", "--input", texts, "--output", tmp_path / name, *options)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    again = ["train-tokenizer", "--input", texts, "--output", tmp_path / "one", *options]
    assert "already done" in run_data_prep(*again)
    assert "--overwrite" in run_data_prep(*again, "--seed", "5", expect=2)
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.vocab_size == int(options[-1])
    assert tokenizer.decode(tokenizer.encode(PROSE * 2)) == PROSE * 2
    assert len(tokenizer.encode(PROSE)) < 0.9 * len(PROSE)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "sentencepiece-bpe", "sentencepiece-unigram"])
def test_every_trained_kind_loads_with_transformers(texts: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    name, _, model = kind.partition("-")
    command = ["train-tokenizer", "--input", texts, "--output", tmp_path / "t", "--kind", name]
    options = ["--sentencepiece-model", model] if model else []
    run_data_prep(*command, *options, "--vocab-size", "300")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "t", local_files_only=True)
    ours = load_tokenizer(tmp_path / "t")
    text = f"{PROSE}  tab\tand\n\nlines, 中文 é😀"
    assert theirs.encode(text, add_special_tokens=False) == list(ours.encode(text))
    assert len(theirs) == ours.vocab_size
    if name == "wordpiece":  # a BERT's: no end of document
        assert theirs.mask_token_id == ours.require_bert_tokens().ids["mask"]
    else:
        assert theirs.eos_token_id == ours.eod_id


def test_bad_files_and_lines_are_counted_and_named(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "good.txt").write_text(PROSE)
    lines = [
        '{"text": "one"}',
        "",
        "{broken",
        '{"body": "x"}',
        '{"text": 7}',
        '{"text": " "}',
        "[1]",
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, '{"text": "two"}']))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as stream:
        stream.write('{"text": "three"}\n')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(500))[:200])
    output = run_data_prep(
        "tokenize", "--input", tmp_path, "--output", tmp_path / "out", "--tokenizer", bpe
    )
    for expected in (
        "1 empty file: ",
        "latin.txt (byte 2)",
        "1 malformed json line: ",
        "mixed.jsonl:3",
        "1 json line without the key 'text': ",
        "mixed.jsonl:4",
        "1 json line whose text is no string: ",
        "1 empty document: ",
        "1 json line that is no object: ",
        "1 truncated or damaged archive: ",
        "4 documents",
        "8 skipped",
    ):
        assert expected in output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sum(manifest["skipped"].values()) == 8


def test_units_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n\xff\nfour")
    files = find_inputs([str(tmp_path / "*.txt")])

    def documents(unit: DocumentUnit) -> tuple[list[str], dict[str, int]]:
        skips = SkipReport()
        return list(iterate_documents(files, unit, "text", skips)), skips.counts

    bad_line = {"line that is not UTF-8": 1}
    assert documents(DocumentUnit.LINE) == (["one", "two", "three", "four"], bad_line)
    assert documents(DocumentUnit.PARAGRAPH) == (["one\r\ntwo", "three\nfour"], bad_line)
    assert documents(DocumentUnit.FILE) == ([], {"file that is not UTF-8": 1})


def test_a_compression_that_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_text('{"text": "not really packed"}')
    monkeypatch.setattr("fsspec.utils.infer_compression", lambda name: None)
    files = find_inputs([str(tmp_path)])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be unpacked"):
        next(iterate_documents(files, DocumentUnit.FILE, "text", SkipReport()))


def test_python_stdlib_is_megabytes_in_mixed_order() -> None:
    files = find_inputs(["python-stdlib"])
    assert describe_source(["python-stdlib"], files)["bytes"] > 5_000_000
    names = [file.name for file in files]
    assert len(set(names)) == len(names)
    assert "json/decoder.py" in names
    assert not any("site-packages" in name or "/test/" in name for name in names)
    # Not alphabetical: a tenth of the files holds many first letters, and prose among code.
    assert len({name[0] for name in names[-len(names) // 10 :]}) > 8
    skips = SkipReport()
    documents = iterate_documents(files, DocumentUnit.FILE, "text", skips)
    assert sum(len(document) for document in documents) > 5_000_000
    assert skips.total < 20


def test_mistakes_exit_with_2_and_say_what_to_do(texts: Path, bpe: Path, tmp_path: Path) -> None:
    def tokenize(source: object, tokenizer: object = bpe) -> str:
        where = ["--output", tmp_path / "out", "--tokenizer", tokenizer]
        return run_data_prep("tokenize", "--input", source, *where, expect=2)

    assert f"did you mean {texts}/a.txt?" in tokenize(texts / "aa.txt")
    assert "did you mean python-stdlib?" in tokenize("python-stdlb")
    assert "names no file" in tokenize(f"{texts}/*.nothing")
    assert "no tokenizer at" in tokenize(texts, "gpt2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    assert "no usable document (1 empty file" in tokenize(tmp_path / "empty")
    train = ["train-tokenizer", "--input", texts, "--output", tmp_path / "out", "--vocab-size"]
    assert "257" in run_data_prep(*train, 200, expect=2)
    assert "--vocab-size 9000" in run_data_prep(*train, 9000, "--kind", "sentencepiece", expect=2)
    assert not (tmp_path / "out").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_a_damaged_tokenizer_that_loses_text_is_refused(texts: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({"<|endoftext|>": 0, "I": 1, "t": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    where = ["--output", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json"]
    assert "does not give back" in run_data_prep("tokenize", "--input", texts, *where, expect=2)


def test_a_file_size_limit_and_a_read_only_place_end_cleanly(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("\n".join(str(number**5) for number in range(40_000)))
    where = ["--output", tmp_path / "out", "--tokenizer", bpe]
    output = run_data_prep(
        "tokenize", "--input", tmp_path / "big.txt", *where, expect=2, limit_kib=300
    )
    assert "no space to write" in output
    assert [entry.name for entry in tmp_path.iterdir()] == ["big.txt"]
    where[1] = Path("/proc/nothing")
    assert "/proc/nothing" in run_data_prep(
        "tokenize", "--input", tmp_path / "big.txt", *where, expect=2
    )


def _minds_interrupts() -> None:
    """A shell lets what it starts in the background ignore them, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_goes_on_after_an_interrupt_and_a_kill(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("\n".join(str(number**5) for number in range(150_000)))
    command = ["tokenize", "--input", tmp_path / "big.txt", "--output", tmp_path / "out"]
    command += ["--backend", "tokenizers"]  # slow enough to be met twice
    command += ["--tokenizer", bpe, "--documents", "line", "--shard-size", "100KB"]
    done = tmp_path / ".out.unfinished/.done"
    for number, workers in ((signal.SIGKILL, 2), (signal.SIGINT, 1)):
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep", *map(str, command), "--workers", str(workers)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=_minds_interrupts,
        )  # fmt: skip
        before = len(list(done.glob("*.json")))
        while len(list(done.glob("*.json"))) == before:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # met at work, and kept there
        if not before:  # two processes on one output
            assert "another process is writing" in run_data_prep(*command, expect=2)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        output = process.communicate(timeout=90)[0]
        assert process.returncode != 0
        assert "Traceback" not in output
        assert not (tmp_path / "out").exists()
    refused = run_data_prep(*command[:-1], "200KB", expect=2)
    assert "options.shard_bytes: 100000 before, now 200000" in refused
    assert "shards are done, going on" in run_data_prep(*command)
    command[4] = tmp_path / "whole"
    run_data_prep(*command, "--workers", "1")
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big.txt", "out", "whole"]
