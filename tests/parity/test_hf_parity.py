"""Our decoders against transformers' models with the same random weights, fp32.

Logits, loss and every gradient agree within 1e-5 of each tensor's largest value. The tolerance
may never be loosened. Settings and weights go through the tables of megascale.hf, which are
thereby tested, too; nothing may be left over on either side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megascale.config.load import load_config
from megascale.hf.family import Entry
from megascale.hf.registry import FAMILIES, family_for, family_of
from megascale.training.tasks.gpt import GPTModule
from megascale.training.tasks.registry import build_task

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A family with its config.json, and the shape of the batch."""

    family: str
    batch: int
    length: int
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}-{self.batch}x{self.length}"


def gpt2(batch: int, length: int, layers: int, heads: int, width: int, **more: Any) -> Case:
    config = {
        "vocab_size": 97,
        "n_positions": length + 3,
        "n_embd": heads * width,
        "n_layer": layers,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return Case("gpt2", batch, length, config | more)


def llama_style(
    family: str, batch: int, length: int, layers: int, heads: int, kv: int, width: int, **more: Any
) -> Case:
    config = {
        "vocab_size": 131,
        "hidden_size": heads * width,
        "intermediate_size": 3 * heads + 5,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 64,
    }
    return Case(family, batch, length, config | more)


def neox(batch: int, length: int, layers: int, heads: int, width: int, **more: Any) -> Case:
    case = llama_style("gpt_neox", batch, length, layers, heads, heads, width, **more)
    case.config.pop("num_key_value_heads")
    return case


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **more}


LLAMA3 = rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)

