"""`data_prep` for BERT: WordPiece, sentences, pieces, the manifest, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from data_prep.sentences import cut_pieces, split_sentences
from data_prep.sources import find_inputs
from megascale.data.corpus import TokenCorpus
from megascale.data.tokenizer import load_tokenizer
from tests.integration.runs import run_data_prep

TEXT = (
    "Dr. Smith looked at the unbelievable machines. They were undoing what he had done! Why, he "
    "asked, would machines reconsider? Nobody answered.\n"
)
OTHER = "The café costs 3.50 euros; naïve visitors pay. It rained all day long.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((TEXT + "\n" + OTHER + "\n") * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def tokenizer(request: pytest.FixtureRequest, text: Path) -> Path:
    output = text.parent / request.param
    options = ["--bert"] if request.param == "bpe" else []
    command = ["train-tokenizer", "--input", text, "--kind", request.param, "--vocab-size", 320]
    run_data_prep(*command, *options, "--output", output)
    assert "already done" in run_data_prep(*command, *options, "--output", output)
    return output


def test_wordpiece_training_is_deterministic(text: Path, tmp_path: Path) -> None:
    """tokenizers' own trainer is not: the ids of ## characters depend on a hash map's order."""
    prints = set()
    for number in range(4):
        output = run_data_prep(
            *("train-tokenizer", "--kind", "wordpiece", "--input", text, "--vocab-size", 300),
            *("--output", tmp_path / str(number)),
        )
        prints.add(output.rsplit(" ", 1)[1])
    assert len(prints) == 1


def test_transformers_loads_it_and_frames_pairs(tokenizer: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(tokenizer), load_tokenizer(tokenizer)
    tokens = ours.require_bert_tokens().ids
    assert tokens == {
        "cls": theirs.cls_token_id,
        "sep": theirs.sep_token_id,
        "mask": theirs.mask_token_id,
        "pad": theirs.pad_token_id,
    }
    first, second = "unbelievable machines", "nobody answered"
    framed = theirs(first, second)
    cls, sep = [tokens["cls"]], [tokens["sep"]]
    assert framed["input_ids"] == [*cls, *ours.encode(first), *sep, *ours.encode(second), *sep]
    assert framed["token_type_ids"][-1] == 1
    assert ours.encode("[MASK]") != [tokens["mask"]], "text is only text"


def test_words_begin_where_they_do(tokenizer: Path) -> None:
    ours = load_tokenizer(tokenizer)
    starts = ours.word_starts()
    ids = ours.encode("the believers machines")
    assert len(ids) > 3, "some word has several tokens"
    begins = [bool(starts[i]) for i in ids[1:]]
    assert sum(begins) == 2
    words = np.split(ids, np.flatnonzero(begins) + 1)
    assert [ours.decode(w.tolist()).strip().replace("##", "") for w in words] == [
        "the",
        "believers",
        "machines",
    ]


def test_a_sequence_is_a_sentence(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    command = ["tokenize", "--input", text, "--documents", "paragraph", "--tokenizer", tokenizer]
    output = run_data_prep(*command, "--bert", "--output", tmp_path / "set")
    assert "8 documents" in output
    corpus = TokenCorpus.open(tmp_path / "set", verify=True)
    ours = corpus.tokenizer
    assert ours is not None
    assert corpus.mode == "bert"
    assert corpus.eod_id is None
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["mode"] == "bert"
    assert manifest["recipe"]["sentences"] == "nupunkt"
    assert manifest["tokenizer"]["special_ids"] == ours.require_bert_tokens().ids
    starts = corpus.sequence_starts(0, corpus.num_tokens)
    assert len(starts) == 4 * (4 + 2)
    parts = np.split(corpus.read(0, corpus.num_tokens), starts[1:])
    expected = [s for _ in range(4) for t in (TEXT, OTHER) for s in split_sentences(t.strip())]
    assert [part.tolist() for part in parts] == ours.encode_batch(expected)
    assert "already prepared" in run_data_prep(*command, "--bert", "--output", tmp_path / "set")


def test_long_sentences_are_cut_and_nothing_is_lost(
    text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    command = ["tokenize", "--input", text, "--tokenizer", tokenizer, "--bert", "--output"]
    run_data_prep(*command, tmp_path / "whole")
    run_data_prep(*command, tmp_path / "cut", "--max-sentence-tokens", 7)
    whole, cut = (TokenCorpus.open(tmp_path / name) for name in ("whole", "cut"))
    assert np.array_equal(whole.read(0, whole.num_tokens), cut.read(0, cut.num_tokens))
    starts = cut.sequence_starts(0, cut.num_tokens)
    assert np.diff(starts, append=cut.num_tokens).max() <= 7
    assert set(whole.sequence_starts(0, whole.num_tokens)) < set(starts)


def test_pieces_are_cut_at_words() -> None:
    starts = np.array([True, False])  # id 0 begins a word
    tokens = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0])
    pieces = [piece.tolist() for piece in cut_pieces(tokens, starts, 4)]
    assert pieces == [[0, 1, 1], [0, 1], [0, 1, 1, 1], [1, 1, 0]]
    assert cut_pieces(tokens[:0], starts, 4) == []
    assert [len(p) for p in cut_pieces(tokens, starts, 1)] == [1] * 12


def test_prose_is_english_of_every_part_of_the_library() -> None:
    files = find_inputs(["python-stdlib-prose"])
    by_name = {file.name: file.text for file in files}
    assert sum(map(len, by_name.values())) > 1_500_000
    assert "json/__init__.py" in by_name
    assert "pydoc_data/topics.py:yield" in by_name
    assert "JSON (JavaScript Object Notation)" in by_name["json/__init__.py"]
    assert "import " not in by_name["json/decoder.py"], "docstrings only"


def test_what_does_not_fit_is_refused(text: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    run_data_prep("train-tokenizer", "--input", text, "--vocab-size", 270, "--output", plain)
    out = ["--output", tmp_path / "out"]
    tokenize = ["tokenize", "--input", text, *out, "--tokenizer"]
    assert "[CLS]" in run_data_prep(*tokenize, plain, "--bert", expect=2)
    assert "without --bert" in run_data_prep(*tokenize, plain, "--max-sentence-tokens", 9, expect=2)
    wordpiece = tmp_path / "wordpiece"
    train = ["train-tokenizer", "--input", text, "--vocab-size"]
    run_data_prep(*train, 300, "--kind", "wordpiece", "--output", wordpiece)
    refused = run_data_prep(*tokenize, wordpiece, expect=2)
    assert "no end-of-document token" in refused
    assert "tokenize with --bert" in refused
    assert "261" in run_data_prep(*train, 200, "--kind", "wordpiece", *out, expect=2)
    assert "--bert" in run_data_prep(
        *train, 300, "--kind", "sentencepiece", "--bert", *out, expect=2
    )
    assert not (tmp_path / "out").exists()
