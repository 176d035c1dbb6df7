"""Our BERT against transformers' BertForPreTraining and BertForMaskedLM, fp32, with padding.

Random weights, all of them perturbed. Logits at every position (padding included), losses and
every gradient agree within 1e-5 of each tensor's largest value. The tolerance may never be
loosened.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from megascale.models.bert import BERTConfig
from megascale.training.tasks.bert import BERTModule
from tests.parity.test_hf_parity import assert_close, perturb

LAYER_PARTS = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
}
EMBEDDINGS = {
    "word_embeddings.weight": "tokens.weight",
    "position_embeddings.weight": "positions.weight",
    "token_type_embeddings.weight": "token_types.weight",
    "LayerNorm.weight": "norm.weight",
    "LayerNorm.bias": "norm.bias",
}
MASKED_LM = {"transform.dense": "dense", "transform.LayerNorm": "norm"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a batch."""

    batch: int
    length: int
    vocab: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    token_types: int = 2
    activation: str = "gelu"

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


SHAPES = [
    Shape(2, 7, 53, 1, 1, 6, 11),
    Shape(3, 17, 131, 3, 4, 9, 50, token_types=3),
    Shape(4, 33, 97, 2, 3, 16, 192),
    Shape(2, 12, 64, 4, 2, 5, 40, activation="gelu_tanh"),
]


def names(layers: int, sentence_head: bool) -> dict[str, str]:
    """Their parameter names -> ours."""
    table = {
        f"bert.embeddings.{theirs}": f"model.embedding.{ours}"
        for theirs, ours in EMBEDDINGS.items()
    }
    modules = {
        f"bert.encoder.layer.{layer}.{theirs}": f"model.layers.{layer}.{ours}"
        for layer in range(layers)
        for theirs, ours in LAYER_PARTS.items()
    }
    modules |= {f"cls.predictions.{k}": f"head.{v}" for k, v in MASKED_LM.items()}
    if sentence_head:
        modules["bert.pooler.dense"] = "sentence_head.dense"
        modules["cls.seq_relationship"] = "sentence_head.classifier"
    for theirs, ours in modules.items():
        table |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return table | {"cls.predictions.bias": "head.decoder.bias"}


def build(shape: Shape, sentence_head: bool) -> tuple[nn.Module, BERTModule]:
    """Their model with perturbed weights, and ours with the same."""
    torch.manual_seed(0)
    theirs = (BertForPreTraining if sentence_head else BertForMaskedLM)(
        BertConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_new"}[shape.activation],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=shape.length + 3,
            type_vocab_size=shape.token_types,
            pad_token_id=0,
            attn_implementation="eager",
        )
    )
    perturb(theirs, seed=shape.length)
    config = BERTConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        seq_length=shape.length + 3,
        num_token_types=shape.token_types,
        activation=shape.activation,  # type: ignore[arg-type]
    )
    ours = BERTModule(config, seed=0, sentence_objective="nsp" if sentence_head else "none")
    values, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    table = names(shape.layers, sentence_head)
    assert set(values) == set(table), set(values) ^ set(table)
    assert set(parameters) == set(table.values()), set(parameters) ^ set(table.values())
    for name, our_name in table.items():
        assert parameters[our_name].shape == values[name].shape, name
        parameters[our_name].data.copy_(values[name].detach())
    return theirs, ours


def make_batch(shape: Shape, sentence_head: bool) -> dict[str, Tensor]:
    """Ids, token types, padding of different lengths, labels at some real positions."""
    generator = torch.Generator().manual_seed(shape.batch)

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    lengths = torch.linspace(shape.length, 3, shape.batch).long()
    real = torch.arange(shape.length)[None] < lengths[:, None]
    assert not real.all()
    labels = draw(shape.vocab, shape.batch, shape.length)
    chosen = (draw(3, shape.batch, shape.length) == 0) & real
    chosen[0, 1] = True
    batch = {
        # padding holds any id: nothing may depend on it
        "input_ids": draw(shape.vocab - 1, shape.batch, shape.length) + 1,
        "token_type_ids": draw(shape.token_types, shape.batch, shape.length),
        "attention_mask": real.long(),
        "labels": labels.masked_fill(~chosen, -100),
    }
    if sentence_head:
        batch["sentence_labels"] = draw(2, shape.batch)
    return batch


@pytest.mark.parametrize("sentence_head", [True, False], ids=["pretraining", "masked_lm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_losses_and_gradients(shape: Shape, sentence_head: bool) -> None:
    theirs, ours = build(shape, sentence_head)
    batch = make_batch(shape, sentence_head)
    theirs.train()
    ours.train()
    passed = {name: value for name, value in batch.items() if name != "sentence_labels"}
    if sentence_head:
        expected = theirs(**passed, next_sentence_label=batch["sentence_labels"])
        expected_logits = expected.prediction_logits
    else:
        expected = theirs(**passed)
        expected_logits = expected.logits

    inputs = {k: v for k, v in batch.items() if "labels" not in k}
    token_logits, sentence_logits = ours.logits(**inputs)
    assert_close("logits", token_logits, expected_logits)
    masked_lm = F.cross_entropy(expected_logits.flatten(0, 1), batch["labels"].flatten())
    sums, counts = ours(**batch)
    losses = sums / counts
    assert_close("masked-LM loss", losses[0], masked_lm)
    if sentence_head:
        assert_close("sentence logits", sentence_logits, expected.seq_relationship_logits)
        sentence = F.cross_entropy(expected.seq_relationship_logits, batch["sentence_labels"])
        assert_close("sentence loss", losses[1], sentence)
    assert_close("loss", losses.sum(), expected.loss)

    expected.loss.backward()
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if name.endswith("self.key.bias"):
            # zero in exact arithmetic (softmax does not see a shift): compared with the weight's
            scale = dict(theirs.named_parameters())[name.replace("bias", "weight")].grad
            difference = gradients[names(shape.layers, sentence_head)[name]] - parameter.grad
            assert difference.abs().max() <= 1e-5 * scale.abs().max(), name
            continue
        assert_close(name, gradients[names(shape.layers, sentence_head)[name]], parameter.grad)


def test_what_padding_holds_changes_nothing() -> None:
    _, ours = build(SHAPES[1], True)
    ours.eval()
    batch = make_batch(SHAPES[1], True)
    expected, _, _ = ours(**batch)
    padding = batch["attention_mask"] == 0
    batch["input_ids"][padding] = 1
    batch["token_type_ids"][padding] = 2
    found, _, _ = ours(**batch)
    assert torch.equal(found, expected)
