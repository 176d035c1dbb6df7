"""Analytic counts of parameters and floating-point operations of a GPT and a BERT."""

from __future__ import annotations

from megascale.models.bert import BERTConfig
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
    layers = (layer_flops_per_token(config, i, seq_length) for i in range(config.num_layers))
    return sum(layers) + head_flops_per_token(config)


def layer_flops_per_token(config: GPTConfig, layer: int, seq_length: int) -> int:
    """The part of `flops_per_token` that the layer with this global index has."""
    attention_width = config.num_attention_heads * config.head_dim
    seen = min(config.window(layer) or seq_length, seq_length)
    return 6 * _layer_matmul_weights(config) + 12 * attention_width * seen


def head_flops_per_token(config: GPTConfig) -> int:
    """The part of `flops_per_token` that the head has."""
    return 6 * config.vocab_size * config.hidden_size


def _bert_layer_matmul_weights(config: BERTConfig) -> int:
    d = config.hidden_size
    return 4 * d * d + 2 * d * config.ffn_hidden_size


def bert_num_parameters(config: BERTConfig, sentence_head: bool) -> int:
    """Parameters of the encoder with its masked-LM head and, if asked, pooler and sentence head.

    Tied weights count once: what transformers' BertForPreTraining and BertForMaskedLM hold.
    """
    d, norm = config.hidden_size, 2 * config.hidden_size
    tables = (config.vocab_size + config.seq_length + config.num_token_types) * d
    layer = _bert_layer_matmul_weights(config) + 5 * d + config.ffn_hidden_size + 2 * norm
    masked_lm_head = d * d + d + norm + config.vocab_size
    sentence = d * d + d + 2 * d + 2 if sentence_head else 0
    return tables + norm + config.num_layers * layer + masked_lm_head + sentence


def bert_flops_per_token(config: BERTConfig, seq_length: int, mask_probability: float) -> float:
    """Model FLOPs per token of one forward and backward pass; see `flops_per_token`.

    Differs from a GPT's in the head, which sees masked tokens only. Padding counts as tokens; the
    sentence head, one position of a sample, is left out.
    """
    layers = config.num_layers * bert_layer_flops_per_token(config, seq_length)
    return layers + bert_head_flops_per_token(config, mask_probability)


def bert_layer_flops_per_token(config: BERTConfig, seq_length: int) -> int:
    """The part of `bert_flops_per_token` that one layer has."""
    return 6 * _bert_layer_matmul_weights(config) + 12 * config.hidden_size * seq_length


def bert_head_flops_per_token(config: BERTConfig, mask_probability: float) -> float:
    """The part of `bert_flops_per_token` that the masked-LM head has."""
    d = config.hidden_size
    return 6 * mask_probability * (d * d + config.vocab_size * d)
