"""Analytic counts of parameters and floating-point operations of a GPT."""

from __future__ import annotations

from megascale.models.gpt import GPTConfig
from megascale.models.mlp import is_gated


def _layer_matmul_weights(config: GPTConfig) -> int:
    """Elements of the weight matrices of one layer."""
    d, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    width = config.num_attention_heads * config.head_dim
    attention = 2 * d * width + 2 * d * kv_width  # query and output, key and value
    num_matrices = 3 if is_gated(config.activation) else 2
    return attention + num_matrices * d * config.ffn_hidden_size


def _layer_biases(config: GPTConfig) -> int:
    """Elements of the linear biases of one layer."""
    num_wide = 2 if is_gated(config.activation) else 1
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp = num_wide * config.ffn_hidden_size + config.hidden_size
    biases = (
        (config.has_qkv_bias, qkv),
        (config.has_attention_output_bias, config.hidden_size),
        (config.has_mlp_bias, mlp),
    )
    return sum(size for present, size in biases if present)


def num_parameters(config: GPTConfig) -> int:
    """Parameters of the model with its head, which counts only when untied."""
    d = config.hidden_size
    vectors = 2 if config.norm == "layernorm" and config.bias else 1  # of one norm
    norm, head_norm = vectors * d, vectors * config.head_dim
    norms = (4 if config.norm_placement == "sandwich" else 2) * norm
    norms += 2 * head_norm if config.qk_norm else 0
    layer = _layer_matmul_weights(config) + _layer_biases(config) + norms
    tables = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    if config.position_embedding == "learned":
        tables += config.seq_length * d
    return tables + config.num_layers * layer + norm


def flops_per_token(config: GPTConfig, seq_length: int) -> int:
    """Model FLOPs per token of one forward and backward pass: ``6 N + 12 D s`` over the layers.

    N counts the weights that take part in matrix products: those of the layers and the head's
    V x D (tied or not); embedding lookups, norms and biases are left out. 12 D s is the score and
    value products of one layer's attention over all s positions, or over the window where that is
    shorter (the causal half is not subtracted), with D = heads x head width. The backward pass
    counts twice the forward pass; recomputation is not counted. This is the convention of
    Megatron-LM (arXiv:2104.04473, section 5.1, without recomputation) and of PaLM
    (arXiv:2204.02311, appendix B), hence of the MFU we print.

    Args:
        seq_length: s, tokens a sample.
    """
    head = config.vocab_size * config.hidden_size
    matmul_weights = config.num_layers * _layer_matmul_weights(config) + head
    attention_width = config.num_attention_heads * config.head_dim
    windows = (config.window(layer) for layer in range(config.num_layers))
    seen = sum(min(window or seq_length, seq_length) for window in windows)
    return 6 * matmul_weights + 12 * attention_width * seen
