"""Our BERT against transformers' BertForPreTraining and BertForMaskedLM, fp32, with padding.

Random weights, all of them perturbed. Logits at every position (padding included), losses and
every gradient agree within 1e-5 of each tensor's largest value. The tolerance may never be
loosened. Settings and weights go through the table of megascale/hf/bert.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from megascale.config.load import load_config
from megascale.hf.bert import BERT
from megascale.hf.family import Entry
from megascale.hf.registry import family_for
from megascale.training.tasks.bert import BERTModule
from megascale.training.tasks.registry import build_task
from tests.parity.test_hf_parity import assert_close, perturb


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
    Shape(2, 9, 1001, 2, 3, 7, 13),
]


def build(shape: Shape, sentence_head: bool) -> tuple[nn.Module, BERTModule, list[Entry]]:
    """Their model with perturbed weights, ours with the same, and the table's entries."""
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
    settings = BERT.read_config(theirs.config.to_dict())
    objective = "nsp" if sentence_head else "none"
    data = {"path": "none", "sentence_objective": objective}
    config = load_config({"model": settings, "data": data})
    assert family_for(config.model) is BERT
    ours = build_task(config).build_module()
    assert isinstance(ours, BERTModule)
    values, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    entries = BERT.entries(shapes, config.model.num_layers)
    assert set(values) == {entry.theirs for entry in entries}
    for entry in entries:
        (name,) = entry.ours
        assert parameters[name].shape == values[entry.theirs].shape, name
        parameters[name].data.copy_(values[entry.theirs].detach())
    return theirs, ours, entries


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
    theirs, ours, entries = build(shape, sentence_head)
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
    expected_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for entry in entries:
        gradient, wanted = gradients[entry.ours[0]], expected_gradients[entry.theirs]
        if entry.theirs.endswith("self.key.bias"):
            # zero in exact arithmetic (softmax does not see a shift): compared with the weight's
            scale = expected_gradients[entry.theirs.replace("bias", "weight")]
            assert (gradient - wanted).abs().max() <= 1e-5 * scale.abs().max(), entry.theirs
            continue
        assert_close(entry.theirs, gradient, wanted)


def test_what_padding_holds_changes_nothing() -> None:
    _, ours, _ = build(SHAPES[1], True)
    ours.eval()
    batch = make_batch(SHAPES[1], True)
    expected, _, _ = ours(**batch)
    padding = batch["attention_mask"] == 0
    batch["input_ids"][padding] = 1
    batch["token_type_ids"][padding] = 2
    found, _, _ = ours(**batch)
    assert torch.equal(found, expected)
