"""merge, split, adopt, inspect, verify, repair, diff and stats on real, small datasets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.app import app
from data_prep.datasets.copying import DocumentRange, even_ranges, overlaps
from data_prep.datasets.diff import diff
from data_prep.datasets.merge import merge
from data_prep.datasets.repair import repair
from data_prep.datasets.split import REST, reshard_parts, split_parts, write_parts
from data_prep.datasets.verify import verify
from data_prep.documents import DocumentUnit
from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize
from data_prep.train_tokenizer import TrainTokenizerOptions, train_tokenizer
from megascale.data.corpus import TokenCorpus
from megascale.errors import UserError

LINE = "shall I compare thee to a summer day thou art more lovely and more temperate"
WORDS = LINE.split()


def text_of(seed: int, lines: int) -> str:
    chance = np.random.default_rng(seed)
    return "\n".join(" ".join(chance.choice(WORDS, chance.integers(2, 12))) for _ in range(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/, a/ (3 shards, 300 documents), b/ (1 shard, 40 documents)."""
    root = tmp_path_factory.mktemp("datasets")
    (root / "a.txt").write_text(text_of(1, 300))
    (root / "b.txt").write_text(text_of(2, 40))
    options = TrainTokenizerOptions(300, documents=DocumentUnit.LINE)
    train_tokenizer([str(root / "a.txt")], root / "tokenizer", options)
    size = (root / "a.txt").stat().st_size
    for name, shard_bytes in (("a", size // 3 + 1), ("b", None)):
        options_of = TokenizeOptions(DocumentUnit.LINE, shard_bytes=shard_bytes)
        run = RunOptions(workers=1)
        source = [str(root / f"{name}.txt")]
        tokenize(source, root / name, root / "tokenizer", options_of, run)
    return root


def stream(path: Path) -> list[int]:
    corpus = TokenCorpus.open(path)
    return corpus.read(0, corpus.num_tokens).tolist()


def run(*arguments: object, expect: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, UserError):
        assert expect == 2
        return str(done.exception)
    assert done.exit_code == expect, done.output
    return done.output


def test_merge_copies_nothing_and_reads_like_both(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    shutil.copytree(folder / "b", tmp_path / "b")
    assert "4 shards, 340 documents" in run(
        *("merge", "--input", tmp_path / "a", "--input", tmp_path / "b"),
        *("--output", tmp_path / "both"),
    )
    assert not list((tmp_path / "both").glob("*.bin"))
    assert stream(tmp_path / "both") == stream(folder / "a") + stream(folder / "b")
    assert not verify(tmp_path / "both", 1).problems
    content = json.loads((tmp_path / "both/manifest.json").read_text())
    assert content["version"] == 2
    assert {shard["folder"] for shard in content["shards"]} == {"../a", "../b"}
    # all of it can be moved, and merged again
    (tmp_path / "moved").mkdir()
    for name in ("a", "b", "both"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert len(stream(tmp_path / "moved/both")) == len(stream(folder / "a") + stream(folder / "b"))
    again = [tmp_path / "moved/both", folder / "b"]
    with pytest.raises(UserError, match="holds the same tokens"):
        merge([folder / "b", tmp_path / "moved/b"], tmp_path / "x")
    merge(again, tmp_path / "deep/er")
    assert stream(tmp_path / "deep/er")[-len(stream(folder / "b")) :] == stream(folder / "b")


def test_manifests_without_foreign_shards_stay_version_1(folder: Path) -> None:
    content = json.loads((folder / "a/manifest.json").read_text())
    assert content["version"] == 1
    assert "folder" not in content["shards"][0]


def test_split_loses_nothing_and_resharding_changes_no_token(folder: Path, tmp_path: Path) -> None:
    output = run("split", folder / "a", "--output", tmp_path / "s", "--fraction", 0.9,
                 "--fraction", 0.1, "--workers", 1)  # fmt: skip
    assert "train" in output
    whole = TokenCorpus.open(folder / "a")
    parts = [
        TokenCorpus.open(tmp_path / "s" / name, verify=True) for name in ("train", "validation")
    ]
    assert stream(tmp_path / "s/train") + stream(tmp_path / "s/validation") == stream(folder / "a")
    assert sum(part.utf8_bytes or 0 for part in parts) == whole.utf8_bytes
    assert abs(parts[1].num_tokens / whole.num_tokens - 0.1) < 0.02
    again = ["split", folder / "a", "--output", tmp_path / "s", "--fraction", 0.9]
    assert "already done" in run(*again, "--fraction", 0.1)
    assert "--overwrite" in run(*again[:-2], "--fraction", 0.5, "--fraction", 0.5, expect=2)
    write_parts(folder / "a", tmp_path / "d", split_parts(folder / "a", None, [REST, 30]), 1)
    assert TokenCorpus.open(tmp_path / "d/validation").num_documents == 30
    write_parts(folder / "a", tmp_path / "r", reshard_parts(folder / "a", 7), 2)
    resharded = TokenCorpus.open(tmp_path / "r", verify=True)
    assert len(resharded.token_files) == 7
    assert stream(tmp_path / "r") == stream(folder / "a")
    assert resharded.document_starts.tolist() == whole.document_starts.tolist()
    assert diff(folder / "a", tmp_path / "r")["same"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--documents", "rest", "--documents", "rest"], "together they are all"),
        (["--documents", "5", "--documents", "6"], "5, 6 of 300 documents"),
        (["--documents", "many"], "--documents many"),
        (["--shards", "301"], "--shards 301 of 300"),
        (["--fraction", "0.9"], "sums to 0.9"),
        ([], "exactly one"),
    ],
)
def test_splits_that_make_no_sense(folder: Path, options: list[str], said: str) -> None:
    assert said in run("split", folder / "a", "--output", folder / "no", *options, expect=2)


def test_inspect_and_stats(folder: Path, tmp_path: Path) -> None:
    found = json.loads(run("inspect", folder / "a", "--json"))
    assert (found["documents"], len(found["shards"]), found["mode"]) == (300, 3, "gpt")
    assert "shard_00002" in run("inspect", folder / "a")
    lines = (folder / "a.txt").read_text().split("\n")
    assert run("inspect", folder / "a", "--document", 299).startswith(lines[299])
    assert "0 to 299" in run("inspect", folder / "a", "--document", 300, expect=2)
    stats = json.loads(run("stats", folder / "a"))
    assert stats["document_tokens"]["quantiles"]["100"] == max(
        np.diff([*TokenCorpus.open(folder / "a").document_starts, found["tokens"]])
    )
    assert sum(count for _, count in stats["document_tokens"]["histogram"]) == 300
    assert stats["vocabulary"]["most_frequent"][0]["count"] >= 300
    run("stats", folder / "a", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    lengths, ranks = re.findall(r'<img alt="([^"]*)"', page)
    longest = [row for row in stats["document_tokens"]["histogram"] if row[1]][-1]
    assert lengths.endswith(f"from {longest[0]} tokens {longest[1]}.")
    assert f"rank 1 {stats['vocabulary']['most_frequent'][0]['count']:,}" in ranks
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import", page)


def test_diff_names_the_first_token(folder: Path, tmp_path: Path) -> None:
    text = (folder / "a.txt").read_text().replace("lovely", "lonely", 1)
    (tmp_path / "c.txt").write_text(text)
    options = TokenizeOptions(DocumentUnit.LINE)
    tokenize([str(tmp_path / "c.txt")], tmp_path / "c", folder / "tokenizer", options)
    found = json.loads(run("diff", folder / "a", tmp_path / "c", "--json", expect=1))
    document = next(i for i, line in enumerate(text.split("\n")) if "lonely" in line)
    assert found["first"]["document"] == document
    assert found["documents"] == {"in_both": 299, "only_first": 1, "only_second": 1}
    assert found["differences"]["shards"] == [3, 1]
    assert "lon" in found["first"]["second_text"]
    assert "same documents" in run("diff", folder / "a", folder / "a")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flip":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: int(len(content) * 0.6)])


@pytest.mark.parametrize(
    ("file", "how", "said"),
    [
        ("shard_00001.bin", "flip", "another xxh3"),
        ("shard_00001.idx", "flip", "another xxh3"),
        ("shard_00001.bin", "cut", "shard_00001.bin has"),
        ("shard_00000.idx", "gone", "is missing"),
        ("tokenizer/tokenizer.json", "cut", "tokenizer: "),
    ],
)
def test_verify_sees_every_damage(
    folder: Path, tmp_path: Path, file: str, how: str, said: str
) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    damage(tmp_path / "a" / file, how)
    workers = 2 if how == "gone" else 1
    assert said in run("verify", tmp_path / "a", "--workers", workers, expect=1)


def test_verify_looks_at_ids_and_text(folder: Path, tmp_path: Path) -> None:
    assert "tokenised again: 3 shards" in run("verify", folder / "a", "--deep", "--deep-shards", 3)
    shutil.copytree(folder / "a", tmp_path / "a")
    binary = tmp_path / "a/shard_00000.bin"
    ids = np.fromfile(binary, np.uint16)
    ids[5], ids[7] = 60_000, 0  # 0 is the end of a document
    ids.tofile(binary)
    problems = json.loads(run("verify", tmp_path / "a", "--json", "--workers", 1, expect=1))[
        "problems"
    ]
    assert any("id 60000 in a vocabulary of 300" in problem for problem in problems)
    assert any("id 0 stands 1 times inside documents" in problem for problem in problems)
    verdict = verify(tmp_path / "a", 1, deep_shards=1)
    assert not any("source gives other content" in problem for problem in verdict.problems)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    manifest["shards"][0]["bin_xxh3"] = "0" * 32
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    verdict = verify(tmp_path / "a", 1, deep_shards=1)
    assert any("source gives other content" in problem for problem in verdict.problems)


def test_repair_looks_again_after_it_was_refused(folder: Path, tmp_path: Path) -> None:
    """Whole at first, then changed, then cut: what it saw before does not count."""
    shutil.copytree(folder / "a", tmp_path / "a")
    arguments = ("repair", tmp_path / "a", "--output", tmp_path / "out", "--workers", 1)
    assert "every shard is whole" in run(*arguments, expect=2)
    damage(tmp_path / "a/shard_00002.bin", "flip")
    assert "lost of shard_00002 (the .bin was changed)" in run(*arguments)
    shutil.rmtree(tmp_path / "out")
    damage(tmp_path / "a/shard_00000.bin", "cut")
    assert "lost of shard_00000 (truncated: .bin)" in run(*arguments)


def test_repair_keeps_every_whole_document(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    damage(tmp_path / "a/shard_00000.bin", "cut")
    damage(tmp_path / "a/shard_00001.idx", "cut")
    damage(tmp_path / "a/shard_00002.bin", "flip")
    whole = TokenCorpus.open(folder / "a").token_files
    kept = (whole[0].num_tokens * 6 * 2 // 10) // 2
    ends = [*whole[0].document_starts()[1:].tolist(), whole[0].num_tokens]
    documents = sum(end <= kept for end in ends)
    output = run("repair", tmp_path / "a", "--output", tmp_path / "out", "--workers", 1)
    of_changed = f"{whole[2].num_documents} documents, {whole[2].num_tokens} tokens"
    assert f"lost of shard_00002 (the .bin was changed): {of_changed}" in output
    assert f"lost of shard_00000 (truncated: .bin): {len(ends) - documents} documents" in output
    assert "lost of shard_00001 (truncated: .idx): 0 documents, 0 tokens" in output
    assert not verify(tmp_path / "out", 1).problems
    expected = whole[0].tokens[: ends[documents - 1]].tolist() + whole[1].tokens.tolist()
    assert stream(tmp_path / "out") == expected
    with pytest.raises(UserError, match="every shard is whole"):
        repair(folder / "a", tmp_path / "none", 1)


def test_adopt_gives_foreign_files_a_manifest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"b/shard_00000.{suffix}", tmp_path / f"megatron/x.{suffix}")
    where = ["--tokenizer", folder / "tokenizer", "--output", tmp_path / "set"]
    run("adopt", "--input", tmp_path / "megatron/x", *where)
    corpus = TokenCorpus.open(tmp_path / "set", verify=True)
    original = TokenCorpus.open(folder / "b")
    assert (corpus.fingerprint, corpus.utf8_bytes) == (original.fingerprint, original.utf8_bytes)
    np.array([1, 299, 0, 300, 0], np.uint16).tofile(tmp_path / "megatron/x.bin")
    assert "is " in run("adopt", "--input", tmp_path / "megatron/x", *where, expect=2)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    cuts=st.tuples(st.integers(0, 120), st.integers(0, 120)),
)
def test_overlaps_are_the_documents_asked_for(counts: list[int], cuts: tuple[int, int]) -> None:
    total = sum(counts)
    start, stop = sorted(min(cut, total) for cut in cuts)
    begins = np.cumsum([0, *counts])
    found = [
        int(begins[number]) + document
        for number, first, last in overlaps(counts, DocumentRange(start, stop))
        for document in range(first, last)
    ]
    assert found == list(range(start, stop))


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40), data=st.data())
def test_even_ranges_cover_all_documents_once(lengths: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(lengths)))
    starts = np.cumsum([0, *lengths[:-1]])
    ranges = even_ranges(starts, sum(lengths), parts)
    assert len(ranges) == parts
    assert [item.start for item in ranges] == [0, *(item.stop for item in ranges[:-1])]
    assert ranges[-1].stop == len(lengths)
    assert all(item.start < item.stop for item in ranges)
