"""Our GPT against transformers' models with the same random weights, fp32.

Logits, loss and every gradient agree within 1e-5 of each tensor's largest value. The tolerance
may never be loosened.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megascale.models.gpt import GPT, GPTConfig
from megascale.models.head import LMHead

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Source:
    """Our parameters that make up one of theirs: concatenated along dim 0, then transposed."""

    names: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Shape:
    """A test case: sizes of the model and of the batch."""

    batch: int
    length: int
    vocab: int
    layers: int
    heads: int
    head_dim: int
    ffn: int
    kv_heads: int | None = None

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


def gpt2_sources(num_layers: int) -> dict[str, Source]:
    table = {
        "transformer.wte.weight": Source(("embedding.tokens.weight",)),
        "transformer.wpe.weight": Source(("embedding.positions.weight",)),
    }
    parts = {
        "ln_1": ("attention_norm",),
        "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
        "attn.c_proj": ("attention.output",),
        "ln_2": ("mlp_norm",),
        "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",),
    }
    for kind in ("weight", "bias"):
        table[f"transformer.ln_f.{kind}"] = Source((f"final_norm.{kind}",))
        for layer in range(num_layers):
            for theirs, ours in parts.items():
                names = tuple(f"layers.{layer}.{name}.{kind}" for name in ours)
                conv1d = kind == "weight" and ".c_" in theirs
                table[f"transformer.h.{layer}.{theirs}.{kind}"] = Source(names, conv1d)
    return table


def llama_sources(num_layers: int, tied: bool, bias: bool) -> dict[str, Source]:
    table = {
        "model.embed_tokens.weight": Source(("embedding.tokens.weight",)),
        "model.norm.weight": Source(("final_norm.weight",)),
    }
    if not tied:
        table["lm_head.weight"] = Source(("head.weight",))
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    linears = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    for layer in range(num_layers):
        for theirs, ours in (norms | linears).items():
            kinds = ("weight", "bias") if bias and theirs in linears else ("weight",)
            for kind in kinds:
                source = Source((f"layers.{layer}.{ours}.{kind}",))
                table[f"model.layers.{layer}.{theirs}.{kind}"] = source
    return table


def perturb(model: nn.Module, seed: int) -> None:
    """Nothing stays 0 or 1: a forgotten bias or norm weight would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def load(ours: dict[str, nn.Parameter], theirs: nn.Module, table: dict[str, Source]) -> None:
    """Copy their weights into ours; nothing may be left over on either side."""
    values = dict(theirs.named_parameters())
    assert set(values) == set(table)
    used = [name for source in table.values() for name in source.names]
    assert sorted(used) == sorted(ours)
    for name, source in table.items():
        value = values[name].detach()
        value = value.T if source.transposed else value
        parts = [ours[part] for part in source.names]
        pieces = value.split([part.shape[0] for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            assert part.shape == piece.shape, name
            part.data.copy_(piece)


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


def compare(
    reference: PreTrainedModel, config: GPTConfig, table: dict[str, Source], shape: Shape
) -> None:
    perturb(reference, seed=shape.length)
    model = GPT(config)
    head = LMHead(config.hidden_size, config.vocab_size, config.tie_word_embeddings)
    ours = dict(model.named_parameters())
    ours |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    load(ours, reference, table)

    generator = torch.Generator().manual_seed(shape.batch)
    ids = torch.randint(config.vocab_size, (shape.batch, shape.length), generator=generator)
    expected = reference(input_ids=ids, labels=ids)
    tied = model.embedding.tokens.weight if config.tie_word_embeddings else None
    logits = head(model(ids), tied)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close("logits", logits, expected.logits)
    assert_close("loss", loss, expected.loss)

    expected.loss.backward()
    loss.backward()
    for name, parameter in reference.named_parameters():
        source = table[name]
        gradient = torch.cat([ours[part].grad for part in source.names])
        assert_close(name, gradient.T if source.transposed else gradient, parameter.grad)


@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        (Shape(2, 7, 53, 1, 1, 6, 11), "gelu_tanh"),
        (Shape(3, 17, 131, 3, 4, 9, 50), "gelu_tanh"),
        (Shape(1, 33, 97, 2, 3, 16, 192), "gelu_tanh"),
        (Shape(2, 12, 64, 4, 2, 5, 40), "gelu"),
    ],
)
def test_gpt2(shape: Shape, activation: str) -> None:
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab,
            n_positions=shape.length + 3,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.ffn,
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[activation],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )
    config = GPTConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_kv_heads=shape.heads,
        ffn_hidden_size=shape.ffn,
        seq_length=shape.length + 3,
        activation=activation,
    )
    compare(reference, config, gpt2_sources(shape.layers), shape)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("shape", "bias", "theta"),
    [
        (Shape(2, 7, 53, 1, 2, 4, 11, kv_heads=2), False, 10000.0),
        (Shape(3, 19, 131, 3, 6, 8, 50, kv_heads=2), False, 10000.0),
        (Shape(1, 40, 97, 2, 5, 6, 70, kv_heads=1), False, 500000.0),
        (Shape(2, 13, 61, 2, 4, 10, 36, kv_heads=2), True, 1000.0),
    ],
)
def test_llama(shape: Shape, bias: bool, theta: float, tied: bool) -> None:
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_theta=theta,  # transformers 4; in 5 it is the next line that counts
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            attention_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=tied,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )
    config = GPTConfig(
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_kv_heads=shape.kv_heads or shape.heads,
        ffn_hidden_size=shape.ffn,
        seq_length=64,
        position_embedding="rope",
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="swiglu",
        bias=bias,
        rope_theta=theta,
        tie_word_embeddings=tied,
    )
    compare(reference, config, llama_sources(shape.layers, tied, bias), shape)
