"""Whole runs over mixes that change: what they read, tell, keep, and refuse to go on with."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint.reader import CheckpointReader
from megascale.errors import UserError
from megascale.training.which import RunSamples
from tests.bert_data import make_bert_dataset
from tests.integration import runs

EOT = "<|endoftext|>"


def _stage(start: int, *sources: tuple[Path, float]) -> dict[str, Any]:
    pairs = [{"path": str(path), "weight": weight} for path, weight in sources]
    return {"from_sample": start, "sources": pairs}


@dataclass(frozen=True)
class Trained:
    """A run of 4 steps of 4 samples; the mix changes inside the second step."""

    root: Path
    config: Path
    run: Path
    first: Path
    second: Path
    tree: dict[str, Any]

    def copy(self, folder: Path) -> Path:
        """The same run elsewhere, to go on with."""
        shutil.copytree(self.run, folder / "run")
        return folder / "run"

    def resume(self, run: Path, *overrides: str) -> runs.Done:
        return runs.call("train", self.config, f"run.output_dir={run}", *overrides, "--resume")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    tokenizer = runs.make_tokenizer(root)
    paths = []
    for name, shift in (("first", 0), ("second", 5), ("held", 9)):
        (root / name).mkdir()
        documents = 20 if name == "held" else 60
        paths.append(runs.make_dataset(root / name, tokenizer, documents=documents, shift=shift))
    first, second, held = paths
    tree = runs.settings(
        first,
        root / "run",
        data__path=None,
        data__stages=[_stage(0, (first, 1.0)), _stage(6, (second, 3.0), (first, 1.0))],
        data__validation={"held": str(held)},
        data__packing="one_document",
        model__seq_length=48,
        train__global_batch_size=4,
        logging__tensorboard=True,
    )
    config = runs.write_config(root / "config.yaml", tree)
    done = runs.call("train", config)
    assert done.code == 0, done.output
    told = rf"one_document of {first}: (5\d) samples of \1 documents, \d+\.\d\d% padding"
    assert re.search(told, done.stdout), done.stdout
    return Trained(root, config, root / "run", first, second, tree)


def _lines(data: Path) -> list[str]:
    return (data.parent / "text.txt").read_text().splitlines()


def test_the_ledger_is_in_metrics_and_checkpoints_and_in_tensorboard(trained: Trained) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = runs.metrics(trained.run)
    samples = [{n: c["samples"] for n, c in line["sources"].items()} for line in lines]
    first, second = str(trained.first), str(trained.second)
    assert samples[0] == {first: 4}
    assert [sum(counts.values()) for counts in samples] == [4, 8, 12, 16]
    assert samples[1][first] >= 6  # the sixth sample is the last of the first mix
    for line in lines:
        counts = line["sources"].values()
        assert line["tokens_seen"] == sum(count["tokens"] for count in counts)
        assert line["tokens_seen"] < line["samples_seen"] * 48
    reader = CheckpointReader(str(trained.run / "checkpoints" / "step_00000004"))
    assert reader.manifest.state["callbacks"]["ledger"] == lines[-1]["sources"]
    assert {line["valid_tokens"] for line in lines[-1:]} != {lines[-1]["held_tokens"]}
    events = EventAccumulator(str(trained.run / "tensorboard")).Reload()
    told = [int(event.value) for event in events.Scalars(f"tokens/{second}")]
    expected = [line["sources"].get(second, {}).get("tokens") for line in lines]
    assert told == [tokens for tokens in expected if tokens]


def test_which_tells_what_every_step_read(trained: Trained) -> None:
    """The text files are the oracle: a document is a line of them."""
    run = RunSamples(str(trained.run))
    lines = runs.metrics(trained.run)
    read: dict[str, list[int]] = {str(trained.first): [], str(trained.second): []}
    for step in range(1, 5):
        for number, sample in enumerate(run.of_step(step)):
            assert sample.sample == 4 * (step - 1) + number
            assert sample.stage == (sample.sample >= 6)
            (part,) = sample.documents
            line = _lines(Path(sample.source))[part.document]
            assert sample.text == (line + EOT)
            assert (part.shard, part.start) == ("shard_00000", 0)
            assert sample.tokens == part.stop
            assert sample.source_sample == len(read[sample.source])
            read[sample.source].append(part.document)
        counts = lines[step - 1]["sources"]
        assert {n: c["samples"] for n, c in counts.items()} == {
            n: len(d) for n, d in read.items() if d
        }
    for documents in read.values():
        assert len(set(documents)) == len(documents)  # within an epoch, each once


def test_which_on_the_command_line(trained: Trained) -> None:
    whole = json.loads(runs.call("data", "which", trained.run, "--step", 900, "--json").stdout)
    assert whole["step"] == 900
    assert [sample["sample"] for sample in whole["samples"]] == [3596, 3597, 3598, 3599]
    assert max(sample["epoch"] for sample in whole["samples"]) > 10
    by_rank = [
        json.loads(
            runs.call(
                *("data", "which", trained.config, "--step", 900, "--json"),
                *("--rank", rank, "--world-size", 2),
            ).stdout
        )["samples"]
        for rank in (0, 1)
    ]
    assert by_rank[0] + by_rank[1] == whole["samples"]
    told = runs.call("data", "which", trained.run, "--step", 2, "--rank", 0).stdout
    assert told.startswith("step 2 reads 4 samples on rank 0\n")
    assert "shard_00000 document" in told
    message = runs.call("data", "which", trained.run, "--step", 2, "--rank", 1).refusal()
    assert "ranks 0..0" in message
    new = trained.root / "new.yaml"
    runs.write_config(new, {**trained.tree, "run": {"output_dir": str(trained.root / "new")}})
    message = runs.call("data", "which", new, "--step", 2, "--rank", 1).refusal()
    assert "--world-size" in message
    message = runs.call("data", "which", trained.root / "missing", "--step", 2).refusal()
    assert f"no file or folder {trained.root / 'missing'}" in message


def test_ranks_of_one_replica_read_the_same(trained: Trained, tmp_path: Path) -> None:
    """As the mesh lays ranks out: pp outermost, then dp, cp, tp."""
    tree = {**trained.tree, "run": {"output_dir": str(tmp_path / "none")}}
    tree["parallel"] = {f"{axis}_parallel_size": 2 for axis in ("pipeline", "context", "tensor")}
    tree["train"] = {**tree["train"], "micro_batch_size": 1}
    run = RunSamples(str(runs.write_config(tmp_path / "config.yaml", tree)))
    shares = [[s.sample for s in run.of_step(2, rank, world_size=16)] for rank in range(16)]
    places = itertools.product(range(2), repeat=4)  # pp, dp, cp, tp
    assert shares == [[[4, 5], [6, 7]][dp] for _, dp, _, _ in places]
    with pytest.raises(UserError, match="a multiple of"):
        run.of_step(2, 0, world_size=12)


def test_windows_are_told_by_their_documents(trained: Trained, tmp_path: Path) -> None:
    tree = runs.settings(trained.first, tmp_path / "run", data__split=[1.0])
    run = RunSamples(str(runs.write_config(tmp_path / "config.yaml", tree)))
    text = "".join(line + EOT for line in _lines(trained.first))
    for sample in run.of_step(3):
        assert sample.text is not None
        assert sample.text in text
        assert sum(part.stop - part.start for part in sample.documents) == 17
        numbers = [part.document for part in sample.documents]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all(part.start == 0 for part in sample.documents[1:])
        begin = _lines(trained.first)[numbers[0]]
        assert sample.text.startswith(begin[-1:]) or sample.text.split(EOT)[0] in begin + EOT


def test_a_stage_is_added_and_another_batch_goes_on(trained: Trained, tmp_path: Path) -> None:
    run = trained.copy(tmp_path)
    stages = [*trained.tree["data"]["stages"], _stage(17, (trained.first, 1.0))]
    change = f"data.stages={json.dumps(stages)}"
    done = trained.resume(run, change, "train.max_steps=6", "train.global_batch_size=2")
    assert done.code == 0, done.output
    lines = runs.metrics(run)
    assert lines[:4] == runs.metrics(trained.run)
    assert [line["samples_seen"] for line in lines[4:]] == [18, 20]
    which = RunSamples(str(run))
    assert [s.sample for s in which.of_step(3)] == [8, 9, 10, 11]  # of the batch it had then
    assert [(s.sample, s.stage) for s in which.of_step(5)] == [(16, 1), (17, 2)]
    assert [s.sample for s in which.of_step(8)] == [22, 23]
    # what was read of each goes on, across the stage and the resume
    seen = [sample for step in range(1, 7) for sample in which.of_step(step)]
    for source in (str(trained.first), str(trained.second)):
        numbers = [sample.source_sample for sample in seen if sample.source == source]
        assert numbers == list(range(len(numbers)))


def test_what_was_read_may_not_change(trained: Trained, tmp_path: Path) -> None:
    run = trained.copy(tmp_path)
    (tmp_path / "other").mkdir()
    other = runs.make_dataset(tmp_path / "other", trained.root / "tokenizer", documents=59, shift=5)
    first, second = trained.first, trained.second

    def refusal(*stages: dict[str, Any], more: tuple[str, ...] = ()) -> str:
        given = (f"data.stages={json.dumps(stages)}",) if stages else ()
        before = runs.files(run)
        message = trained.resume(run, *given, *more, "train.max_steps=5").refusal()
        assert runs.files(run) == before
        return message

    old = trained.tree["data"]["stages"]
    message = refusal(old[0], _stage(6, (other, 3.0), (first, 1.0)))
    assert "fingerprint" in message
    assert "shard shard_00000: 59 documents instead of 60" in message
    assert str(second) in message
    message = refusal(old[0], _stage(6, (second, 2.0), (first, 1.0)))
    assert "stage 1 of the data is not that of the checkpoint" in message
    assert "from_sample >= 16" in message
    assert "stage 1" in refusal(old[0], _stage(7, (second, 3.0), (first, 1.0)))
    assert "stage 1" in refusal(old[0])
    assert "stage 2" in refusal(*old, _stage(15, (first, 1.0)))
    assert "data.packing best_fit" in refusal(more=("data.packing=best_fit",))
    assert "data.split" in refusal(more=("data.split=[0.8, 0.2]",))
    tree = {**trained.tree, "data": {**trained.tree["data"]}}
    tree["data"]["stages"] = [old[0], _stage(6, (other, 3.0), (first, 1.0))]
    tree["run"] = {**tree["run"], "output_dir": str(run)}
    changed = runs.write_config(tmp_path / "changed.yaml", tree)
    with pytest.raises(UserError, match="59 documents instead of 60"):
        RunSamples(str(changed))


def test_what_was_not_read_may_change(trained: Trained, tmp_path: Path) -> None:
    """A mix that is still to come, and its datasets; equal shares written otherwise."""
    run = trained.copy(tmp_path)
    (tmp_path / "other").mkdir()
    other = runs.make_dataset(tmp_path / "other", trained.root / "tokenizer", shift=2)
    stages = [
        _stage(0, (trained.first, 7.0)),
        _stage(6, (trained.second, 0.75), (trained.first, 0.25)),
        _stage(16, (other, 1.0)),
    ]
    done = trained.resume(run, f"data.stages={json.dumps(stages)}", "train.max_steps=5")
    assert done.code == 0, done.output
    assert list(runs.metrics(run)[-1]["sources"])[-1] == str(other)


def test_the_same_data_by_two_names_is_refused(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.first, tmp_path / "copy")
    blend = [{"path": str(p), "weight": 1} for p in (trained.first, tmp_path / "copy")]
    change = (f"data.path={json.dumps(blend)}", "data.stages=[]", f"run.output_dir={tmp_path}/run")
    message = runs.call("train", trained.config, *change).refusal()
    assert "hold the same data" in message


def test_fill_in_the_middle_needs_its_tokens(trained: Trained, tmp_path: Path) -> None:
    change = ("data.fim_rate=0.5", f"run.output_dir={tmp_path}/run")
    message = runs.call("train", trained.config, *change).refusal()
    assert "<|fim_prefix|> <|fim_suffix|> <|fim_middle|>" in message


def test_which_of_a_bert(tmp_path: Path) -> None:
    """[CLS] A [SEP] B [SEP] with masks, without the padding; the run is part of a document."""
    data = make_bert_dataset(tmp_path)
    tree = runs.settings(data, tmp_path / "run", data__sentence_objective="sop")
    tree["model"]["family"] = "bert"
    run = RunSamples(str(runs.write_config(tmp_path / "config.yaml", tree)))
    for sample in run.of_step(5):
        assert sample.text is not None
        assert sample.text.startswith("[CLS]")
        assert sample.text.endswith("[SEP]")
        (part,) = sample.documents
        assert sample.tokens == part.stop - part.start + 3 <= 16