CASES = (
    gpt2(2, 7, 1, 1, 6, n_inner=11),
    gpt2(3, 17, 3, 4, 9, n_inner=50),
    gpt2(1, 33, 2, 3, 16),
    gpt2(2, 12, 4, 2, 5, n_inner=40, activation_function="gelu"),
    gpt2(2, 11, 2, 2, 5, tie_word_embeddings=False),
    # Llama 2, biases, Llama 3 with its rope scaling, heads wider than hidden_size / heads
    llama_style("llama", 2, 7, 1, 2, 2, 4, rope_parameters=rope(10000.0)),
    llama_style("llama", 3, 19, 3, 6, 2, 8, tie_word_embeddings=True),
    llama_style("llama", 2, 13, 2, 4, 2, 10, attention_bias=True, mlp_bias=True),
    llama_style("llama", 1, 41, 2, 5, 1, 6, rope_parameters=LLAMA3, mlp_bias=True),
    llama_style("llama", 2, 37, 2, 4, 2, 16, rope_parameters=LLAMA3, head_dim=32),
    llama_style(
        "llama", 2, 23, 2, 2, 1, 8, rope_parameters=rope(1000.0, rope_type="linear", factor=3.0)
    ),
    llama_style("mistral", 2, 29, 2, 4, 2, 6, sliding_window=5),
    llama_style("mistral", 1, 40, 3, 3, 1, 8, sliding_window=13, head_dim=12),
    llama_style("mistral", 2, 9, 2, 2, 2, 6, sliding_window=9),
    llama_style("mistral", 2, 9, 1, 2, 2, 6, sliding_window=None),
    llama_style("qwen2", 2, 17, 2, 4, 2, 6),
    llama_style("qwen2", 1, 30, 3, 3, 3, 10, tie_word_embeddings=True),
    llama_style(
        "qwen2", 2, 21, 2, 2, 1, 8, use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
    llama_style("qwen3", 2, 15, 2, 4, 2, 6, head_dim=10),
    llama_style("qwen3", 1, 35, 3, 3, 1, 8, head_dim=16, attention_bias=True),
    neox(2, 14, 2, 4, 8),
    neox(1, 31, 3, 3, 12, rotary_pct=0.5, use_parallel_residual=False),
    neox(3, 9, 1, 2, 6, rotary_pct=1.0, hidden_act="gelu_new", attention_bias=False),
    llama_style(
        "gemma2", 2, 19, 2, 4, 2, 6, head_dim=10, sliding_window=6, query_pre_attn_scalar=7
    ),
    llama_style(
        "gemma2",
        *(1, 33, 3, 2, 1, 8),
        head_dim=8,
        sliding_window=9,
        attn_logit_softcapping=0.3,
        final_logit_softcapping=0.7,
    ),
    llama_style(
        "gemma3_text",
        *(2, 25, 4, 4, 2, 6),
        head_dim=10,
        sliding_window=6,
        query_pre_attn_scalar=9,
        layer_types=[*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": rope(100.0),
            "full_attention": rope(10000.0, rope_type="linear", factor=8.0),
        },
    ),
    llama_style("gemma3_text", 1, 18, 6, 2, 1, 8, head_dim=8, sliding_window=5),
)


def perturb(model: nn.Module, seed: int) -> None:
    """Nothing stays 0 or 1: a forgotten bias or norm weight would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def build_reference(case: Case) -> PreTrainedModel:
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(case.family, **case.config, **special)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    perturb(reference, seed=case.length)
    return reference.float()


def build_ours(reference: PreTrainedModel) -> tuple[GPTModule, list[Entry], int]:
    """Our model with the reference's weights, the table's entries and the number of heads."""
    described = reference.config.to_dict()
    family = family_of(described, "the reference")
    tree = {"model": family.read_config(described), "data": {"path": "none"}}
    config = load_config(tree)
    assert family_for(config.model, family.model_type) is family
    module = build_task(config).build_module()
    assert isinstance(module, GPTModule)
    ours = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in ours.items()}
    entries = family.entries(shapes, config.model.num_layers)
    heads = config.model.num_attention_heads
    theirs = dict(reference.named_parameters())
    stored = {family.canonical_name(name, {}): name for name in theirs}
    assert set(stored) == {entry.theirs for entry in entries}
    for entry in entries:
        value = theirs[stored[entry.theirs]].detach()
        parts = entry.layout.split(value, [shapes[name] for name in entry.ours], heads)
        for name, part in zip(entry.ours, parts, strict=True):
            assert ours[name].shape == part.shape, name
            ours[name].data.copy_(part)
    return module, [Entry(stored[e.theirs], e.ours, e.layout) for e in entries], heads


def assert_close(name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None, name
    assert theirs is not None, name
    assert ours.shape == theirs.shape, name
    assert torch.isfinite(ours).all(), name
    assert torch.isfinite(theirs).all(), name
    scale = theirs.abs().max().item()
    assert scale > 0, f"{name} is all zero: nothing is compared"
    error = (ours - theirs).abs().max().item() / scale
    assert error <= TOLERANCE, f"{name}: {error:.2e} of its largest value"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_loss_and_all_gradients(case: Case) -> None:
    reference = build_reference(case)
    module, entries, heads = build_ours(reference)
    generator = torch.Generator().manual_seed(case.batch)
    vocab = case.config["vocab_size"]
    ids = torch.randint(vocab, (case.batch, case.length), generator=generator)
    expected = reference(input_ids=ids, labels=ids)
    assert_close("logits", module.logits(ids), expected.logits)
    labels = torch.cat([ids[:, 1:], torch.full((case.batch, 1), -100)], dim=1)
    loss_sum, targets = module(ids, labels)
    loss = loss_sum / targets
    assert_close("loss", loss, expected.loss)

    expected.loss.backward()
    loss.backward()
    theirs = dict(reference.named_parameters())
    ours = dict(module.named_parameters())
    for entry in entries:
        gradients = [ours[name].grad for name in entry.ours]
        assert all(gradient is not None for gradient in gradients), entry.ours
        assert_close(entry.theirs, entry.layout.merge(gradients, heads), theirs[entry.theirs].grad)


def test_every_family_has_cases() -> None:
    decoders = {name for name, family in FAMILIES.items() if family.continues_texts}
    assert {case.family for case in CASES} == decoders


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_the_tables_are_those_of_transformers(family: str) -> None:
    """A config.json may leave out what transformers fills in."""
    from megascale.config.schema import ModelConfig
    from megascale.hf.fields import resolved

    table = FAMILIES[family]
    full = table.read_config(AutoConfig.for_model(family).to_dict())
    sparse = table.read_config({"model_type": family})
    assert resolved(ModelConfig(**full)) == resolved(ModelConfig(**sparse))
