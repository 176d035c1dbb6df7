"""Validation sets by name, samples, the best checkpoint and averaged weights, in whole runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megascale.checkpoint.reader import CheckpointReader
from megascale.errors import UserError
from megascale.hf.exporting import export_model
from megascale.training.inference import LoadedModel
from tests.distributed import Pools
from tests.integration.runs import make_dataset, make_tokenizer, metrics, settings

PROMPTS = ["the quick", ""]
STEPS = 6


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared data: training, and another set to validate on."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "other").mkdir()
    tokenizer = make_tokenizer(root)
    return {
        "data": make_dataset(root, tokenizer),
        "other": make_dataset(root / "other", tokenizer, documents=20, shift=3),
    }


def _tree(names: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    tree = settings(
        names["data"],
        output,
        data__validation={"other": str(names["other"])},
        train__max_steps=STEPS,
        train__ema_decay=0.5,
        evaluation__interval=2,
        evaluation__prompts=PROMPTS,
        evaluation__sample_tokens=5,
        **changes,
    )
    tree["checkpoint"]["save_interval"] = 3
    return tree


def fit_rank(tree: dict[str, Any], resume: bool = False) -> str:
    """Runs on every rank: train as the command line does; what the console shows."""
    import torch.distributed as dist
    from rich.console import Console

    from megascale.cli.config import all_checks
    from megascale.config.load import load_config
    from megascale.training.assemble import assemble

    config = load_config(tree, checks=all_checks(), world_size=dist.get_world_size())
    text = io.StringIO()
    console = Console(file=text, width=300)
    run = assemble(config, torch.device("cpu"), resume=resume, console=console)
    try:
        run.trainer.fit()
    finally:
        run.engine.close()
    return text.getvalue()


def evaluate_rank(path: str, **kwargs: Any) -> Any:
    """Runs on every rank: the report of an evaluation, or the refusal's text."""
    from megascale.training.held_out import evaluate_checkpoint

    try:
        return evaluate_checkpoint(path, torch.device("cpu"), **kwargs)
    except UserError as error:
        return str(error)


