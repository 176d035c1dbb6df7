"""Back ends give the ids of the reference, or the run ends; long texts in pieces change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

import data_prep.encoders as encoder_module
from data_prep.encoder_checks import EncoderCheck, checked_encoder, hostile_strings
from data_prep.encoders import (
    Backend,
    Encoder,
    ReferenceEncoder,
    TiktokenEncoder,
    automatic_encoders,
    backend_of,
    cut_between_words,
    make_encoder,
)
from data_prep.tiktoken_plan import tiktoken_plan
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.data.tokenizer_backends import FastTokenizer
from megascale.errors import UserError

TEXT = ["It was a bright cold day in April, and the clocks weren't striking thirteen.\n" * 3]
# cl100k's, as GPT-4 and Llama 3 have it; not GPT-2's
OWN_SPLIT = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(kind: str = "gpt2") -> FastTokenizer:
    backend = Fast(models.BPE())
    backend.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(OWN_SPLIT), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXT, *hostile_strings()[:300]], trainer)
    return FastTokenizer(backend, "<|endoftext|>")


@pytest.fixture(scope="module")
def gpt2() -> FastTokenizer:
    return train()


@pytest.mark.parametrize("kind", ["gpt2", "own"])
@pytest.mark.parametrize("backend", [Backend.TIKTOKEN, Backend.FASTOKENS])
def test_fast_back_ends_are_exact_on_hostile_text(kind: str, backend: Backend) -> None:
    tokenizer = train(kind)
    encoder = make_encoder(tokenizer, backend)
    EncoderCheck(encoder, tokenizer, "seed").hostile()
    wanted, lengths = ReferenceEncoder(tokenizer).encode(TEXT)
    found, found_lengths = encoder.encode(TEXT)
    assert found.tolist() == wanted.tolist() == tokenizer.encode(TEXT[0])
    assert found_lengths.tolist() == lengths.tolist() == [len(found)]
    empty, none = encoder.encode(["", ""])
    assert (len(empty), none.tolist()) == (0, [0, 0])


@pytest.fixture(scope="module")
def encoders(gpt2: FastTokenizer) -> list[Encoder]:
    return [make_encoder(gpt2, backend) for backend in (Backend.TIKTOKEN, Backend.FASTOKENS)]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_any_text_gives_the_reference_ids(
    gpt2: FastTokenizer, encoders: list[Encoder], texts: list[str]
) -> None:
    wanted, lengths = ReferenceEncoder(gpt2).encode(texts)
    for encoder in encoders:
        found, found_lengths = encoder.encode(texts)
        assert found.tolist() == wanted.tolist()
        assert found_lengths.tolist() == lengths.tolist()


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from(["ab", " ", "cd", "\n", "1", "'s", "é", "  ", "x y"])).map(
        "".join
    ),
    longest=st.integers(1, 20),
)
def test_cuts_between_words_change_no_id(gpt2: FastTokenizer, text: str, longest: int) -> None:
    pieces = list(cut_between_words(text, longest))
    assert "".join(pieces) == text
    joined = [token for piece in pieces for token in gpt2.encode(piece)]
    assert joined == gpt2.encode(text)


def test_a_text_of_long_runs_is_encoded_by_all(gpt2: FastTokenizer) -> None:
    own = train("own")  # its expression needs a stack as deep as a run is long
    for tokenizer, text in ((gpt2, "a" * 100_000), (own, " " * 300_000 + "x")):
        found, _ = make_encoder(tokenizer, Backend.TIKTOKEN).encode([text])
        assert found.tolist() == tokenizer.encode(text)


class _Wrong:
    """Gives another id for texts that hold "dä", and for one of the hostile strings."""

    name = "wrong"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self._encoder.encode(texts)
        ids = ids.copy()
        for text, end in zip(texts, np.cumsum(lengths).tolist(), strict=True):
            if "dä" in text or text == "é":
                ids[end - 1] += 1
        return ids, lengths


def test_a_difference_ends_the_run(gpt2: FastTokenizer) -> None:
    encoder = _Wrong(make_encoder(gpt2, Backend.TIKTOKEN))
    texts = ["fine", "dä"] * 600
    check, encoded = EncoderCheck(encoder, gpt2, "seed"), encoder.encode(texts)
    with pytest.raises(UserError, match=r"wrong encodes 'd\\xe4' in another way from token 2") as e:
        check.sample(texts, *encoded)
    assert "--backend tokenizers" in str(e.value)
    EncoderCheck(encoder, gpt2, "seed").sample(texts[:1], *encoder.encode(texts[:1]))


def test_the_sample_is_seeded_and_reaches_everywhere(gpt2: FastTokenizer) -> None:
    asked: list[str] = []

    class Spy(_Wrong):
        def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            asked.extend(texts)
            return super().encode(texts)

    long = "word " * 20_000
    texts = [f"text {i}" for i in range(8000)] + [long]
    encoder = Spy(make_encoder(gpt2, Backend.TIKTOKEN))
    everything = encoder.encode(texts)
    asked.clear()
    check = EncoderCheck(encoder, gpt2, "seed")
    check._reference = encoder  # type: ignore[assignment]
    check.sample(texts, *everything)
    first = list(asked)
    assert "text 0" in first
    assert 3 < len(first) < 25
    assert max(len(text) for text in first) <= 4_096


def test_auto_chooses_what_fits(gpt2: FastTokenizer, tmp_path: Path) -> None:
    assert [e.name for e in automatic_encoders(gpt2)] == ["fastokens", "tiktoken", "tokenizers"]
    wordpiece = FastTokenizer(Fast(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), None)
    assert make_encoder(wordpiece, Backend.AUTO).name == "tokenizers"
    with pytest.raises(UserError, match="the model is WordPiece, not BPE"):
        make_encoder(wordpiece, Backend.TIKTOKEN)
    with pytest.raises(UserError, match="--backend sentencepiece with a tokenizer of tokenizers"):
        make_encoder(gpt2, Backend.SENTENCEPIECE)
    model = _sentencepiece(tmp_path)
    assert make_encoder(model, Backend.AUTO).name == "sentencepiece"
    assert make_encoder(model, Backend.SENTENCEPIECE).encode(["day"])[0].tolist() == model.encode(
        "day"
    )
    for backend in (Backend.TIKTOKEN, Backend.FASTOKENS, Backend.TOKENIZERS):
        with pytest.raises(UserError, match=f"--backend {backend.value} with a tokenizer of"):
            make_encoder(model, backend)


def test_auto_leaves_out_what_is_not_there_or_differs(
    gpt2: FastTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked_encoder(gpt2, Backend.AUTO).name == "fastokens"
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(
        encoder_module._FAST, Backend.FASTOKENS, lambda t: _Wrong(TiktokenEncoder(t))
    )
    chosen = checked_encoder(gpt2, Backend.AUTO)
    assert chosen.name == "tiktoken"
    assert backend_of(chosen) is Backend.TIKTOKEN
    assert "wrong is not used" in capsys.readouterr().err
    with pytest.raises(UserError, match="wrong encodes"):
        checked_encoder(gpt2, Backend.FASTOKENS)
    monkeypatch.setattr(encoder_module, "is_installed", lambda name: name != "fastokens")
    assert make_encoder(gpt2, Backend.AUTO).name == "tiktoken"


def _sentencepiece(folder: Path) -> Tokenizer:
    (folder / "t.txt").write_text(TEXT[0])
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "t.txt"), model_prefix=str(folder / "m"), vocab_size=30, minloglevel=2
    )
    return load_tokenizer(folder / "m.model")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalises"),
        ({"pre_tokenizer": None}, "one regular expression"),
        ({"added_tokens": [{"special": False}]}, "text tokens"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"merges": "twice"}}, "same token"),
        ({"model": {"merges": [["東", "t"]]}}, "not in the vocabulary"),
    ],
)
def test_tokenizers_that_tiktoken_cannot_run(gpt2: FastTokenizer, change: dict, why: str) -> None:
    definition = json.loads(json.dumps(gpt2.definition))
    for name, value in change.items():
        if value == {"merges": "twice"}:
            definition["model"]["merges"] *= 2
        elif name == "model":
            definition["model"].update(value)
        else:
            definition[name] = value
    with pytest.raises(UserError, match=why):
        tiktoken_plan(definition)


def test_ids_need_not_follow_the_merges(gpt2: FastTokenizer) -> None:
    definition = json.loads(json.dumps(gpt2.definition))
    vocabulary = definition["model"]["vocab"]
    size = len(vocabulary)
    definition["model"]["vocab"] = {token: size - 1 - i for token, i in vocabulary.items()}
    for token in definition["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    tokenizer = FastTokenizer(Fast.from_str(json.dumps(definition)), None)
    found, _ = make_encoder(tokenizer, Backend.TIKTOKEN).encode(TEXT)
    assert found.tolist() == tokenizer.encode(TEXT[0])
    assert found.tolist() == [size - 1 - i for i in gpt2.encode(TEXT[0])]
