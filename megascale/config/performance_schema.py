"""The section `performance` of the settings; see schema.py."""

from __future__ import annotations

from typing import Literal

from megascale.config.fields import Section

Choice = Literal["auto", "always", "never"]


class PerformanceConfig(Section):
    """Faster ways to the same result, up to rounding."""

    fused_loss: Choice = "auto"
    """Whether head and loss are computed a part of the tokens at a time, so that logits never
    exist whole; auto: unless in fp16, whose gradients would miss the loss scale on the way."""
    attention: Literal["auto", "sdpa", "blockwise"] = "auto"
    """How attention without dropout or soft-cap is computed: torch's fused kernel, or a block of
    queries at a time, in bf16 compiled where the CPU multiplies it; auto: the second in bf16 and
    fp16 on CPU, where it is faster."""
    recompute_activation: Choice = "auto"
    """Whether the backward computes the MLP's activation again from what goes into it, instead of
    keeping both; auto: on CPU, but not in zero-bubble schedules, where either half of a backward
    would do it."""
    fused_optimizer: Choice = "auto"
    """Whether adamw and sgd update a tensor in one pass over it; auto: yes, except on the CPU where
    copies of a weight lie at different places of DeepSpeed's flat partitions."""
    compiled_kernels: Choice = "auto"
    """Whether attention, matrix products, softmax, GELU, AdamW and dropout's masks on CPU are C++
    that is compiled at the first use on a machine; auto: where a compiler is found, in bf16, and
    masks; always: in fp32, too, but for attention, products and AdamW."""
    keep_memory: Choice = "auto"
    """Whether glibc's allocator keeps freed memory for the next tensors instead of returning it to
    the system and mapping it anew, page by page; auto: on CPU. It changes no other allocator."""
    shared_memory: Literal["auto", "never"] = "auto"
    """Whether ranks on one machine do collectives of the CPU through memory that they share instead
    of gloo's sockets; auto: where the system lets them."""
