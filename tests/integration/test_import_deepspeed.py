"""Checkpoints that DeepSpeed saved on two ranks, against the same training by torch alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.config.load import load_config
from megascale.config.yaml_text import dump_yaml
from megascale.errors import UserError
from megascale.importers.importing import Report, import_deepspeed
from megascale.training.inference import LoadedModel
from tests.deepspeed_checkpoints import MEGASCALE, STEPS, built, reference, save
from tests.distributed import Pools
from tests.hf_models import token_ids
from tests.integration.runs import call

CPU = torch.device("cpu")


def _described(kind: str, folder: Path) -> str:
    """What --model is given."""
    if kind == "megascale":
        path = folder / "model.yaml"
        path.write_text(dump_yaml({"model": MEGASCALE, "data": {"path": "x"}}))
        return str(path)
    path = folder / "config.json"
    path.write_text(built(kind).config.to_json_string())  # type: ignore[union-attr, operator]
    return str(path)


@pytest.fixture(scope="module")
def saved(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder that DeepSpeed saved, for a kind of model, a stage and a precision; made once."""
    root = tmp_path_factory.mktemp("deepspeed")

    def get(kind: str, stage: int, precision: str = "fp32", frozen: str = "") -> Path:
        folder = root / f"{kind}-{stage}-{precision}-{bool(frozen)}"
        if not folder.exists():
            pools(2).run(
                save,
                folder=str(folder),
                kind=kind,
                stage=stage,
                precision=precision,
                frozen=frozen,
            )
        return folder

    return get


def _imported(folder: Path, kind: str, tmp_path: Path) -> Report:
    return import_deepspeed(str(folder), str(tmp_path / "out"), _described(kind, tmp_path), _shapes)


def _logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.logits(ids) if hasattr(module, "logits") else module(ids).logits


def _whole(reader: CheckpointReader, name: str, kind: str) -> torch.Tensor:
    return torch.cat(list(reader.blocks(name, kind)))


def _norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


