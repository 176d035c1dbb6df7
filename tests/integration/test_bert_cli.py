"""A BERT through the command line: other masks and data, several ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.train_tokenizer import TokenizerKind
from megascale.config.load import load_config
from megascale.config.recipe_checks import scores
from tests.bert_data import make_bert_dataset
from tests.integration import runs


def _settings(data: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    bert = {"model__family": "bert", "data__sentence_objective": "nsp", "model__dropout": 0.1}
    tree = runs.settings(Path(data), output, **{**bert, **changes})
    tree["data"]["split"] = [0.8, 0.2]
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets for BERT (WordPiece and byte-level BPE) and for GPT, and a trained BERT."""
    folder = tmp_path_factory.mktemp("bert_cli")
    for kind in (TokenizerKind.WORDPIECE, TokenizerKind.BPE):
        (folder / kind.value).mkdir()
        make_bert_dataset(folder / kind.value, kind=kind)
    (folder / "gpt").mkdir()
    runs.make_dataset(folder / "gpt", runs.make_tokenizer(folder / "gpt"))
    tree = _settings(folder / "wordpiece" / "data", folder / "run")
    tree["evaluation"] = {"interval": 1}
    tree["checkpoint"] = {"save_interval": 0, "keep_last": 1, "keep_best": "valid_nsp_accuracy"}
    done = runs.call("train", runs.write_config(folder / "bert.yaml", tree))
    assert done.code == 0, done.output
    assert "masked_lm_accuracy" in done.output
    return folder


def _train(folder: Path, tmp_path: Path, data: Path, **changes: Any) -> runs.Done:
    tree = _settings(data, tmp_path / "run", **changes)
    return runs.call("train", runs.write_config(tmp_path / "config.yaml", tree))


def _evaluate(folder: Path, *options: object) -> runs.Done:
    return runs.call("evaluate", folder / "run/checkpoints/step_00000004", "--json", *options)


def test_evaluation_reports_every_objective_and_the_majority(folder: Path) -> None:
    report = json.loads(_evaluate(folder, "--baselines").stdout)
    lines = runs.metrics(folder / "run")
    for name in ("loss", "masked_lm_loss", "nsp_loss", "masked_lm_accuracy", "nsp_accuracy"):
        assert report[name] == pytest.approx(lines[-1][f"valid_{name}"], rel=1e-6), name
    assert report["loss"] == pytest.approx(report["masked_lm_loss"] + report["nsp_loss"])
    assert 0 < report["majority_accuracy"] < 0.3
    assert "bits_per_byte" not in report
    assert "unigram_entropy" not in report
    limited = json.loads(_evaluate(folder, "--max-samples", 5).stdout)
    assert 0 < limited["tokens"] < report["tokens"]
    whole = json.loads(_evaluate(folder, "--data", folder / "wordpiece/data").stdout)
    assert whole["tokens"] > 3 * report["tokens"]


def test_the_most_accurate_checkpoint_is_kept(folder: Path) -> None:
    lines = runs.metrics(folder / "run")
    accuracies = [line["valid_nsp_accuracy"] for line in lines]
    best = accuracies.index(max(accuracies)) + 1
    kept = sorted(path.name for path in (folder / "run/checkpoints").iterdir())
    assert kept == sorted({f"step_{best:08d}", "step_00000004"})
    # what can be kept best is exactly what is measured
    config = load_config(folder / "bert.yaml")
    measured = {name for name in lines[-1] if name.startswith("valid_")} - {"valid_tokens"}
    assert measured == set(scores(config))


def test_byte_level_bpe_and_whole_words(folder: Path, tmp_path: Path) -> None:
    done = _train(
        folder,
        tmp_path,
        folder / "bpe/data",
        data__masking="whole_word",
        data__mask_probability=0.3,
    )
    assert done.code == 0, done.output


def test_a_blend_of_datasets(folder: Path, tmp_path: Path) -> None:
    # the prefix of the same files passes for another dataset: it has no manifest to tell
    paths = (folder / "wordpiece/data", folder / "wordpiece/data/shard_00000")
    data = [{"path": str(path), "weight": 2.0} for path in paths]
    tree = _settings("", tmp_path / "run", data__path=data, data__sentence_objective="sop")
    done = runs.call("train", runs.write_config(tmp_path / "config.yaml", tree))
    assert done.code == 0, done.output


def test_data_of_the_other_family_are_refused(folder: Path, tmp_path: Path) -> None:
    refusal = _train(folder, tmp_path, folder / "gpt/data").refusal()
    assert "was prepared for gpt models" in refusal
    assert "with --bert" in refusal
    tokenizer = str(folder / "gpt/tokenizer")
    prefix = folder / "gpt/data/shard_00000"
    refusal = _train(folder, tmp_path, prefix, data__tokenizer=tokenizer).refusal()
    assert "no tokens to mask and pad with" in refusal
    bert_vocabulary = folder / "bpe/data"
    tree = runs.settings(bert_vocabulary, tmp_path / "run")
    refusal = runs.call("train", runs.write_config(tmp_path / "gpt.yaml", tree)).refusal()
    assert "was prepared for bert models" in refusal
    assert "without --bert" in refusal


def test_a_prefix_needs_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    prefix = folder / "wordpiece/data/shard_00000"
    refusal = _train(folder, tmp_path, prefix, model__vocab_size=280).refusal()
    assert "data.tokenizer" in refusal
    tokenizer = str(folder / "wordpiece/tokenizer")
    done = _train(folder, tmp_path / "", prefix, data__tokenizer=tokenizer)
    assert done.code == 0, done.output


def test_a_bert_does_not_continue_texts(folder: Path) -> None:
    checkpoint = folder / "run/checkpoints/step_00000004"
    assert "is a bert model" in runs.call("generate", checkpoint, "--prompt", "a").refusal()


def test_another_sentence_objective_is_another_model(folder: Path, tmp_path: Path) -> None:
    tree = _settings(folder / "wordpiece/data", folder / "run", data__sentence_objective="none")
    config = runs.write_config(tmp_path / "none.yaml", tree)
    assert "sentence_head" in runs.call("train", config, "--resume").refusal()
