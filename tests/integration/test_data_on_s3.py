"""The whole way of the data in an object store (moto's S3 server): each step, and a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.app import app
from data_prep.datasets.verify import verify
from megascale.data.corpus import TokenCorpus
from megascale.data.places import as_path
from megascale.errors import UserError
from tests.integration import runs
from tests.object_store import s3_bucket

WORDS = (
    *("the", "harbour", "wall", "and", "old", "stone", "that"),
    *("a", "report", "on", "money", "of", "tuesday", "people"),
)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_bucket("data") as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("scratch")))
        yield url


def run(*arguments: object, expect: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, UserError):
        assert expect == 2, done.exception
        return str(done.exception)
    assert done.exit_code == expect, (done.output, done.exception)
    return done.stdout


def files(folder: str | Path) -> dict[str, bytes]:
    """Contents by name below a folder, without reports, which hold times."""
    root = as_path(folder)
    found = {
        str(path).removeprefix(str(root)).lstrip("/"): path
        for path in root.rglob("*")
        if path.is_file()
    }
    return {n: p.read_bytes() for n, p in found.items() if not n.endswith("report.json")}


@pytest.fixture(scope="module")
def raw(bucket: str) -> str:
    texts = [
        " ".join(f"{WORDS[(n * 7 + k * k) % len(WORDS)]}{n * k % 29}" for k in range(60))
        for n in range(28)
    ]
    for part in range(2):
        lines = [
            json.dumps({"text": text}) for text in [*texts[part::2], texts[part], "mail a@b.de"]
        ]
        as_path(f"{bucket}/raw/part{part}.jsonl").write_text("\n".join(lines) + "\n")
    return f"{bucket}/raw"


@pytest.fixture(scope="module")
def prepared(bucket: str, raw: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The same steps into the bucket and onto the disk; their folders."""
    local = tmp_path_factory.mktemp("prepared")
    for root in (f"{bucket}/out", local):
        options = ["--shard-size", "8KB", "--workers", 1]
        run("read", "--input", f"web={raw}", "--output", f"{root}/1", *options)
        rules = ["--workers", 1, "--rule", "normalize", "--rule", "length: {min_characters: 20}"]
        run("clean", "--input", f"{root}/1", "--output", f"{root}/2", *rules, "--keep-rejected")
        options = ["--no-self-test", "--workers", 1]
        run("dedup", "--input", f"{root}/2", "--output", f"{root}/3", *options)
        against = f"exam={raw}/part1.jsonl"
        options = ["--against", against, "--action", "cut", "--workers", 1]
        run("decontaminate", "--input", f"{root}/3", "--output", f"{root}/4", *options)
        trained = ["--input", f"{root}/4", "--output", f"{root}/tok", "--vocab-size", 280]
        run("train-tokenizer", *trained)
        made = ["--tokenizer", f"{root}/tok", "--shard-size", "1KB"]
        made += ["--workers", 1 if root is local else 2]
        run("tokenize", "--input", f"{root}/3", "--output", f"{root}/set", *made)
    return f"{bucket}/out", local


def test_every_step_writes_the_bytes_that_it_writes_on_a_disk(prepared: tuple[str, Path]) -> None:
    remote, local = prepared
    there, here = files(remote), files(local)
    # what names its input's place differs; manifests say where the text came from
    named = {name for name in here if name.endswith(("manifest.json", "recipe.json"))}
    assert set(there) == set(here)
    assert {n: v for n, v in there.items() if n not in named} == {
        n: v for n, v in here.items() if n not in named
    }
    assert "2/rejected/shard_00000.jsonl.zst" in here
    assert len([name for name in here if name.startswith("set/") and name.endswith(".bin")]) > 1
    assert TokenCorpus.open(local / "set").num_documents == 28


