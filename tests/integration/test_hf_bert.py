"""BERTs of transformers in, trained on, and out again; heads that a file lacks are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    PreTrainedModel,
)

from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.errors import UserError
from megascale.hf.exporting import export_model
from megascale.hf.importing import Imported, import_model
from megascale.parallel.fragment import Fragment, whole_box
from megascale.training.inference import LoadedModel
from tests.bert_data import make_bert_dataset
from tests.hf_models import save_model
from tests.integration.runs import call, metrics

CPU = torch.device("cpu")
VOCAB = 283
POOLER = {"sentence_head.dense.weight", "sentence_head.dense.bias"}
CLASSIFIER = {"sentence_head.classifier.weight", "sentence_head.classifier.bias"}
TOKEN_HEAD = {
    *("head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias"),
    "head.decoder.bias",
}
THEIR_POOLER = {"pooler.dense.weight", "pooler.dense.bias"}
THEIR_CLASSIFIER = {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset for BERT in data/ and its WordPiece tokenizer in tokenizer/."""
    folder = tmp_path_factory.mktemp("hf_bert")
    make_bert_dataset(folder)
    return folder


def tiny_bert(kind: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """A BERT in which nothing is 0 or 1, of odd sizes."""
    sizes = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5}
    sizes |= {"intermediate_size": 17, "max_position_embeddings": 24, "vocab_size": VOCAB}
    torch.manual_seed(1)
    model = kind(BertConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[1, 12:] = 0
    return {
        "input_ids": torch.randint(VOCAB, (2, 19), generator=generator),
        "token_type_ids": torch.randint(2, (2, 19), generator=generator),
        "attention_mask": mask,
    }


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def logits_of(checkpoint: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        return LoadedModel(checkpoint, CPU).module.logits(**batch())  # type: ignore[operator]


def initial(imported: Imported, name: str) -> torch.Tensor:
    """A parameter of a new model with the import's config."""
    loaded = LoadedModel(imported.checkpoint, CPU)
    value = dict(loaded.module.named_parameters())[name].detach()
    shape = tuple(value.shape)
    part = Fragment(name, "master", shape, whole_box(shape), 0, value.view(-1))
    loaded.task.fill_initial(part)
    return value


def check_out(imported: Imported, out: Path, sentence: bool) -> None:
    """Exported, transformers' classes load it with the logits of our model and nothing missing."""
    tokens, relation = logits_of(imported.checkpoint)
    loaded = LoadedModel(imported.checkpoint, CPU)
    export_model(loaded.reader, loaded.tokenizer, str(out), shard_bytes=20_000)
    masked, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["mismatched_keys"]
    assert bool(info["unexpected_keys"]) == sentence  # the head that this class does not have
    both, info = AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert isinstance(both, BertForPreTraining)
    assert bool(info["missing_keys"]) == (not sentence)
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert_equal(tokens, masked.eval()(**batch()).logits)
        outputs = both.eval()(**batch())
    assert_equal(tokens, outputs.prediction_logits)
    assert (relation is not None) == sentence
    if relation is not None:
        assert_equal(relation, outputs.seq_relationship_logits)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining" if sentence else "BertForMaskedLM"]
    assert loaded.tokenizer is not None
    assert config["pad_token_id"] == loaded.tokenizer.require_bert_tokens().ids["pad"]
    assert not (out / "generation_config.json").exists()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert ("AutoModelForPreTraining" if sentence else "AutoModelForMaskedLM") in card
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token == "[MASK]"
    text = "the quick fox, 123."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == loaded.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("kind", "wanted", "drawn", "left_out"),
    [
        (BertForPreTraining, None, set(), set()),
        (
            BertForPreTraining,
            "none",
            set(),
            {f"bert.{name}" for name in THEIR_POOLER} | THEIR_CLASSIFIER,
        ),
        (BertForMaskedLM, None, set(), set()),
        (BertForMaskedLM, "nsp", POOLER | CLASSIFIER, set()),
        (BertModel, None, TOKEN_HEAD, THEIR_POOLER),
        (BertModel, "sop", TOKEN_HEAD | CLASSIFIER, set()),
    ],
)
def test_in_and_out(
    kind: type[PreTrainedModel],
    wanted: str | None,
    drawn: set[str],
    left_out: set[str],
    prepared: Path,
    tmp_path: Path,
) -> None:
    reference = tiny_bert(kind)
    folder = save_model(reference, tmp_path / "theirs", prepared / "tokenizer")
    imported = import_model(str(folder), str(tmp_path / "ours"), _shapes, sentence_objective=wanted)
    assert set(imported.drawn) == drawn
    assert set(imported.left_out) == left_out
    tokens, relation = logits_of(imported.checkpoint)
    with torch.no_grad():
        theirs = reference(**batch())
    if kind is BertForPreTraining:
        assert_equal(tokens, theirs.prediction_logits)
        if relation is not None:
            assert_equal(relation, theirs.seq_relationship_logits)
    elif kind is BertForMaskedLM:
        assert_equal(tokens, theirs.logits)
    else:
        module = LoadedModel(imported.checkpoint, CPU).module
        with torch.no_grad():
            assert_equal(module.model(**batch()), theirs.last_hidden_state)  # type: ignore[operator]
    weights = dict(LoadedModel(imported.checkpoint, CPU).module.named_parameters())
    for name in drawn:
        assert torch.equal(weights[name], initial(imported, name)), name
    sentence = wanted != "none" and (wanted is not None or kind is BertForPreTraining)
    check_out(imported, tmp_path / "out", sentence)


def test_names_of_old_files(prepared: Path, tmp_path: Path) -> None:
    """gamma and beta, position_ids, and the decoder's copies instead of what they are tied to."""
    reference = tiny_bert(BertForPreTraining)
    folder = save_model(reference, tmp_path / "theirs", prepared / "tokenizer", "1GB")
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    words = old["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.weight"] = words.clone()
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(old, folder / "model.safetensors")
    imported = import_model(str(folder), str(tmp_path / "ours"), _shapes)
    assert not imported.drawn
    assert not imported.left_out
    tokens, _ = logits_of(imported.checkpoint)
    with torch.no_grad():
        assert_equal(tokens, reference(**batch()).prediction_logits)


def test_what_cannot_be_imported(prepared: Path, tmp_path: Path) -> None:
    reference = tiny_bert(BertForPreTraining)
    folder = save_model(reference, tmp_path / "theirs", None, "1GB")
    file = folder / "model.safetensors"
    whole = load_file(file)

    def refusal(tensors: dict[str, torch.Tensor], **changes: Any) -> str:
        save_file(tensors, file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError) as caught:
            import_model(str(folder), str(tmp_path / "ours"), _shapes)
        (folder / "config.json").write_text(json.dumps(config))
        return caught.value.what

    half = dict(whole)
    del half["cls.predictions.transform.dense.weight"], half["bert.pooler.dense.bias"]
    half["classifier.weight"] = torch.zeros(3, 30)
    said = refusal(half)
    assert "missing: cls.predictions.transform.dense.weight" in said
    assert "missing: bert.pooler.dense.bias" in said
    assert "not in the model: classifier.weight" in said
    other = dict(whole) | {"cls.predictions.decoder.bias": whole["cls.predictions.bias"] + 1}
    assert "cls.predictions.decoder.bias differs from cls.predictions.bias" in refusal(other)
    assert "word_embeddings.weight: the file has (283, 30)" in refusal(whole, vocab_size=300)
    assert "position_embedding_type = 'relative_key'" in refusal(
        whole, position_embedding_type="relative_key"
    )
    assert "is_decoder = True" in refusal(whole, is_decoder=True)
    few = tiny_bert(BertForMaskedLM, vocab_size=200)
    save_model(few, tmp_path / "few", prepared / "tokenizer")
    with pytest.raises(UserError) as caught:
        import_model(str(tmp_path / "few"), str(tmp_path / "ours"), _shapes)
    assert "ids, its config.json vocab_size = 200" in caught.value.what


def test_train_on_and_export(prepared: Path, tmp_path: Path) -> None:
    """The commands as a user types them, from an encoder without heads."""
    folder = save_model(tiny_bert(BertModel), tmp_path / "theirs", prepared / "tokenizer")
    done = call("convert", "from-hf", folder, tmp_path / "ours", "--sentence-objective", "nsp")
    assert done.code == 0, done.output
    assert "initialised as in a new model: head.dense.weight" in done.stdout
    start = tmp_path / "ours" / "checkpoints" / "step_00000000"
    report = call("evaluate", start, "--data", prepared / "data", "--json")
    assert report.code == 0, report.output
    assert json.loads(report.stdout)["masked_lm_loss"] > 3
    options = [f"data.path={prepared / 'data'}", "train.max_steps=3", "optimizer.lr=1e-2"]
    options += ["train.global_batch_size=4", "logging.tensorboard=false"]
    options += ["data.split=[0.8,0.2]"]
    done = call("train", tmp_path / "ours" / "config.yaml", *options)
    assert done.code == 0, done.output
    lines = metrics(tmp_path / "ours" / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]

    checkpoint = tmp_path / "ours" / "run" / "checkpoints" / "step_00000003"
    done = call("convert", "to-hf", checkpoint, tmp_path / "out")
    assert done.code == 0, done.output
    assert f"{tmp_path / 'out'}: bert, " in done.stdout
    tokens, relation = logits_of(str(checkpoint))
    both = AutoModelForPreTraining.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        outputs = both(**batch())
    assert_equal(tokens, outputs.prediction_logits)
    assert relation is not None
    assert_equal(relation, outputs.seq_relationship_logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 steps, " in card
    assert "masked tokens, next sentence" in card
    again = import_model(str(tmp_path / "out"), str(tmp_path / "twice"), _shapes)
    assert not again.drawn
    assert CheckpointReader(again.checkpoint).manifest.parameters


def test_a_decoder_has_no_sentence_objective(tmp_path: Path) -> None:
    from tests.hf_models import tiny_model

    folder = save_model(tiny_model("gpt2"), tmp_path / "theirs", None)
    done = call("convert", "from-hf", folder, tmp_path / "ours", "--sentence-objective", "nsp")
    assert "only a bert has a sentence objective" in done.refusal()


def test_resume_does_not_take_imported_weights_for_a_run(prepared: Path, tmp_path: Path) -> None:
    """--resume onto the import's folder is refused; on a run that began with it, it goes on."""
    folder = save_model(tiny_bert(BertForMaskedLM), tmp_path / "theirs", prepared / "tokenizer")
    assert call("convert", "from-hf", folder, tmp_path / "ours").code == 0
    config = tmp_path / "ours" / "config.yaml"
    options = [f"data.path={prepared / 'data'}", "train.max_steps=2", "optimizer.lr=1e-2"]
    options += ["train.global_batch_size=4", "logging.tensorboard=false"]

    onto = f"run.output_dir={tmp_path / 'ours'}"
    before = config.read_text()
    said = call("train", config, *options, onto, "--resume").refusal()
    assert "step_00000000 holds weights only" in said
    assert "checkpoint.init_from" in said
    assert "already holds checkpoints" in call("train", config, *options, onto).refusal()
    assert config.read_text() == before

    done = call("train", config, *options, "--resume")  # nothing to resume: the import's weights
    assert done.code == 0, done.output
    assert "initial weights from" in done.stdout
    first = metrics(tmp_path / "ours" / "run")
    (tmp_path / "ours" / "checkpoints").rename(tmp_path / "moved")
    done = call("train", config, *options, "train.max_steps=3", "--resume")
    assert done.code == 0, done.output
    assert "at step 2" in done.stdout
    assert "initial weights from" not in done.stdout
    lines = metrics(tmp_path / "ours" / "run")
    assert lines[:2] == first
    assert len(lines) == 3
