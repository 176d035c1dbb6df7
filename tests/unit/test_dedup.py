"""Duplicates: hashes against plain definitions, the search, and precision and recall as planted."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data_prep.dedup.evaluation_index import EvaluationIndex
from data_prep.dedup.join import EXACT, KEPT, NEAR, find_duplicates
from data_prep.dedup.minhash import (
    band_keys,
    choose_bands,
    estimate_jaccard,
    make_signatures,
    shorten,
)
from data_prep.dedup.self_test import self_test
from data_prep.dedup.signatures import DedupOptions, NearOptions, Signatures, Signer
from data_prep.dedup.word_hashes import hash_words, ngrams_of_texts
from data_prep.records import Document, ShardWriter
from megascale.errors import UserError

WIDE = "\u3000-\u303f\u3040-\ud7ff\U00010000-\U0010ffff"
_WORD = re.compile(
    rf"[{WIDE}][a-z0-9\x80-\u1fff\u2040-\u2fff\ue000-\uffff]*|"
    r"[a-z0-9\x80-\u1fff\u2040-\u2fff\ue000-\uffff]+",
)


def _words(text: str) -> list[str]:
    """The definition of a word, in another way than by bytes."""
    text = re.sub("[\u00a0\u2000-\u203f\u3000-\u3002]", " ", text)
    text = "".join(c.lower() if c.isascii() else c for c in text)
    return _WORD.findall(text)


def _grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = _words(text)
    if 0 < len(words) < size:
        return {tuple(words)}
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Pieces of real text, and hostile ones."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in ("argparse.py", "socket.py", "pydoc_data/topics.py"):
        content = (folder / name).read_text("utf-8")
        found += [content[at : at + 1500] for at in range(0, 60_000, 1500)]
    hostile = [
        "",
        " ",
        "?!",
        "a",
        "Größe naïve\u00a0CAFÉ",
        "東京、大阪。abc def東",
        "x\u2014y\u3000z 🎉a🎉",
    ]
    return found + hostile


def test_words_and_ngrams_equal_their_definition(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    words = hash_words(encoded)
    by_word: dict[str, int] = {}
    for number, text in enumerate(texts):
        begin, stop = words.bounds[number : number + 2]
        expected = _words(text)
        assert stop - begin == len(expected), text
        for word, at in zip(expected, range(begin, stop), strict=True):
            assert by_word.setdefault(word, int(words.hashes[at])) == words.hashes[at]
            first = words.begins[at] - words.text_begins[number]
            last = words.ends[at] - words.text_begins[number]
            assert encoded[number][first:last].decode().lower() == word.lower()
    assert len(set(by_word.values())) == len(by_word)
    hashes, owners = ngrams_of_texts(words, 5)
    for number, text in enumerate(texts):
        assert len(set(hashes[owners == number].tolist())) == len(_grams(text, 5))


def test_batches_do_not_change_signatures(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    whole = make_signatures(encoded, 5, 64)
    parts = np.concatenate(
        [make_signatures(encoded[i : i + 7], 5, 64) for i in range(0, len(encoded), 7)]
    )
    assert np.array_equal(whole, parts)
    bands = choose_bands(0.8, 64)
    assert np.array_equal(band_keys(whole, bands)[3], band_keys(whole[3:4], bands)[0])
    assert not band_keys(whole, bands)[texts.index("?!")].any()  # no words, no neighbours


def test_estimates_are_unbiased_for_long_and_short_texts() -> None:
    chance = random.Random(5)
    for length in (30, 400):
        errors = []
        for _ in range(60):
            words = [f"w{chance.randrange(10**6)}" for _ in range(length)]
            other = [w if chance.random() < 0.97 else w + "x" for w in words]
            one, two = " ".join(words), " ".join(other)
            a, b = _grams(one, 5), _grams(two, 5)
            signatures = shorten(make_signatures([one.encode(), two.encode()], 5, 256))
            estimate = estimate_jaccard(signatures[:1], signatures[1:])[0]
            errors.append(estimate - len(a & b) / len(a | b))
        assert abs(np.mean(errors)) < 0.02, length
        assert np.std(errors) < 0.05, length


def test_bands_reach_the_stated_probability() -> None:
    for threshold in (0.5, 0.8, 0.9):
        bands = choose_bands(threshold, 128)
        assert bands.count * bands.rows <= 128
        assert bands.probability(threshold) >= 0.98
        more = choose_bands(threshold, 128).rows + 1
        assert 1 - (1 - threshold**more) ** (128 // more) < 0.98


def _sign(texts: list[str], options: DedupOptions) -> Signatures:
    return Signer(options).sign(Document(text, str(n), "s") for n, text in enumerate(texts))


def test_the_first_of_each_group_stays_however_it_is_cut(texts: list[str]) -> None:
    chance = random.Random(1)
    originals = [text for text in dict.fromkeys(texts) if len(text.split()) > 50][:60]
    near = [" ".join([*text.split(), "and", "more"]) for text in originals[::3]]
    corpus = originals + originals[::2] + near
    order = list(range(len(corpus)))
    chance.shuffle(order)
    corpus = [corpus[i] for i in order]
    options = DedupOptions(lines=True)
    whole = find_duplicates([_sign(corpus, options)], options)
    parts = [_sign(corpus[i : i + 17], options) for i in range(0, len(corpus), 17)]
    for memory in (1 << 30, 2000):
        cut = find_duplicates(parts, options, memory)
        assert np.array_equal(cut.fates, whole.fates)
        assert np.array_equal(np.concatenate(cut.lines), whole.lines[0])
    seen: set[str] = set()
    for text, fate in zip(corpus, whole.fates, strict=True):
        assert bool(fate == EXACT) is (text in seen)
        seen.add(text)
    assert (whole.fates == KEPT).sum() == len(originals)
    assert (whole.fates == NEAR).any()


def test_lines_keep_their_first_occurrence_in_a_document_that_stays() -> None:
    line = "this is a line that is long enough to count"
    options = DedupOptions(near=None, lines=True, min_line_characters=20)
    texts = [f"one\n{line}\nshort", f"one\n{line}\nshort", f"  {line}\ntwo", "short\nshort"]
    found = find_duplicates([_sign(texts[:2], options), _sign(texts[2:], options)], options)
    assert found.fates.tolist() == [KEPT, EXACT, KEPT, KEPT]
    assert [part.tolist() for part in found.lines] == [[False, False], [True]]


def test_planted_duplicates_are_found(tmp_path: Path) -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(folder.glob("*.py"))[:120]:
        text = path.read_text("utf-8")
        documents += [text[at : at + 3000] for at in range(0, min(len(text), 30_000), 3000)]
    with ShardWriter(tmp_path / "shard_00000.jsonl.zst") as writer:
        for number, text in enumerate(documents):
            writer.write(Document(text, str(number), "s"))
    result = self_test(tmp_path, ["shard_00000"], DedupOptions())
    assert result["planted_duplicates"] > 200
    assert result["planted_decoys"] > 200
    assert result["precision"] >= 0.95, result
    assert result["recall"] >= 0.95, result
    exact = self_test(tmp_path, ["shard_00000"], DedupOptions(near=None))
    assert (exact["precision"], exact["recall"]) == (1.0, 1.0)


def test_options_that_cannot_work_are_refused() -> None:
    for wrong in ({"threshold": 0.0}, {"bins": 100}, {"ngram": 0}):
        with pytest.raises(UserError, match="near duplicates"):
            NearOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="switched off"):
        DedupOptions(exact=False, near=None)


def test_evaluation_ngrams_are_found_where_they_are() -> None:
    example = "The quick brown fox jumps over the lazy dog and then it sleeps all day"
    short = "one two three four five six seven eight"
    index = EvaluationIndex.build([("a", [example, "too short"]), ("b", [short])], 13, 8)
    assert (index.examples, index.too_short) == ((2, 1), (1, 0))
    text = f"Before. THE quick, brown fox — jumps over the lazy dog; and then it sleeps! {short} x"
    batch = ["nothing here at all", text, "the quick brown fox jumps over the lazy dog and"]
    (hit,) = index.search([item.encode() for item in batch])
    assert hit.text == 1
    content = text.encode()
    found = [content[begin:end].decode() for begin, end in hit.spans.tolist()]
    assert found[0] == text[len("Before. ") : text.index("!")]
    assert found[-1] == short
    sets, examples = index.sets_and_examples(hit.entries)
    assert set(zip(sets.tolist(), examples.tolist(), strict=True)) == {(0, 0), (1, 0)}
    # an n-gram that reaches over the end of a document is none
    halves = [" ".join(example.split()[:8]), " ".join(example.split()[8:])]
    assert list(index.search([half.encode() for half in halves])) == []
