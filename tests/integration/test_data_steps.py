"""read, clean, dedup and decontaminate as runs: workers, kills, second processes, a full disk."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.clean.contents import Length
from data_prep.clean.normalize import Normalize
from data_prep.clean.scrub import Scrub
from data_prep.clean.step import CleanOptions, prepare_clean
from data_prep.dedup.decontaminate import Action, DecontaminateOptions, prepare_decontaminate
from data_prep.dedup.signatures import DedupOptions
from data_prep.dedup.step import DedupRun, dedup, dedup_phases
from data_prep.progress import Advance
from data_prep.read.step import NamedInput, ReadOptions, named_inputs, prepare_read
from data_prep.records import Document, read_documents, shard_paths
from data_prep.shard_runner import ShardResult, ShardTask, open_run
from data_prep.step import Step, run_step
from megascale.errors import UserError
from tests.integration.runs import run_data_prep

WORDS = (
    *("the", "harbour", "wall", "old", "stone", "report", "money"),
    *("tuesday", "people", "many", "years", "first", "second"),
)


def _text(number: int) -> str:
    """About 60 words that hardly any other document has in this order."""
    return " ".join(f"{WORDS[(number * 7 + k * k) % 13]}{(number * k) % 29}" for k in range(60))


def _documents(folder: Path) -> list[Document]:
    return [document for path in shard_paths(folder) for _, document in read_documents(path)]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of jsonl with exact and near duplicates, short texts, addresses, bad lines."""
    folder = tmp_path_factory.mktemp("raw")
    texts = [_text(number) for number in range(60)]
    texts += [texts[3], texts[7] + " more", "short", "mail a@b.de " + texts[9]]
    for part in range(4):
        lines = [json.dumps({"text": text}) for text in texts[part::4]]
        (folder / f"part{part}.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def documents(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("read") / "documents"
    step = prepare_read(named_inputs([f"web={raw}"]), output, ReadOptions(shard_bytes=4000))
    run_step(step, 1)
    assert len(shard_paths(output)) > 4
    return output


def test_read_counts_what_is_broken(documents: Path) -> None:
    report = json.loads((documents / "report.json").read_text())
    assert report["sources"]["web"]["documents"] == len(_documents(documents)) == 64
    assert report["skipped"]["malformed json line"]["count"] == 4
    assert set(report["files"]) == {path.name for path in shard_paths(documents)}


def _clean(documents: Path, output: Path, keep: bool = True) -> Step:
    rules = (Normalize(), Length(min_characters=50), Scrub())
    return prepare_clean(documents, output, CleanOptions(rules, keep_rejected=keep))


def test_clean_keeps_order_and_what_was_rejected(documents: Path, tmp_path: Path) -> None:
    report = run_step(_clean(documents, tmp_path / "out"), 1).report
    before, after = _documents(documents), _documents(tmp_path / "out")
    assert [d.id for d in after] == [d.id for d in before if d.text != "short"]
    assert any(d.text.startswith("mail <EMAIL>") for d in after)
    (rejected,) = _documents(tmp_path / "out" / "rejected")
    assert (rejected.text, rejected.meta) == ("short", {"rejected_by": "length.short"})
    row = report["sources"]["web"]
    assert (row["documents"], row["kept"], row["rejected"]) == (64, 63, {"length.short": 1})
    assert row["changed"]["scrub"]["emails"] == 1
    assert report["counts"]["text_bytes"] == sum(len(d.text.encode()) for d in after)
    assert run_step(_clean(documents, tmp_path / "out"), 1).already_done
    with pytest.raises(UserError, match="made from other input or with other options"):
        run_step(_clean(documents, tmp_path / "out", keep=False), 1)
    with pytest.raises(UserError, match="lie in one another"):
        _clean(documents, documents / "inside")


def test_dedup_over_shards(documents: Path, tmp_path: Path) -> None:
    result = dedup(documents, tmp_path / "out", DedupOptions(), DedupRun(keep_removed=True))
    assert result.report["sources"]["web"]["rejected"] == {
        "exact_duplicate": 1,
        "near_duplicate": 2,
    }
    kept = [d.text for d in _documents(tmp_path / "out")]
    assert kept == list(dict.fromkeys(kept))
    removed = _documents(tmp_path / "out" / "removed")
    assert sorted(d.meta["rejected_by"] for d in removed) == [
        "exact_duplicate",
        "near_duplicate",
        "near_duplicate",
    ]
    assert {d.id for d in _documents(documents)} == {
        d.id for d in (*removed, *_documents(tmp_path / "out"))
    }
    test = result.report["search"]["self_test"]
    assert test["planted_duplicates"] > 20
    assert test["precision"] >= 0.95
    assert test["recall"] >= 0.95
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")] == [
        "out"
    ]
    assert dedup(documents, tmp_path / "out", DedupOptions(), DedupRun(True)).already_done


