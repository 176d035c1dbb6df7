from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megascale.errors import UserError
from megascale.models.attention import Visibility
from megascale.models.chunk import Chunk
from megascale.models.dropout import CounterDropout, sample_keys
from megascale.models.gpt import GPT, GPTConfig
from megascale.models.head import LMHead
from megascale.models.rotary import Rotary, apply_rotary, rotary_frequencies, rotary_tables
from tests.initial import initialize

GPT2_STYLE = GPTConfig(
    vocab_size=29,
    num_layers=3,
    hidden_size=24,
    num_attention_heads=4,
    num_kv_heads=4,
    ffn_hidden_size=40,
    seq_length=16,
)
LLAMA_STYLE = replace(
    GPT2_STYLE,
    num_kv_heads=2,
    position_embedding="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_word_embeddings=False,
)
GEMMA_STYLE = replace(
    LLAMA_STYLE,
    head_width=8,
    norm_unit_offset=True,
    norm_placement="sandwich",
    activation="geglu_tanh",
    qk_norm=True,
    query_scaling=5.0,
    attention_softcap=2.0,
    logit_softcap=3.0,
    sliding_window=3,
    global_layer_interval=2,
    scale_embeddings=True,
    rope_local_theta=100.0,
    rope_scaling="linear",
    rope_scaling_factor=2.0,
)
NEOX_STYLE = replace(
    GPT2_STYLE,
    position_embedding="rope",
    rotary_fraction=0.7,  # 4 of a head's 6 features
    parallel_residual=True,
    attention_output_bias=False,
    sliding_window=5,
    tie_word_embeddings=False,
)
STYLES = pytest.mark.parametrize(
    "config",
    [GPT2_STYLE, LLAMA_STYLE, GEMMA_STYLE, NEOX_STYLE],
    ids=["gpt2", "llama", "gemma", "neox"],
)


