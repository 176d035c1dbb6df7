"""Bytes that the collectives of one step carry, on one rank, by kind.

Counted is the whole tensor S of a collective. A ring of n ranks sends (n - 1)/n S for an all-gather
or a reduce-scatter and twice that for an all-reduce. Losses, norms and counts of a few numbers are
left out.

Tensor parallelism (arXiv:1909.08053, arXiv:2205.05198), a micro-batch of B samples, with
A = B T D e the bytes of one activation:

    where                       plain                     sequence parallel
    a layer, forward            2 all-reduces of A        2 all-gathers, 2 reduce-scatters
    a layer, backward           2 all-reduces             4 all-gathers, 2 reduce-scatters
    a layer, full recompute     1 or 2 all-reduces        2 all-gathers, 1 or 2 reduce-scatters
    embedding                   1 all-reduce              1 reduce-scatter, 1 all-gather
    head of a GPT               1 all-reduce              1 all-gather, 1 reduce-scatter
    whole parameters            -                         1 all-reduce of each
    loss over R targets         all-reduce of 3 R numbers in fp32 (4 R with label smoothing)

With sequence parallelism a matrix keeps only its own part of T and gathers it once more in the
backward: hence 4. The second pass of a full recomputation ends where nothing more is needed: with
the last matrix's product, before its sum, unless a dropout or a norm comes after it. A BERT's heads
see whole samples: one all-gather before them, and an all-reduce of the R masked tokens' states.

Data parallelism, N the parameters of the rank's part, M micro-batches:

    torch 0          all-reduce 4 N
    torch 1, 2, 3    all-gather e N (stage 3: 2 M times), reduce-scatter 4 N (stages 2, 3: M times)
    deepspeed 1, 2   all-reduce e N (stage 2: M times), all-gather e N
    deepspeed 3      all-gather e (M (N - P) + P), reduce-scatter e N M

DeepSpeed's stage 3 frees gathered weights only when more than 1e9 elements are there, so a smaller
model is gathered once a micro-batch and a larger one twice. With context parallelism all of this
goes over dp x cp ranks.

Context parallelism over n ranks, a layer of a micro-batch: Q the bytes of a rank's queries, K those
of its keys and values together, K' the same repeated until n divides the heads:

    ulysses     forward all-to-all 2 Q + K'         backward the same
    ring        forward send (n - 1) K              backward send (n - 1) K, and n 4 K / e (fp32)

Both do the forward once more where attention is recomputed (full; selective too: its keys and
values are not kept).

Pipeline parallelism: a stage sends its output, A over the ranks that cut T, to the next stage and
as much back, for every micro-batch, where the other stage is on another rank. A tied weight on two
ranks has its gradient exchanged once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megascale.models.bert import BERTConfig
from megascale.models.gpt import GPTConfig
from megascale.parallel.pipeline import PipelineLayout
from megascale.planner.memory import FP32, Shape

_LIVE_ELEMENTS = 10**9

Volumes = dict[str, int]
"""Kind of collective -> bytes in one step."""


@dataclass(frozen=True)
class TensorTraffic:
    """What tensor parallelism needs to know of a model.

    Attributes:
        activation: elements of one sample's (T, D).
        whole_parameters: elements of the parameters that act inside the sequence-parallel region.
        local_norms: elements of norms over the local heads, whole on each rank.
        ends_with_sum: whether the last thing of a layer that the backward needs is before its sum.
        targets: R, of one micro-batch.
        head_states: elements of the states whose gradient the head sums; 0: as an activation.
        sums_per_target: numbers a target that the loss sums.
    """

    num_layers: int
    activation: int
    whole_parameters: int
    local_norms: int
    ends_with_sum: bool
    targets: int
    sums_per_target: int = 3
    head_states: int | None = None


def gpt_traffic(model: GPTConfig, micro_batch_size: int, smoothing: bool = False) -> TensorTraffic:
    """The tensor-parallel traffic of a GPT; every token is a target."""
    width, sandwich = model.hidden_size, model.norm_placement == "sandwich"
    norm = width * (2 if model.norm == "layernorm" and model.bias else 1)
    output, down = (
        model.bias if own is None else own for own in (model.attention_output_bias, model.mlp_bias)
    )
    per_layer = (4 if sandwich else 2) * norm + (output + down) * width
    positions = model.seq_length * width if model.position_embedding == "learned" else 0
    return TensorTraffic(
        num_layers=model.num_layers,
        activation=model.seq_length * width,
        whole_parameters=model.num_layers * per_layer + norm + positions,
        local_norms=model.num_layers * 2 * model.head_dim if model.qk_norm else 0,
        ends_with_sum=model.dropout == 0 and not sandwich,
        targets=micro_batch_size * model.seq_length,
        sums_per_target=4 if smoothing else 3,
    )


def bert_traffic(model: BERTConfig, masked: int, smoothing: bool = False) -> TensorTraffic:
    """The tensor-parallel traffic of a BERT with `masked` masked tokens in a micro-batch."""
    width = model.hidden_size
    per_layer = 2 * 2 * width + 2 * width
    tables = model.seq_length + model.num_token_types
    return TensorTraffic(
        num_layers=model.num_layers,
        activation=model.seq_length * width,
        whole_parameters=model.num_layers * per_layer + 2 * width + tables * width,
        local_norms=0,
        ends_with_sum=False,
        targets=masked,
        sums_per_target=4 if smoothing else 3,
        head_states=masked * width,
    )


def tensor_volumes(
    traffic: TensorTraffic,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    sequence_parallel: bool,
    recompute: Literal["none", "selective", "full"],
    element_bytes: int,
) -> Volumes:
    """Bytes by kind over the tensor-parallel axis, one step of one rank."""
    layers = traffic.num_layers
    activation = micro_batch_size * traffic.activation * element_bytes
    again = 0 if recompute != "full" else layers * (1 if traffic.ends_with_sum else 2)
    volumes: Counter[str] = Counter()
    volumes["all_reduce"] += traffic.targets * traffic.sums_per_target * FP32
    volumes["all_reduce"] += traffic.local_norms * element_bytes
    if traffic.head_states is not None:
        volumes["all_reduce"] += traffic.head_states * element_bytes
    if not sequence_parallel:
        head = 0 if traffic.head_states is not None else 1
        volumes["all_reduce"] += (4 * layers + again + 1 + head) * activation
    else:
        head = 0 if traffic.head_states is not None else 1
        gathered = 6 * layers + (2 * layers if recompute == "full" else 0) + 2
        volumes["all_gather"] += gathered * activation
        volumes["reduce_scatter"] += (4 * layers + again + 1 + head) * activation
        volumes["all_reduce"] += traffic.whole_parameters * element_bytes
    return {kind: size * num_micro_batches for kind, size in volumes.items()}


def data_volumes(
    shapes: Sequence[Shape],
    *,
    engine: Literal["torch", "deepspeed"],
    stage: int,
    dp_size: int,
    num_micro_batches: int,
    element_bytes: int,
    kept_whole: int = 0,
) -> Volumes:
    """Bytes by kind over the data-parallel axis, one step of one rank; without padding.

    Args:
        shapes: of the rank's (tensor-parallel local) parameters.
        kept_whole: parameters of at most so many elements stay gathered in DeepSpeed's stage 3.
    """
    if dp_size == 1:
        return {}
    total, steps = sum(map(math.prod, shapes)), num_micro_batches
    if stage == 0:
        return {"all_reduce": FP32 * total}
    if engine == "torch":
        padded = sum(-(-shape[0] // dp_size) * dp_size * math.prod(shape[1:]) for shape in shapes)
        return {
            "all_gather": element_bytes * padded * (2 * steps if stage == 3 else 1),
            "reduce_scatter": FP32 * padded * (1 if stage == 1 else steps),
        }
    if stage < 3:
        reduced = element_bytes * total * (steps if stage == 2 else 1)
        return {"all_reduce": reduced, "all_gather": element_bytes * total}
    small = sum(size for size in map(math.prod, shapes) if size <= kept_whole)
    passes = steps if total <= _LIVE_ELEMENTS else 2 * steps
    return {
        "all_gather": element_bytes * (passes * (total - small) + small),
        "reduce_scatter": element_bytes * total * steps,
    }


@dataclass(frozen=True)
class ContextTraffic:
    """What context parallelism needs to know of a rank's attention.

    Attributes:
        tokens: of a micro-batch on one rank, B T / n.
        heads, kv_heads: of one tensor-parallel rank.
    """

    num_layers: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


def context_volumes(
    traffic: ContextTraffic,
    *,
    method: Literal["ulysses", "ring"],
    cp_size: int,
    num_micro_batches: int,
    recompute: Literal["none", "selective", "full"],
    element_bytes: int,
) -> Volumes:
    """Bytes by kind over the context-parallel axis, one step of one rank; without gradients."""
    passes = traffic.num_layers * num_micro_batches
    head = traffic.tokens * traffic.head_dim
    forwards = 1 if recompute == "none" else 2
    if method == "ulysses":
        repeated = math.lcm(traffic.kv_heads, cp_size)
        one_way = 2 * head * (traffic.heads + repeated) * element_bytes
        return {"all_to_all": passes * (forwards + 1) * one_way}
    keys_values = 2 * head * traffic.kv_heads
    hops = (cp_size - 1) * (forwards + 1)
    return {"send": passes * keys_values * (hops * element_bytes + cp_size * FP32)}


def pipeline_volumes(
    layout: PipelineLayout,
    rank: int,
    *,
    activation: int,
    num_micro_batches: int,
    element_bytes: int,
    tied_elements: int = 0,
) -> Volumes:
    """Bytes that one rank sends over the pipeline-parallel axis in one step.

    Args:
        activation: elements that one stage hands to the next for a micro-batch.
        tied_elements: of the rank's part of the weight that first and last stage share.
    """
    stages = layout.stages_of(rank)
    neighbours = [
        s + step for s in stages for step in (-1, 1) if 0 <= s + step < len(layout.chunks)
    ]
    handed = sum(layout.rank_of(neighbour) != rank for neighbour in neighbours)
    size = handed * activation * num_micro_batches * element_bytes
    if layout.copied_weight and rank in (0, layout.last_rank):
        size += tied_elements * FP32
    return {"send": size}
