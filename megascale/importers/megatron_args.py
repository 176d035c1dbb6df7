"""Megatron-LM's arguments as settings of `model`.

Megatron keeps some hundred arguments in its checkpoints. Those that decide how logits are computed
from weights are read here; each other value of one that is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.errors import UserError
from megascale.hf.fields import simplified

_ONLY: dict[str, tuple[Any, ...]] = {
    "num_experts": (None,),
    "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "rotary_interleaved": (False,),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "is_hybrid_model": (False,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "mtp_num_layers": (None, 0),
    "retro_add_retriever": (False,),
    "use_mup": (False,),
}
"""Argument -> the values that megascale computes; None and an absent one are always among them."""


def model_settings(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings of ModelConfig for the arguments of a GPT.

    Raises:
        UserError: arguments that change the computation and are not supported; all are named.
    """
    problems = [
        f"{name} = {args[name]!r}"
        for name, values in _ONLY.items()
        if args.get(name) is not None and args[name] not in values
    ]
    required = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size")
    problems += [f"{name} is missing" for name in required if not args.get(name)]
    if not problems:
        positions, norm = _positions(args, problems), _norm(args, problems)
    if problems:
        raise UserError(
            f"{where} has arguments that megascale does not compute:\n    "
            + "\n    ".join(problems),
            rule="every argument that changes the logits must be supported",
            remedy="convert a dense GPT with LayerNorm or RMSNorm, learned or rotary positions, "
            "gelu or swiglu",
        )
    grouped = args.get("group_query_attention", False)
    settings = {
        "family": "gpt",
        "num_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "num_attention_heads": args["num_attention_heads"],
        "head_dim": args.get("kv_channels"),
        "num_kv_heads": args.get("num_query_groups") if grouped else None,
        "ffn_hidden_size": args.get("ffn_hidden_size") or 4 * args["hidden_size"],
        "vocab_size": args["padded_vocab_size"],
        "activation": _activation(args),
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "qk_norm": bool(args.get("qk_layernorm", False)),
        "dropout": args.get("hidden_dropout", 0.1),
        "attention_dropout": args.get("attention_dropout", 0.1),
        "init_std": args.get("init_method_std", 0.02),
    }
    return simplified({**settings, **positions, **norm, **_biases(args)})


def _positions(args: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    kind = args.get("position_embedding_type")
    kind = getattr(kind, "name", kind) or "learned_absolute"
    if args.get("use_rotary_position_embeddings"):
        kind = "rope"
    if kind == "learned_absolute" and args.get("add_position_embedding", True):
        length = args.get("max_position_embeddings") or args.get("seq_length")
        return {"position_embedding": "learned", "seq_length": length}
    if kind != "rope":
        problems.append(f"position_embedding_type = {kind!r}")
        return {}
    settings: dict[str, Any] = {
        "position_embedding": "rope",
        "seq_length": args.get("seq_length") or args.get("max_position_embeddings"),
        "rope_theta": float(args.get("rotary_base") or 10000),
        "rotary_fraction": float(args.get("rotary_percent") or 1.0),
    }
    stretch = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):  # Llama 3.1's, whose other numbers Megatron has as constants
        if stretch:
            problems.append("use_rope_scaling with rotary_seq_len_interpolation_factor")
        factor = float(args.get("rope_scaling_factor") or 8.0)
        settings |= {"rope_scaling": "llama3", "rope_scaling_factor": factor}
        settings |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
        settings |= {"rope_original_length": 8192}
    elif stretch and stretch != 1:
        settings |= {"rope_scaling": "linear", "rope_scaling_factor": float(stretch)}
    return settings


def _norm(args: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    known = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
    name = args.get("normalization") or "LayerNorm"
    if name not in known:
        problems.append(f"normalization = {name!r}")
        return {}
    epsilon = args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5
    return {"norm": known[name], "norm_eps": epsilon}


def _activation(args: Mapping[str, Any]) -> str:
    if args.get("swiglu"):
        return "swiglu"
    # Megatron's fused bias and gelu is the tanh approximation; without biases there is no fusion
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if fused or args.get("openai_gelu") else "gelu"


def _biases(args: Mapping[str, Any]) -> dict[str, Any]:
    linear = args.get("add_bias_linear", True)
    return {
        "bias": linear or args.get("normalization", "LayerNorm") == "LayerNorm",
        "qkv_bias": linear or bool(args.get("add_qkv_bias", False)),
        "attention_output_bias": linear,
        "mlp_bias": linear,
    }