def build(config: GPTConfig, **changes: Any) -> GPT:
    """A model whose norms and biases are not trivially 1 and 0."""
    model = GPT(replace(config, **changes))
    initialize(model, 3, init_std=0.2, num_layers=config.num_layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(29, (batch, length), generator=generator)


def test_parameter_names() -> None:
    linear = ("attention.query", "attention.key", "attention.value", "attention.output")
    norms = ("attention_norm", "mlp_norm")
    gpt2 = {"embedding.tokens.weight", "embedding.positions.weight"}
    gpt2 |= {"final_norm.weight", "final_norm.bias"}
    llama = {"embedding.tokens.weight", "final_norm.weight"}
    for layer in range(3):
        stem = f"layers.{layer}."
        names = [stem + name for name in (*linear, *norms, "mlp.up", "mlp.down")]
        gpt2 |= {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        llama |= {f"{name}.weight" for name in (*names, stem + "mlp.gate")}
    assert {name for name, _ in GPT(GPT2_STYLE).named_parameters()} == gpt2
    assert {name for name, _ in GPT(LLAMA_STYLE).named_parameters()} == llama
    assert not list(GPT(LLAMA_STYLE).buffers())
    norms = {name for name, _ in GPT(GEMMA_STYLE).named_parameters() if name.endswith(".offset")}
    stems = [f"layers.{layer}." for layer in range(3)]
    four = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    heads = ("attention.query_norm", "attention.key_norm")
    wanted = {f"{stem}{name}.offset" for stem in stems for name in (*four, *heads)}
    assert norms == wanted | {"final_norm.offset"}
    biased = {name for name, _ in GPT(NEOX_STYLE).named_parameters() if name.endswith(".bias")}
    assert "layers.0.attention.query.bias" in biased
    assert "layers.0.attention.output.bias" not in biased


def test_offsets_start_at_zero_and_norms_at_one() -> None:
    model = GPT(GEMMA_STYLE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    initialize(model, 3, init_std=0.2, num_layers=3)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith(".offset"))


def test_windows() -> None:
    """Layers 0 and 2 of the Gemma style see 3 tokens, layer 1 all."""
    assert [GEMMA_STYLE.window(layer) for layer in range(3)] == [3, None, 3]
    assert [NEOX_STYLE.window(layer) for layer in range(3)] == [5, 5, 5]
    one = replace(NEOX_STYLE, num_layers=1)
    model, ids = build(one), tokens(1, 12)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 29
    moved = (model(ids) - model(changed)).abs().amax(dim=(0, 2)) > 1e-5
    assert moved.tolist() == [2 <= position < 2 + 5 for position in range(12)]
    wide = replace(one, sliding_window=12)
    assert torch.equal(build(wide)(ids), build(replace(one, sliding_window=None))(ids))


def test_softcap_bounds() -> None:
    head = LMHead(24, 29, tied=False, softcap=0.5)
    logits = head(100 * torch.randn(2, 5, 24))
    assert 0.49 < logits.abs().max() <= 0.5
    small = head(1e-3 * torch.randn(2, 5, 24))
    assert small.abs().max() < 1e-2


def test_partial_rotation_leaves_the_rest() -> None:
    rotary = NEOX_STYLE.rotary(0)
    assert rotary is not None
    assert rotary.width == 4
    x, positions = torch.randn(1, 6, 2, 6), torch.arange(6)[None]
    turned = apply_rotary(x, *rotary_tables(positions, rotary))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert (turned[:, 1:, :, :4] - x[:, 1:, :, :4]).abs().amin(dim=(0, 2)).max() > 1e-3
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_llama3_stretches_long_wavelengths_only() -> None:
    cpu = torch.device("cpu")
    plain = rotary_frequencies(Rotary(1e4, 64), cpu)
    scaled = rotary_frequencies(Rotary(1e4, 64, "llama3", 8.0, 1.0, 4.0, 256), cpu)
    wavelengths = 2 * torch.pi / plain
    long, short = wavelengths > 256, wavelengths < 64
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    assert torch.equal(scaled[short], plain[short])
    between = ~long & ~short
    assert between.any()
    assert ((plain / 8 < scaled) & (scaled < plain))[between].all()


@STYLES
def test_future_tokens_change_nothing(config: GPTConfig) -> None:
    model = build(config)
    ids = tokens(2, 11)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 29
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-2


@STYLES
@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
def test_packed_documents_equal_documents_apart(config: GPTConfig, kernel: str) -> None:
    # fp64: the sums of rows that are longer by what is masked are grouped otherwise
    model = build(config, attention_kernel=kernel).double()
    lengths = (4, 1, 8)
    ids = tokens(2, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    keys = sample_keys(0, torch.arange(2))
    packed = model(ids, positions, documents, keys)
    apart = [model(part, dropout_keys=keys) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=0, atol=1e-12)
    joined = model(ids, positions, dropout_keys=keys)
    assert (packed - joined)[:, 4:].abs().max() > 1e-2
    torch.testing.assert_close(packed[:, :4], joined[:, :4], rtol=0, atol=1e-12)


def test_rotary_positions_are_relative_and_learned_ones_are_not() -> None:
    ids = tokens(1, 6)
    shifted = torch.arange(6)[None] + 9
    rope, learned = build(LLAMA_STYLE), build(GPT2_STYLE)
    torch.testing.assert_close(rope(ids), rope(ids, shifted), rtol=0, atol=1e-5)
    assert (learned(ids) - learned(ids, shifted)).abs().max() > 1e-2
    spread = torch.arange(6)[None] * 2
    assert (rope(ids) - rope(ids, spread)).abs().max() > 1e-2


@STYLES
def test_explicit_attention_equals_fused(config: GPTConfig) -> None:
    """With a vanishing dropout rate nothing is dropped, but the explicit path runs."""
    fused, explicit = build(config), build(config, attention_dropout=1e-9)
    ids, keys = tokens(2, 9), sample_keys(0, torch.arange(2))
    outputs = [fused(ids), explicit(ids, dropout_keys=keys)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)
    for output in outputs:
        output.square().sum().backward()
    for (name, left), right in zip(fused.named_parameters(), explicit.parameters(), strict=True):
        assert left.grad is not None, name
        scale = left.grad.abs().max().item()
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=2e-5 * max(scale, 1.0))


@STYLES
def test_dropout_does_not_depend_on_the_batch(config: GPTConfig) -> None:
    model = build(config, dropout=0.3, attention_dropout=0.2)
    ids, keys = tokens(3, 10), sample_keys(5, torch.tensor([30, 10, 20]))
    together = model(ids, dropout_keys=keys)
    assert torch.equal(together, model(ids, dropout_keys=keys))
    for row in range(3):
        alone = model(ids[row : row + 1], dropout_keys=keys[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(model.eval()(ids), build(config)(ids), rtol=0, atol=0)
    with pytest.raises(ValueError, match="dropout_keys"):
        model.train()(ids)


@STYLES
def test_every_dropout_site_is_its_own_and_drops(config: GPTConfig) -> None:
    model = build(config, dropout=0.3, attention_dropout=0.2)
    drops = {n: m for n, m in model.named_modules() if isinstance(m, CounterDropout)}
    places = ("attention.core.dropout", "attention_dropout", "mlp_dropout")
    expected = {f"layers.{layer}.{place}" for layer in range(3) for place in places}
    assert set(drops) == expected | {"embedding.dropout"}
    assert len({drop.site for drop in drops.values()}) == len(drops)
    for name, drop in drops.items():
        assert drop.p == (0.2 if "core" in name else 0.3), name

    ids, keys = tokens(3, 10), sample_keys(5, torch.arange(3))
    quiet = build(config)(ids)
    for name, drop in drops.items():
        for other in drops.values():
            other.train(other is drop)
        assert (model(ids, dropout_keys=keys) - quiet).abs().max() > 1e-2, name


@STYLES
def test_cut_for_a_pipeline_gives_the_same(config: GPTConfig) -> None:
    whole, first, last = (build(config, dropout=0.2, attention_dropout=0.1) for _ in range(3))
    first.final_norm = last.embedding = None
    del first.layers["2"], last.layers["0"], last.layers["1"]
    assert {name.split(".")[1] for name, _ in last.layers.named_parameters("layers")} == {"2"}
    ids, keys = tokens(2, 12), sample_keys(0, torch.arange(2))
    documents = torch.arange(12).expand(2, -1) // 5
    extra = {"document_ids": documents, "dropout_keys": keys}
    hidden = first(ids, **extra, chunk=Chunk(0, 2, 3))
    chunked = last(ids, **extra, hidden=hidden, chunk=Chunk(2, 3, 3))
    assert torch.equal(whole(ids, **extra), chunked)
    names = {name for chunk in (first, last) for name, _ in chunk.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}


@STYLES
def test_attention_cut_along_heads_adds_up(config: GPTConfig) -> None:
    """What tensor parallelism does: half of the heads a rank, the outputs summed."""
    whole = build(config, attention_dropout=0.3).layers["1"].attention
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    keys = sample_keys(0, torch.arange(2))
    total = torch.zeros(2, 7, 24)
    for rank in range(2):
        part = build(config, attention_dropout=0.3).layers["1"].attention
        for projection in (part.query, part.key, part.value):
            for name, parameter in projection.named_parameters():
                rows = parameter.data.chunk(2)[rank].clone()
                setattr(projection, name, torch.nn.Parameter(rows))
        part.output.weight = torch.nn.Parameter(part.output.weight.data.chunk(2, dim=1)[rank])
        part.core.dropout.set_shard(0, rank, 2)
        total += part(x, positions, Visibility(), keys)
    if whole.output.bias is not None:
        total -= whole.output.bias  # added on both ranks
    torch.testing.assert_close(whole(x, positions, Visibility(), keys), total, rtol=0, atol=2e-6)


@STYLES
def test_bf16_stays_close_to_fp32(config: GPTConfig) -> None:
    model, half = build(config), build(config).to(torch.bfloat16)
    ids = tokens(2, 12)
    output = half(ids)
    assert output.dtype == torch.bfloat16
    error = (output.float() - model(ids)).abs().max() / model(ids).abs().max()
    assert 0 < error < 5e-2


def test_sequence_longer_than_the_learned_positions() -> None:
    with pytest.raises(UserError, match=r"17 tokens.*seq_length=16"):
        GPT(GPT2_STYLE)(tokens(1, 17))
    assert GPT(LLAMA_STYLE)(tokens(1, 17)).shape == (1, 17, 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 26}, "hidden_size=26, num_attention_heads=4"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"position_embedding": "rope", "hidden_size": 20}, "head width of 5"),
        ({"activation": "relu"}, "'relu'.*\n.*gelu_tanh"),
        ({"norm": "batchnorm"}, "batchnorm"),
        ({"position_embedding": "alibi"}, "alibi"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_scaling": "yarn"}, "'yarn'"),
        ({"norm_placement": "post"}, "'post'"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"attention_softcap": -1.0}, "attention_softcap=-1.0"),
        ({"position_embedding": "rope", "rotary_fraction": 0.1}, "on 0.1 of it"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(GPT2_STYLE, **changes)


def test_head_tied_and_untied() -> None:
    hidden, table = torch.randn(2, 5, 24), torch.randn(29, 24)
    tied, untied = LMHead(24, 29, tied=True), LMHead(24, 29, tied=False)
    assert not list(tied.parameters())
    assert [name for name, _ in untied.named_parameters()] == ["weight"]
    torch.testing.assert_close(tied(hidden, table), hidden @ table.T)
    torch.testing.assert_close(untied(hidden), hidden @ untied.weight.T)
    with pytest.raises(ValueError, match="without tied_weight"):
        tied(hidden)
    with pytest.raises(ValueError, match="with tied_weight"):
        untied(hidden, table)