CASES = [("gpt2", 1), ("megascale", 2), ("llama", 3), ("gpt2", 0)]


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_weights_and_moments_are_those_of_the_training(
    saved: Any, tmp_path: Path, kind: str, stage: int
) -> None:
    report = _imported(saved(kind, stage), kind, tmp_path)
    expected, moments = reference(kind)
    ids = token_ids(length=16)
    ours = _logits(LoadedModel(report.checkpoint, CPU).module, ids)
    theirs = _logits(expected, ids)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert report.step == STEPS
    assert "client_state['epoch']" in report.lost
    reader = CheckpointReader(report.checkpoint)
    assert reader.damage() is None
    assert reader.manifest.step == STEPS
    if not stage:
        assert report.kinds == ("master",)
        assert any("optimizer's state" in line for line in report.lost)
        return
    assert report.kinds == ("master", "exp_avg", "exp_avg_sq")
    assert report.updates == STEPS
    for kind_of_state in ("exp_avg", "exp_avg_sq"):
        # names and shapes are the family's own, so norms are compared: a plain sum cancels
        found = [_whole(reader, name, kind_of_state) for name in reader.manifest.parameters]
        wanted = [state[kind_of_state] for state in moments.values()]
        assert _norm(found) == pytest.approx(_norm(wanted), rel=1e-5)
    if kind == "megascale":  # the same names: every element
        for name, state in moments.items():
            if name.endswith("key.bias"):
                continue  # softmax does not see it: its gradient is rounding noise
            for kind_of_state in ("exp_avg", "exp_avg_sq"):
                found = _whole(reader, name, kind_of_state)
                wanted = state[kind_of_state].flatten()
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_masters_are_taken_and_not_the_low_precision_copy(saved: Any, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = saved("gpt2", 3, "bf16")
    report = _imported(folder, "gpt2", tmp_path)
    reader = CheckpointReader(report.checkpoint)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    table = expected["model.transformer.wte.weight"]
    ours = _whole(reader, "model.embedding.tokens.weight", "master")
    assert torch.equal(ours, table.flatten())
    assert not torch.equal(ours, ours.bfloat16().float())


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_come_and_moments_do_not(saved: Any, tmp_path: Path, stage: int) -> None:
    report = _imported(saved("gpt2", stage, frozen="wpe"), "gpt2", tmp_path)
    ours = _whole(CheckpointReader(report.checkpoint), "model.embedding.positions.weight", "master")
    assert torch.equal(ours, built("gpt2").transformer.wpe.weight.flatten())  # type: ignore[union-attr, operator]
    assert report.kinds == ("master",)
    assert any("frozen" in line for line in report.lost)


def test_the_command_its_report_and_the_config(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(saved("gpt2", 1), folder)
    out = tmp_path / "out"
    refused = call("convert", "from-deepspeed", folder, out).refusal()
    assert "no config.json is in it or above it" in refused
    _described("gpt2", folder)
    done = call("convert", "from-deepspeed", folder, out, "--dtype", "bf16")
    assert done.code == 0, done.output
    assert "lost: position in the data" in done.stdout
    report = json.loads((out / "import.json").read_text())
    assert report["kinds"] == ["master", "exp_avg", "exp_avg_sq"]
    assert [g["weight_decay"] for g in report["settings"]["optimizer_groups"]] == [0.1, 0.0]
    config = load_config(str(out / "config.yaml"), ["data.path=given"])
    assert config.checkpoint.init_from == report["checkpoint"]
    assert "exists and is not empty" in call("convert", "from-deepspeed", folder, out).refusal()


def test_what_cannot_be_put_together_is_refused(saved: Any, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(saved("gpt2", 1), folder)
    model = _described("gpt2", tmp_path)
    step = folder / f"global_step{STEPS}"

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            import_deepspeed(str(folder), str(tmp_path / "out"), model, _shapes)
        assert caught.value.remedy
        assert not (tmp_path / "out").exists()
        return caught.value.what

    unsized = tmp_path / "unsized.yaml"
    unsized.write_text(dump_yaml({"model": {**MEGASCALE, "vocab_size": None}}))
    with pytest.raises(UserError, match=r"model\.vocab_size is not given"):
        import_deepspeed(str(folder), str(tmp_path / "out"), str(unsized), _shapes)
    other_width = tmp_path / "other.yaml"
    other_width.write_text(dump_yaml({"model": {**MEGASCALE, "num_layers": 1}}))
    with pytest.raises(UserError, match=r"are not those of \S*other\.yaml:") as caught:
        import_deepspeed(str(folder), str(tmp_path / "out"), str(other_width), _shapes)
    assert "config.json" not in str(caught.value)
    second = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.rename(tmp_path / "kept")
    assert "1 of 2 *_optim_states.pt are there" in refusal()
    second.write_bytes((tmp_path / "kept").read_bytes()[:-100])
    assert "is no intact file of torch.save" in refusal()
    (tmp_path / "kept").rename(second)
    other = step / "mp_rank_01_model_states.pt"
    shutil.copy(step / "mp_rank_00_model_states.pt", other)
    assert "2 tensor-parallel ranks" in refusal()
    other.rename(step / "layer_01-model_states.pt")
    assert "a pipeline of DeepSpeed" in refusal()
    (step / "layer_01-model_states.pt").unlink()
    (folder / "latest").write_text("../elsewhere")
    assert "`latest` names" in refusal()
    (folder / "latest").unlink()
    assert "mp_rank_00_model_states.pt" in refusal()


GARBAGE = (None, "x", -3, {"a": 1}, torch.zeros(3, 3))


@pytest.mark.parametrize("stage", [1, 3])
def test_garbage_in_any_place_is_a_mistake_of_the_file(
    saved: Any, tmp_path: Path, stage: int
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(saved("gpt2" if stage == 1 else "llama", stage), folder)
    model = _described("gpt2" if stage == 1 else "llama", tmp_path)
    step, refused = folder / f"global_step{STEPS}", 0
    for path in (next(step.glob("*00_model_states.pt")), next(step.glob("*_0_*optim_states.pt"))):
        content = torch.load(path, weights_only=False)
        places = [(key,) for key in content]
        states = content.get("optimizer_state_dict")
        places += [("optimizer_state_dict", key) for key in states or ()]
        for place in places:
            for value in GARBAGE:
                planted = {**content}
                if len(place) == 2:
                    planted[place[0]] = {**states, place[1]: value}
                else:
                    planted[place[0]] = value
                torch.save(planted, path)
                try:
                    import_deepspeed(str(folder), str(tmp_path / "out"), model, _shapes)
                except UserError:
                    refused += 1
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
        torch.save(content, path)
    assert refused >= 2 * len(GARBAGE)
