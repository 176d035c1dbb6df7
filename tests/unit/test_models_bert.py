"""BERT alone: masks, dropout, shapes, counts, and the losses that the task makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from megascale.config.load import load_config
from megascale.errors import UserError
from megascale.models.bert import BERT, BERTConfig
from megascale.models.chunk import Chunk
from megascale.models.dropout import sample_keys
from megascale.models.flops import bert_flops_per_token, bert_num_parameters
from megascale.training.tasks.bert import BERTModule, bert_config
from megascale.training.tasks.registry import build_task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = BERTConfig(
    vocab_size=50,
    num_layers=2,
    hidden_size=12,
    num_attention_heads=3,
    ffn_hidden_size=20,
    seq_length=16,
    init_std=0.5,
)


def _model(config: BERTConfig = TINY) -> BERT:
    torch.manual_seed(0)
    return BERT(config)


def _ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def test_every_token_sees_every_real_token_and_no_padding() -> None:
    """d hidden[query] / d embedding[key] is zero exactly where attention is masked."""
    model, ids = _model().eval(), _ids(1)
    attention_mask = torch.tensor([[1] * 6 + [0] * 3])
    assert model.embedding is not None
    vectors = model.embedding(ids, torch.arange(9)[None], torch.zeros_like(ids), None).detach()
    vectors.requires_grad_()
    hidden = model(ids, attention_mask=attention_mask, hidden=vectors)
    for query in range(6):
        (gradient,) = torch.autograd.grad(hidden[0, query, 0], vectors, retain_graph=True)
        reached = gradient[0].abs().sum(dim=-1) > 0
        assert reached.tolist() == [True] * 6 + [False] * 3


@pytest.mark.parametrize("training", [False, True])
def test_documents_of_a_sample_do_not_see_each_other(training: bool) -> None:
    """With and without dropout on the probabilities (two code paths), each document alone."""
    config = replace(TINY, attention_dropout=0.1)
    model, ids = _model(config).train(training), _ids(1, 8)
    parts = {"first": slice(0, 5), "second": slice(5, 8)}
    documents = torch.tensor([[0] * 5 + [1] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    if training:
        # dropout is on, and drops nothing: its masks belong to other places in a smaller T x T
        for layer in model.layers.values():
            layer.attention.core.dropout.p = 1e-12
    keys = sample_keys(0, torch.tensor([3]))
    packed = model(ids, document_ids=documents, position_ids=positions, dropout_keys=keys)
    for part in parts.values():
        alone = model(ids[:, part], dropout_keys=keys)
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-5, atol=1e-6)


def test_padding_with_a_document_of_its_own_stays_finite() -> None:
    model = _model(replace(TINY, attention_dropout=0.1)).train()
    documents = torch.tensor([[0] * 5 + [1] * 4])
    mask = torch.tensor([[1] * 5 + [0] * 4])
    keys = sample_keys(0, torch.tensor([3]))
    hidden = model(_ids(1), attention_mask=mask, document_ids=documents, dropout_keys=keys)
    assert torch.isfinite(hidden).all()


def test_dropout_follows_the_sample_not_the_batch() -> None:
    model, ids = _model(replace(TINY, dropout=0.3, attention_dropout=0.2)).train(), _ids(4)
    keys = sample_keys(5, torch.arange(4))
    whole = model(ids, dropout_keys=keys)
    for row in range(4):
        alone = model(ids[row : row + 1], dropout_keys=keys[row : row + 1])
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    other = model(ids, dropout_keys=sample_keys(6, torch.arange(4)))
    assert not torch.allclose(other, whole)


def test_a_layer_keeps_its_name_when_others_are_taken_out() -> None:
    model = _model()
    del model.layers["0"]
    model.embedding = None
    assert {name.split(".")[1] for name, _ in model.named_parameters()} == {"1"}
    ids, hidden = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 12)
    assert model(ids, hidden=hidden, chunk=Chunk(1, 2, 2)).shape == (2, 3, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 0), ("hidden_size", 13), ("activation", "swiglu"), ("dropout", 1.0),
     ("norm_eps", 0.0), ("num_token_types", 0)],
)  # fmt: skip
def test_impossible_models_are_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field}={value!r}"):
        replace(TINY, **{field: value})


def test_a_too_long_sequence_is_refused() -> None:
    with pytest.raises(UserError, match="17 tokens"):
        _model()(_ids(1, 17))


@pytest.mark.parametrize("objective", ["none", "sop"])
def test_losses_are_sums_with_their_counts(objective: str) -> None:
    module = BERTModule(TINY, 0, objective).eval()
    labels = torch.full((3, 9), -100)
    labels[0, 2], labels[0, 5], labels[2, 1] = 7, 8, 9
    batch = {
        "input_ids": _ids(3),
        "labels": labels,
        "token_type_ids": torch.zeros(3, 9, dtype=torch.int64),
        "attention_mask": torch.ones(3, 9, dtype=torch.int64),
    }
    if objective != "none":
        batch["sentence_labels"] = torch.tensor([1, -100, 0])
    sums, counts, correct = module(**batch)
    assert module.objectives == ("masked_lm", "sop")[: len(sums)]
    assert counts.tolist() == [3, 2][: len(sums)]
    tokens, sentence = module.logits(
        batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    )
    pairs = [(tokens[0, 2], 7), (tokens[0, 5], 8), (tokens[2, 1], 9)]
    assert sums[0].item() == pytest.approx(sum(-x.log_softmax(-1)[y].item() for x, y in pairs))
    assert correct[0] == sum(int(x.argmax()) == y for x, y in pairs)
    if objective != "none":
        assert sentence is not None
        pairs = [(sentence[0], 1), (sentence[2], 0)]
        assert sums[1].item() == pytest.approx(sum(-x.log_softmax(-1)[y].item() for x, y in pairs))
        assert correct[1] == sum(int(x.argmax()) == y for x, y in pairs)
    labels.fill_(-100)
    sums, counts = module.train()(**batch)
    assert sums[0] == counts[0] == 0
    sums.sum().backward()


@pytest.mark.parametrize(
    ("name", "published", "masked_lm_only"),
    [("bert_base", 110_106_428, 109_514_298), ("bert_large", 336_226_108, 335_174_458)],
)
def test_shipped_configs_have_the_published_sizes(
    name: str, published: int, masked_lm_only: int
) -> None:
    """What transformers counts for bert-base-uncased and bert-large-uncased ("110M", "340M")."""
    config = load_config(CONFIGS / f"{name}.yaml", [])
    alone = config.model_copy(
        update={"data": config.data.model_copy(update={"sentence_objective": "none"})}
    )
    theirs = BertConfig(
        hidden_size=config.model.hidden_size,
        num_hidden_layers=config.model.num_layers,
        num_attention_heads=config.model.num_attention_heads,
        intermediate_size=config.model.resolved_ffn_hidden_size,
    )
    for settings, kind, expected in (
        (config, BertForPreTraining, published),
        (alone, BertForMaskedLM, masked_lm_only),
    ):
        with torch.device("meta"):
            module = build_task(settings).build_module()
            reference = kind(theirs)
        assert sum(p.numel() for p in module.parameters()) == expected
        assert sum(p.numel() for p in reference.parameters()) == expected
        sentence_head = kind is BertForPreTraining
        assert bert_num_parameters(bert_config(settings.model), sentence_head) == expected


def test_tiny_config_is_checked_and_small() -> None:
    config = load_config(CONFIGS / "bert_tiny.yaml", ["model.vocab_size=4096"])
    assert bert_num_parameters(bert_config(config.model), True) < 1_000_000


def test_flops_are_those_that_torch_counts() -> None:
    """Forward matrix products of the encoder and of the head at the masked positions."""
    # with dropout the products of attention are ones that torch counts on a CPU
    module, masked = BERTModule(replace(TINY, attention_dropout=0.1), 0, "none"), 4
    labels = torch.full((1, 16), -100)
    labels[0, :masked] = 1
    shape = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        module(shape, labels, shape, torch.ones_like(shape), sample_ids=torch.zeros(1))
    assert counter.get_total_flops() * 3 == 16 * bert_flops_per_token(TINY, 16, masked / 16)