def _samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("engine", "stage", "tensor"),
    [("torch", 0, 2), ("torch", 3, 1), ("deepspeed", 3, 1)],
)
def test_sets_samples_and_resume(
    pools: Pools, names: dict[str, Path], tmp_path: Path, engine: str, stage: int, tensor: int
) -> None:
    tree = _tree(names, tmp_path, parallel__engine=engine, parallel__zero_stage=stage)
    tree["parallel"] |= {"tensor_parallel_size": tensor, "sequence_parallel": tensor > 1}
    tree["model"]["dropout"] = 0.1
    console = pools(2).run(fit_rank, tree=tree)[0]
    lines = metrics(tmp_path)
    validated = [line["step"] for line in lines if "valid_loss" in line]
    assert validated == [2, 4, 6]
    for line in lines:
        if line["step"] in validated:
            assert line["other_loss"] != line["valid_loss"]
            for name in ("valid", "other"):
                assert line[f"{name}_perplexity"] == pytest.approx(
                    2.718281828459045 ** line[f"{name}_loss"]
                )
    assert console.count("other loss") == console.count("valid loss") == 3
    samples = _samples(tmp_path)
    assert [s["step"] for s in samples] == [2, 2, 4, 4, 6, 6]
    assert [s["prompt"] for s in samples] == PROMPTS * 3
    assert any(s["continuation"] for s in samples)
    assert "sample: 'the quick' ->" in console

    # the run goes on from step 3 as if it had never stopped, samples included
    (tmp_path / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    pools(2).run(fit_rank, tree=tree, resume=True)
    assert [_numbers(line) for line in metrics(tmp_path)] == [_numbers(line) for line in lines]
    assert _samples(tmp_path) == samples


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    measured = ("step_time_s", "tokens_per_second", "mfu", "memory_bytes", "checkpoint_s")
    return {key: value for key, value in line.items() if key not in measured}


def test_the_best_checkpoint_is_saved_and_kept(
    pools: Pools, names: dict[str, Path], tmp_path: Path
) -> None:
    """A learning rate that explodes after the first validation makes step 1 the best one."""
    tree = _tree(names, tmp_path)
    tree["optimizer"] = {"lr": 0.5, "grad_clip": 0.0, "name": "sgd", "momentum": 0.9}
    tree["schedule"] = {"name": "constant", "warmup_steps": 0}
    tree["evaluation"] = {"interval": 1}
    tree["checkpoint"] = {"save_interval": 2, "keep_last": 1, "keep_best": "other_loss"}
    pools(1).run(fit_rank, tree=tree)
    losses = {line["step"]: line["other_loss"] for line in metrics(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({f"step_{best:08d}", f"step_{STEPS:08d}"})
    assert best < STEPS, losses
    manifest = json.loads((tmp_path / "checkpoints" / kept[-1] / "manifest.json").read_text())
    remembered = manifest["state"]["callbacks"]["checkpoint"]
    assert remembered == {"best_of": "other_loss", "best": losses[best], "best_step": best}

    # a resumed run still knows it, and does not prune it
    tree["train"]["max_steps"] = STEPS + 2
    pools(1).run(fit_rank, tree=tree, resume=True)
    losses = {line["step"]: line["other_loss"] for line in metrics(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({f"step_{best:08d}", f"step_{STEPS + 2:08d}"})


def test_averaged_weights_are_evaluated(
    pools: Pools, names: dict[str, Path], tmp_path: Path
) -> None:
    tree = _tree(names, tmp_path)
    tree["checkpoint"]["save_interval"] = 2
    pools(1).run(fit_rank, tree=tree)
    folder = str(tmp_path / "checkpoints" / "step_00000006")

    def loss(**kwargs: Any) -> float:
        report = pools(1).run(evaluate_rank, path=folder, **kwargs)[0]
        assert isinstance(report, dict), report
        return report["loss"]

    last = metrics(tmp_path)[-1]
    assert loss() == pytest.approx(last["valid_loss"], rel=1e-6)
    assert loss(split="other") == pytest.approx(last["other_loss"], rel=1e-6)
    assert loss(weights="last-1") == loss()
    averaged = {loss(weights=weights) for weights in ("trained", "ema", "last-2", "last-3")}
    assert len(averaged) == 4
    # the average lags behind weights that get better
    assert loss(weights="ema") > loss()

    def refusal(**kwargs: Any) -> str:
        said = pools(1).run(evaluate_rank, path=folder, **kwargs)[0]
        assert isinstance(said, str)
        return said

    for weights in ("ema", "last-3"):  # to transformers as well
        out = str(tmp_path / f"hf_{weights}")
        export_model(CheckpointReader(folder), None, out, weights=weights)
        exported = load_file(f"{out}/model.safetensors")["transformer.wte.weight"]
        loaded = LoadedModel(folder, torch.device("cpu"), weights).module.state_dict()
        assert torch.equal(exported, loaded["model.embedding.tokens.weight"])

    assert "needs 3 before this one" in refusal(weights="last-4")
    assert "trained, ema or last-K" in refusal(weights="last-0")
    assert "the sets other" in refusal(split="absent")


def test_without_an_average_there_is_none_to_evaluate(
    pools: Pools, names: dict[str, Path], tmp_path: Path
) -> None:
    tree = _tree(names, tmp_path)
    tree["train"].pop("ema_decay")
    pools(1).run(fit_rank, tree=tree)
    folder = str(tmp_path / "checkpoints" / "step_00000006")
    said = pools(1).run(evaluate_rank, path=folder, weights="ema")[0]
    assert "train.ema_decay" in said
    # and a run that asks for one now begins it at the weights it finds
    tree["train"] |= {"ema_decay": 0.5, "max_steps": STEPS + 1}
    pools(1).run(fit_rank, tree=tree, resume=True)
    newest = str(tmp_path / "checkpoints" / f"step_{STEPS + 1:08d}")
    assert pools(1).run(evaluate_rank, path=newest, weights="ema")[0]["loss"] > 0