def test_repeated_lines_are_cut_out(tmp_path: Path) -> None:
    notice = "All rights to this page are reserved by its owner."
    lines = [json.dumps({"text": f"{notice}\n{_text(n)}\nok"}) for n in range(3)]
    lines.append(json.dumps({"text": notice}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    run_step(
        prepare_read(named_inputs([str(tmp_path / "a.jsonl")]), tmp_path / "in", ReadOptions()), 1
    )
    options = DedupOptions(near=None, lines=True)
    report = dedup(tmp_path / "in", tmp_path / "out", options).report
    expected = [f"{notice}\n{_text(0)}\nok", f"{_text(1)}\nok", f"{_text(2)}\nok"]
    assert [d.text for d in _documents(tmp_path / "out")] == expected
    row = report["sources"]["a"]
    assert (row["removed_lines"], row["rejected"]) == (3, {"only_repeated_lines": 1})


def test_decontaminate_drops_or_cuts(documents: Path, tmp_path: Path) -> None:
    words = _text(5).split()
    examples = [" ".join(words[20:40]).upper(), "a question that none of the documents has in it"]
    (tmp_path / "exam.txt").write_text("\n".join([*examples, "too short"]) + "\n")
    sets = [NamedInput("exam", str(tmp_path / "exam.txt"))]
    reports = {}
    for action in Action:
        options = DecontaminateOptions(action=action, window=20, keep_removed=True)
        step = prepare_decontaminate(documents, tmp_path / action.value, sets, options)
        reports[action] = run_step(step, 1).report
        assert reports[action]["against"]["exam"] == {
            "examples": 3,
            "examples_too_short": 1,
            "examples_found": 1,
            "documents": 1,
            "ngrams": 8,
        }
        (removed,) = _documents(tmp_path / action.value / "removed")
        assert removed.text == _text(5)
        assert removed.meta["rejected_by"] == "exam"
    dropped, cut = _documents(tmp_path / "drop"), _documents(tmp_path / "cut")
    assert len(dropped) == 63
    pieces = [d for d in cut if "#" in d.id]
    assert [d.id[-2:] for d in pieces] == ["#1", "#2"]
    assert len(cut) == 65
    text = _text(5)
    begin = text.index(" ".join(words[20:40]))
    end = begin + len(" ".join(words[20:40]))
    assert [d.text for d in pieces] == [text[: begin - 20].strip(), text[end + 20 :].strip()]


def test_any_number_of_workers_and_shares_give_the_same_bytes(
    documents: Path, tmp_path: Path
) -> None:
    from data_prep.shard_runner import Share, ShareDone

    run_step(_clean(documents, tmp_path / "one"), 1)
    run_step(_clean(documents, tmp_path / "two"), 2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    for rank in (1, 0):
        with pytest.raises(ShareDone):
            run_step(_clean(documents, tmp_path / "shared"), 1, share=Share(rank, 2))
    report = run_step(_clean(documents, tmp_path / "shared"), 1).report
    assert report["shards"]["made_by_this_run"] == 0
    assert _files(tmp_path / "one") == _files(tmp_path / "shared")


class _KilledAfter:
    """Work that dies with some shards done, as by SIGKILL: nothing of ours runs after it."""

    def __init__(self, work: Any, shards: int) -> None:
        self.work, self.left = work, shards

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        self.left -= 1
        result: ShardResult = self.work(task, folder, advance)
        if self.left < 0:
            os._exit(9)
        return result


def test_killed_anywhere_and_started_again_it_is_the_same(documents: Path, tmp_path: Path) -> None:
    """Each phase of a dedup and a clean is killed after each number of shards, in a child."""
    options, run = DedupOptions(lines=True), DedupRun(self_test=False)
    dedup(documents, tmp_path / "whole", options, run)
    for shards in (0, 1, 3):
        for prepare in dedup_phases(documents, tmp_path / "killed", options, run):
            _kill_in_child(prepare(), shards)
            run_step(prepare(), 1)
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert (tmp_path / ".killed.signatures").exists()  # killed before it was removed
    assert dedup(documents, tmp_path / "killed", options, run).already_done
    assert not list(tmp_path.glob(".killed*"))
    run_step(_clean(documents, tmp_path / "clean"), 1)
    for shards in (0, 2):
        _kill_in_child(_clean(documents, tmp_path / "again"), shards)
    assert not (tmp_path / "again").exists()
    run_step(_clean(documents, tmp_path / "again"), 1)
    assert _files(tmp_path / "again") == _files(tmp_path / "clean")


def _kill_in_child(step: Step, shards: int) -> None:
    pid = os.fork()
    if pid == 0:
        work = _KilledAfter(step.work, shards)
        run_step(replace(step, work=work), 1)
        os._exit(0)
    os.waitpid(pid, 0)


def test_a_second_process_and_changed_input_are_refused(documents: Path, tmp_path: Path) -> None:
    step = _clean(documents, tmp_path / "out")
    with (
        open_run(step.output, step.name, step.identity, "report.json"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        run_step(step, 1)
    _kill_in_child(step, 2)
    with pytest.raises(UserError, match="unfinished run that differs"):
        run_step(_clean(documents, tmp_path / "out", keep=False), 1)


def test_the_command_line(raw: Path, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    told = run_data_prep("read", "--input", f"web={raw}", "--output", shards, "--workers", 1)
    assert "skipped 4 malformed json line" in told
    assert "64 documents" in told
    rules = ["--rule", "normalize", "--rule", "length: {min_characters: 50}"]
    command = ["clean", "--input", shards, "--output", out, "--workers", 1]
    told = run_data_prep(*command, *rules, "--augment", "{typo_rate: 0.2}", "--keep-rejected")
    assert "web: 1 rejected by length.short" in told
    assert "63 augmented" in told
    wrong = ["--rule", "lenght: {min_characters: 50}", "--rule", "scrub: {mail: x}"]
    told = run_data_prep(*command, *wrong, expect=2)
    assert "did you mean length?" in told
    assert "--rule[1].scrub.mail" in told


def test_a_full_disk_leaves_nothing_half_written(raw: Path, tmp_path: Path) -> None:
    command = ["read", "--input", raw, "--output", tmp_path / "out", "--workers", 1]
    told = run_data_prep(*command, expect=2, limit_kib=0)
    assert "no space to write" in told
    assert not (tmp_path / "out").exists()
    run_data_prep(*command)
    assert len(_documents(tmp_path / "out")) == 64


def test_input_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{broken\n")
    step = prepare_read(named_inputs([str(tmp_path / "a.jsonl")]), tmp_path / "out", ReadOptions())
    with pytest.raises(UserError, match=r"no usable document \(1 malformed json line"):
        run_step(step, 1)
    assert not (tmp_path / "out").exists()