def test_done_again_does_nothing_and_other_options_are_refused(prepared: tuple[str, Path]) -> None:
    root = prepared[0]
    command = ["tokenize", "--input", f"{root}/3", "--output", f"{root}/set"]
    command += ["--tokenizer", f"{root}/tok"]
    assert "already prepared" in run(*command, "--shard-size", "1KB")
    assert "--overwrite" in run(*command, "--shard-size", "9KB", expect=2)
    clean = ["clean", "--input", f"{root}/1", "--output", f"{root}/2", "--rule", "normalize"]
    assert "--overwrite" in run(*clean, expect=2)


def test_datasets_in_a_store(prepared: tuple[str, Path], bucket: str, tmp_path: Path) -> None:
    remote, local = prepared
    assert json.loads(run("inspect", f"{remote}/set", "--json"))["documents"] == 28
    assert "same documents" in run("diff", f"{remote}/set", local / "set")
    split = ["split", f"{remote}/set", "--output", f"{bucket}/parts", "--workers", 1]
    split += ["--documents", 20, "--documents", 8]
    run(*split)
    parts = [f"{bucket}/parts/train", f"{bucket}/parts/validation"]
    assert "already done" in run(*split)
    run("merge", "--input", parts[0], "--input", parts[1], "--output", f"{bucket}/whole")
    assert "different places" in run(
        *("merge", "--input", parts[0], "--input", local / "set", "--output", tmp_path / "m"),
        expect=2,
    )
    whole = TokenCorpus.open(f"{bucket}/whole", cache=tmp_path / "cache", verify=True)
    wanted = TokenCorpus.open(local / "set")
    assert str(whole.path) == f"{bucket}/whole"
    assert whole.num_documents == 28
    assert (whole.read(0, whole.num_tokens) == wanted.read(0, wanted.num_tokens)).all()
    prefix = f"{remote}/set/shard_00000"
    run("adopt", "--input", prefix, "--tokenizer", f"{remote}/tok", "--output", f"{bucket}/adopted")
    assert verify(as_path(f"{bucket}/adopted"), 1).problems == []
    run("read", "--input", f"{prefix}.bin", "--output", tmp_path / "texts", "--workers", 1)
    assert json.loads((tmp_path / "texts/report.json").read_text())["counts"]["documents"] > 1


def test_damage_in_a_store_is_seen_and_repaired(
    prepared: tuple[str, Path], bucket: str, tmp_path: Path
) -> None:
    for name, content in files(f"{prepared[0]}/set").items():
        as_path(f"{bucket}/damaged/{name}").write_bytes(content)
    first = as_path(f"{bucket}/damaged/shard_00000.bin")
    first.write_bytes(first.read_bytes()[:-100])
    output = run("verify", f"{bucket}/damaged", "--workers", 1, expect=1)
    assert "shard_00000.bin has" in output
    with pytest.raises(UserError, match=r"shard_00000\.bin has the checksum"):
        TokenCorpus.open(f"{bucket}/damaged", cache=tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    output = run("repair", f"{bucket}/damaged", "--output", f"{bucket}/saved", "--workers", 1)
    assert "lost of shard_00000 (truncated: .bin): 1 documents" in output
    assert verify(as_path(f"{bucket}/saved"), 1).problems == []


def test_a_training_reads_a_copy_that_is_made_once(
    prepared: tuple[str, Path], tmp_path: Path
) -> None:
    remote, local = prepared
    losses = []
    for data in (f"{remote}/set", local / "set", f"{remote}/set"):
        tree = runs.settings(data, tmp_path / f"run{len(losses)}", train__max_steps=2)
        tree["data"]["path"] = str(data)
        tree["data"]["cache_dir"] = str(tmp_path / "cache")
        done = runs.call("train", runs.write_config(tmp_path / "c.yaml", tree))
        assert done.code == 0, done.output
        assert ("copying" in done.output) == (len(losses) == 0)
        lines = (tmp_path / f"run{len(losses)}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1] == losses[2]
    (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.name[0] != ".")
    assert verify(copy, 1).problems == []
    assert run("fetch", f"{remote}/set", "--cache-dir", tmp_path / "cache").strip() == str(copy)
    shutil.rmtree(copy)
    refused = runs.call("train", tmp_path / "c.yaml", "data.cache_dir=null").refusal()
    assert "data.cache_dir" in refused
