"""Rules of cleaning: each limit from both sides, against definitions written out word by word."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import get_type_hints

import pytest

from data_prep.clean.augment import Augment
from data_prep.clean.c4 import C4
from data_prep.clean.contents import Length, Symbols, WordList
from data_prep.clean.gopher import GopherQuality, GopherRepetition
from data_prep.clean.language import Language
from data_prep.clean.normalize import Normalize, Repair
from data_prep.clean.registry import RULES, default_rules
from data_prep.clean.rule import Filter, TextView
from data_prep.clean.scrub import Scrub
from data_prep.clean.step import Cleaner
from data_prep.commands.documents import clean_command
from data_prep.records import Document
from megascale.errors import UserError

PROSE = (
    "The committee met in the old hall on Tuesday morning and heard three reports about the "
    "harbour. Each of them had been written by people who have worked there for many years, and "
    "each came to a different end. The first speaker said that the walls would stand for another "
    "century with a little care. The second was not so sure, because the stones of the northern "
    "side were already moving. The third did not speak of stones at all, but of money."
)


def _reason(rule: Filter, text: str) -> str:
    return rule.reason(TextView(text))


def test_every_rule_keeps_prose_and_names_itself() -> None:
    told = get_type_hints(clean_command, include_extras=True)["rules"].__metadata__[0].help
    for name, kind in RULES.items():
        assert kind.name == name
        assert re.search(rf"There are .*\b{name}\b.* Without", told)  # --help
    cleaner = Cleaner((*default_rules(), C4(), Symbols(), Length(min_characters=200)))
    kept, rejected = cleaner.clean(Document(PROSE, "a", "s"))
    assert (kept.text, rejected) == (PROSE, "")
    assert cleaner.sources == {"s": {"documents": 1, "kept": 1, "rejected": {}, "changed": {}}}


def test_repair_touches_broken_lines_only() -> None:
    good = "Größe, naïve café — “quoted” … 東京\n"
    broken = "The price was Â£5 and the cafÃ© was closed."
    outcome = Repair().apply(TextView(good + broken))
    assert outcome.text == good + "The price was £5 and the café was closed."
    assert outcome.counts == {"characters_in_mended_lines": len(broken)}
    assert Repair().apply(TextView(good)).text == good


def test_normalize() -> None:
    text = "\ufeffa\x00b\r\ncafe\u0301 \u00a0x  \rnext\u200b  y\n\n\n\n\n\nend\t\n"
    outcome = Normalize().apply(TextView(text))
    assert outcome.text == "ab\ncafé  x\nnext  y\n\n\nend"
    assert outcome.counts["control_characters"] == 3
    assert outcome.counts["documents_not_nfc"] == 1
    again = Normalize().apply(TextView(outcome.text))
    assert (again.text, again.counts) == (outcome.text, {})
    assert Normalize(collapse_spaces=True).apply(TextView("  a   b")).text == "  a b"
    accent = Normalize().apply(TextView("cafe\u200b\u0301"))  # NFC after the space between is gone
    assert accent.text == "caf\u00e9"
    code = "def f(x):\n\tif x:\n\t    return 1\n\u200dक्\u200dष"  # indentation and joiners stay
    assert Normalize().apply(TextView(code)).text == code


def test_language() -> None:
    german = "Der Ausschuss trat am Dienstag zusammen und hörte drei Berichte über den Hafen an."
    assert _reason(Language(), PROSE) == ""
    assert _reason(Language(), german) == "other"
    assert _reason(Language(keep=("de", "en")), german) == ""
    assert _reason(Language(min_score=1.0), PROSE + " x1 qq zz") in ("", "unsure")
    assert _reason(Language(), "0x1f 0x2e [] () == != 77") in ("other", "unsure")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the and " * 24 + "the", "words"),
        ("the and " * 25, ""),
        ("the of a an " * 12 + "i b " * 20, "word_length"),
        ("the and supercalifragilisticexpialidocious " * 30, "word_length"),
        ("the #and word " * 30, "symbols"),
        ("the and... wording " * 30, "symbols"),
        ("\n".join(["- the word and more"] * 20), "bullets"),
        ("\n".join(["the word and more"] * 16 + ["the word and more..."] * 9), "ellipses"),
        ("the and 1234 5678 " * 30, "letters"),
        ("word other thing " * 30, "stop_words"),
        ("word other the " * 30, "stop_words"),
    ],
)
def test_gopher_quality(text: str, reason: str) -> None:
    assert _reason(GopherQuality(), text) == reason


def _top(words: list[str], size: int) -> float:
    grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    most = max(grams.values())
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in grams.items() if count == most)
    return most * longest / sum(map(len, words))


def _repeated(words: list[str], size: int) -> float:
    seen, covered = set(), set()
    for i in range(len(words) - size + 1):
        gram = tuple(words[i : i + size])
        if gram in seen:
            covered |= set(range(i, i + size))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


def test_gopher_ngrams_equal_their_definition() -> None:
    chance = random.Random(3)
    for _ in range(30):
        words = chance.choices(["a", "bcd", "ef", "ghijk", "lm"], k=chance.randint(12, 60))
        view = TextView(" ".join(words))
        for size, kind, exact in [(2, "top", _top), (4, "top", _top), (5, "rep", _repeated)]:
            value = exact(words, size)
            for limit, expected in ((value, ""), (value - 1e-9, "x")):
                if limit < 0:
                    continue
                top, repeated = ({size: limit}, {}) if kind == "top" else ({}, {size: limit})
                rule = GopherRepetition(
                    max_line_fraction=1,
                    max_paragraph_fraction=1,
                    max_line_characters=1,
                    max_paragraph_characters=1,
                    max_top_ngram=top,
                    max_repeated_ngrams=repeated,
                )
                assert bool(rule.reason(view)) is bool(expected), (words, size, kind, value)


def test_gopher_repeated_lines_and_paragraphs() -> None:
    lines = [f"line {n} of some length here" for n in range(7)]
    rule = GopherRepetition(max_top_ngram={}, max_repeated_ngrams={}, max_line_characters=1)
    assert _reason(rule, "\n".join([*lines, lines[0], lines[1], lines[2]])) == ""
    assert _reason(rule, "\n".join([*lines, *lines[:4]])) == "repeated_lines"
    only = GopherRepetition(max_top_ngram={}, max_repeated_ngrams={}, max_line_fraction=1)
    assert _reason(only, "\n".join([*lines, *lines[:4]])) == "characters_in_repeated_lines"
    rest = GopherRepetition(
        max_top_ngram={}, max_repeated_ngrams={}, max_line_fraction=1, max_line_characters=1
    )
    assert _reason(rest, "\n\n".join([*lines, *lines[:4]])) == "repeated_paragraphs"


def test_c4() -> None:
    rule = C4()
    text = "A first sentence of five words.\nMenu Home About\nShort one.\n" + (
        "Please enable Javascript to see this page now.\nWe show one more line of text [3].\n"
        'She said that this was "enough for all"\nThis site uses cookies and other such things.'
    )
    outcome = rule.apply(TextView(text))
    assert outcome.text == (
        "A first sentence of five words.\nWe show one more line of text .\n"
        'She said that this was "enough for all"'
    )
    assert outcome.rejected == "sentences"  # two of them: a quote without a stop ends none
    assert outcome.counts == {
        "citations": 1,
        "lines_without_terminal_punctuation": 1,
        "lines_too_short": 1,
        "lines_with_javascript": 1,
        "lines_of_policy": 1,
    }
    assert rule.apply(TextView("if (a) { b }")).rejected == "curly_bracket"
    assert rule.apply(TextView("Lorem Ipsum dolor.")).rejected == "lorem_ipsum"
    assert rule.apply(TextView("One two three four five. " * 3)).rejected == ""


def test_length_symbols_and_word_list(tmp_path: Path) -> None:
    assert _reason(Length(min_characters=3, max_characters=4), "ab") == "short"
    assert _reason(Length(min_characters=3, max_characters=4), "abcde") == "long"
    assert _reason(Symbols(max_fraction=0.5), "ab+-") == ""
    assert _reason(Symbols(max_fraction=0.5), "a +-") == ""
    assert _reason(Symbols(max_fraction=0.49), "a _-") == "fraction"
    (tmp_path / "words.txt").write_text("# comment\nBadword\nvery bad phrase  # two\n")
    rule = WordList(file=str(tmp_path / "words.txt"))
    assert _reason(rule, "a badWORD here") == "words"
    assert _reason(rule, "a badwords here") == ""
    assert _reason(rule, "a Very bad phrase.") == "words"
    assert _reason(WordList(file=rule.file, max_count=1), "badword, once") == ""
    with pytest.raises(UserError, match="cannot be read"):
        WordList(file=str(tmp_path / "none.txt")).check()


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("mail bob.x+1@mail.example.com, or <a@b.de>.", "mail <EMAIL>, or <<EMAIL>>."),
        ("@handle and x@y and a @ b.com stay", None),
        ("at 8.8.8.8. and at 1.1.1.1:53", "at <IP>. and at <IP>:53"),
        ("192.168.0.1, 10.1.2.3, 127.0.0.1, 300.1.1.1 and 1.2.3.4.5 stay", None),
        ("2606:4700:4700::1111!", "<IP>!"),
        ("2001:db8::1 dead::beef ::1 std::vector 20:30 stay", None),
        ("+49 30 1234567 or (415) 555-2671", "<PHONE> or <PHONE>"),
        ("1-800-555-1234; 415.555.2671", "<PHONE>; <PHONE>"),
        ("ISBN 978-0-306-40615-7, 2024-10-11, 1234567890, +1 5 stay", None),
        ("key AKIAIOSFODNN7EXAMPLE.", "key <KEY>."),
        (
            "ghp_" + "a1" * 18 + " and risk-free-thing-that-is-long stay",
            "<KEY> and risk-free-thing-that-is-long stay",
        ),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest",
            "<KEY>\nrest",
        ),
        ("-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY----- stays", None),
    ],
)
def test_scrub(text: str, scrubbed: str | None) -> None:
    outcome = Scrub().apply(TextView(text))
    assert outcome.text == (text if scrubbed is None else scrubbed)
    placeholders = sum(outcome.text.count(f"<{kind}>") for kind in ("EMAIL", "IP", "PHONE", "KEY"))
    assert sum(outcome.counts.values()) == placeholders
    off = Scrub(email=None, ip=None, phone=None, key=None)
    assert off.apply(TextView(text)).text == text


def test_augmented_copies_depend_on_seed_and_id_only(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text("old: ancient, aged\nmoney: cash\n")
    augment = Augment(copies=2, synonyms=str(tmp_path / "synonyms.txt"), synonym_rate=1.0)
    document = Document(PROSE, "d", "s")
    copies = list(augment.copies_of(document))
    assert [copy.id for copy in copies] == ["d#1", "d#2"]
    cash = PROSE.replace("money", "cash")
    possible = {cash.replace("old", word) for word in ("ancient", "aged")}
    assert {copy.text for copy in copies} <= possible
    noisy = Augment(copies=1, seed=1, swap_rate=0.1, drop_rate=0.1, typo_rate=0.1)
    (first,) = noisy.copies_of(document)
    assert [first] == list(noisy.copies_of(document))
    assert first.text != PROSE
    assert 0.6 < len(set(first.text.split()) & set(PROSE.split())) / len(set(PROSE.split())) < 1
    other = list(Augment(seed=2, drop_rate=0.1).copies_of(document))
    assert other[0].text != first.text
    with pytest.raises(UserError, match="neither synonyms nor noise"):
        Augment().check()


def test_a_rejected_document_meets_no_more_rules_and_keeps_its_count() -> None:
    cleaner = Cleaner((Scrub(), Length(min_characters=30), GopherQuality()))
    _, rejected = cleaner.clean(Document("mail a@b.de", "1", "s"))
    assert rejected == "length.short"
    cleaner.clean(Document(PROSE, "2", "t"))
    assert cleaner.sources["s"]["rejected"] == {"length.short": 1}
    assert cleaner.sources["s"]["changed"]["scrub"] == {
        "documents": 1,
        "characters": 1,
        "emails": 1,
    }
    assert cleaner.sources["t"]["kept"] == 1
    _, rejected = Cleaner((Normalize(),)).clean(Document("\x00\x01", "3", "s"))
    assert rejected == "normalize.nothing_left"
