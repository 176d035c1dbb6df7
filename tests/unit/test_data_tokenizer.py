"""Tokenizers of every kind: ids, bytes, fingerprints, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.data.tokenizer_backends import canonical_json
from megascale.errors import UserError

TEXTS = [
    "def main():\n    return 1 + 2\n",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Größe, naïve, 東京, привет, שלום",
    "tabs\tand\r\nnewlines\n\n\n   and spaces   ",
]
HOSTILE = [
    *TEXTS,
    "",
    " ",
    "\x00\x01\x7f\ufeff",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202eright to left\u202c \u00a0\u2003",
    "\U0010ffff\ud7ff\ue000\ufffd",
    "<|endoftext|> </s> <s> <unk> <0x41>",
    "ⅷ ½ ﬁ Ǆ ａ 가",
    "x" * 3000,
    "Z̴̡͇̀͐a̷̛̗l̶̰̈́g̵̱̈o̶͖͂",
]


def _train_bpe(folder: Path) -> Path:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def _train_sentencepiece(folder: Path, model_type: str) -> Path:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS * 8).splitlines()),
        model_writer=model,
        vocab_size=330,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"bpe": _train_bpe(root / "bpe")}
    for model_type in ("bpe", "unigram"):
        name = f"sentencepiece-{model_type}"
        made[name] = _train_sentencepiece(root / name, model_type)
    return made


KINDS = ["bpe", "sentencepiece-bpe", "sentencepiece-unigram"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(folders[request.param])


def test_hostile_texts_come_back_and_their_bytes_add_up(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    for text in HOSTILE:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(lengths[ids].sum()) == len(text.encode())
    assert lengths[tokenizer.eod_id] == 0


def test_a_batch_is_its_texts_and_control_tokens_never_come_from_text(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(HOSTILE)
    assert batch == [tokenizer.encode(text) for text in HOSTILE]
    assert all(tokenizer.eod_id not in ids for ids in batch)
    assert all(0 <= number < tokenizer.vocab_size for ids in batch for number in ids)


def test_words_begin_with_white_space(tokenizer: Tokenizer) -> None:
    """Byte-level BPE and sentencepiece: what is not special and decodes to a leading space."""
    starts = tokenizer.word_starts()
    assert starts.shape == (tokenizer.vocab_size,)
    for text in ("return the main thing", "Hello again, again and again"):
        ids = tokenizer.encode(text)
        begins = [
            text[: len(tokenizer.decode(ids[:i]))] for i in range(1, len(ids)) if starts[ids[i]]
        ]
        words = text.split(" ")
        assert begins == [" ".join(words[:n]) for n in range(1, len(words))]


def test_fingerprint_survives_saving_and_tells_tokenizers_apart(
    tokenizer: Tokenizer, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eod_id == tokenizer.eod_id
    assert again.encode_batch(HOSTILE) == tokenizer.encode_batch(HOSTILE)
    assert len({load_tokenizer(folder).fingerprint for folder in folders.values()}) == 3


def test_files_load_as_their_folders_do(folders: dict[str, Path]) -> None:
    for kind, name in (("bpe", "tokenizer.json"), ("sentencepiece-bpe", "tokenizer.model")):
        single = load_tokenizer(folders[kind] / name)
        assert single.fingerprint == load_tokenizer(folders[kind]).fingerprint


def test_truncation_and_padding_of_the_file_are_ignored(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folders["bpe"] / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    cut, whole = load_tokenizer(tmp_path), load_tokenizer(folders["bpe"])
    assert cut.encode_batch(TEXTS) == whole.encode_batch(TEXTS)
    assert cut.fingerprint == whole.fingerprint


def test_a_hugging_face_folder_gives_transformers_ids(tmp_path: Path) -> None:
    """A GPT-2 style folder without tokenizer.json: only transformers knows how to read it."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "he", "Ġt", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nh e\nĠ t\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert int(ours.byte_lengths()[ours.encode(text)].sum()) == len(text.encode())
    assert (ours.vocab_size, ours.eod_id) == (len(theirs), theirs.eos_token_id) == (260, 259)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


def test_declared_eos_is_used_and_its_absence_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"a": 0, "<fin>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-document token"):
        _ = load_tokenizer(tmp_path).eod_id
    config = {"eos_token": {"content": "<fin>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eod_id == 1


def test_added_tokens_count_in_the_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(folders["bpe"] / "tokenizer.json"))
    before = backend.get_vocab_size()
    backend.add_tokens([AddedToken("東京", normalized=False)])
    backend.add_special_tokens(["<pad>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == before + 2
    assert tokenizer.byte_lengths()[before:].tolist() == [6, 0]
    assert before in tokenizer.encode("in 東京 now")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mytokens").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*mytokens"):
        load_tokenizer(tmp_path / "mytoken")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "mytokens")
    for name in ("tokenizer.json", "broken.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="cannot be read as a tokenizer"):
            load_tokenizer(tmp_path / name)


def test_transformers_and_torch_are_not_imported_for_a_tokenizer_json(
    folders: dict[str, Path],
) -> None:
    code = (
        "import sys; from megascale.data.tokenizer import load_tokenizer;"
        f"load_tokenizer({str(folders['bpe'])!r}).encode('a');"
        "print([n for n in ('torch', 'transformers', 'sentencepiece') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


_WORDS = st.text(max_size=8)
_FLAT = st.one_of(
    st.dictionaries(_WORDS, st.integers(-(2**53), 2**53)),
    st.lists(_WORDS),
    st.lists(st.lists(_WORDS)),
    st.lists(st.tuples(_WORDS, st.floats(allow_nan=False, allow_infinity=False)).map(list)),
)
_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(-1, 1), _WORDS, _FLAT
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_WORDS, inner, max_size=4)
    ),
    max_leaves=8,
)


@given(_JSON)
def test_canonical_json_is_what_json_writes(value: object) -> None:
    """Fingerprints of datasets that exist were made with json."""
    wanted = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()

    assert canonical_json(orjson.loads(orjson.dumps(value))) == wanted
