"""A head's product and its cross-entropy as one: the logits never exist whole.

Logits are the largest tensor of a training step: (N, V), for 2,048 tokens of a vocabulary of
50,304 in fp32 412 MB, and again as much for their gradient. Here a block of tokens at a time is
multiplied, turned in place from logits into their gradient

    d loss / d z_j = (1 + 2 c L) exp(z_j - L) - (1 - e) [j = y] - e / V        (cross_entropy.py)

and multiplied back at once, to the gradients of the hidden states and of the weight. The backward
only scales them: the loss is a sum that nothing but a factor follows.

    block             z = h W^T  ->  softmax, L, loss  ->  dz, each in the place of the one before
    group of blocks   dh = dz W,  dW += dz^T h   in fp32; a group is as large as its memory allows,
                                                 because each addition passes over all of dW

With the vocabulary cut over ranks the rows' maxima, and then their sums, are reduced over the
group, as in cross_entropy.py: the same bytes, in one message for each group of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.kernels.library import LIBRARY
from megascale.kernels.passes import (
    accumulate_,
    multiplies,
    probabilities_,
    product_,
    weight_gradient_,
)
from megascale.models.gradient_sink import sink_of
from megascale.wide import wide_dtype, widen

GROUP_BYTES = 64 * 2**20
"""Of the logits that are kept for one addition to the weight's gradient."""

BLOCK_ELEMENTS = 2**24
"""Of the logits that are multiplied at a time: small enough for the caches of a large CPU."""

PART_ELEMENTS = 2**23
"""Of the logits whose gradient is multiplied back at a time, likewise."""

LEAST_LIKELIHOOD = 1e-30
"""A probability from which its logarithm is exact; below, fp32 soon has no more digits."""

FEW_ELEMENTS = 2**19
"""Of the logits that a pass works on at a time: each line of it walks over them."""


@dataclass(frozen=True)
class LossTerms:
    """What is added up over the targets; see `TokenLoss`.

    Attributes:
        vocab_size: V of the whole vocabulary.
        first_id: first id of the part of it that the weight has.
        group: the ranks that share it; None where the weight is whole.
        ignore_index: label of positions without a target.
        label_smoothing, z_loss: see `TokenLoss`. softcap: see `LMHead`.
    """

    vocab_size: int
    first_id: int = 0
    group: dist.ProcessGroup | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: LossTerms
) -> Tensor:
    """Sum of the losses of ``hidden @ weight.T + bias`` in nats, a scalar of the wide dtype.

    Args:
        hidden: (N, D). weight: (V_local, D). bias: (V_local,) or None.
        labels: (N,) ids of the whole vocabulary.
        terms: the loss; the ranks of its group give the same hidden states and labels.
    """
    given = (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return _LinearCrossEntropy.apply(*given, labels, terms, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        terms: LossTerms,
        gradients: bool,
    ) -> Tensor:
        work = _Pass(hidden, weight, bias, labels, terms, gradients)
        loss = work.run()
        ctx.grad_hidden, ctx.grad_weight, ctx.grad_bias = work.grads
        ctx.dtype, ctx.sink, ctx.claimed = hidden.dtype, work.sink, work.claimed
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: a backward that keeps the graph may come twice (never one with a sink)
        def scaled(values: Tensor | None) -> Tensor | None:
            return None if values is None else (values * grad).to(ctx.dtype)

        grad_weight = None
        if ctx.claimed:
            ctx.grad_weight.mul_(grad)
        elif ctx.sink is not None and ctx.grad_weight is not None:
            ctx.sink.numbers().addcmul_(ctx.grad_weight, grad)
        else:
            grad_weight = scaled(ctx.grad_weight)
        return scaled(ctx.grad_hidden), grad_weight, scaled(ctx.grad_bias), None, None, None


class _Pass:
    """One pass over all tokens: the loss, and the gradients of the sum where they are wanted."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        terms: LossTerms,
        gradients: bool,
    ) -> None:
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.labels, self.terms, self.gradients = labels, terms, gradients
        self.sink = sink_of(weight) if gradients else None
        place = self.sink.claim() if self.sink else None
        self.claimed = place is not None
        self._hidden: Tensor | None = torch.empty_like(hidden) if gradients else None
        self._weight: Tensor | None = place
        self._bias: Tensor | None = None
        self._first = True  # nothing was added to the weight's gradient yet
        self._compiled = multiplies(weight)

    @property
    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias."""
        return self._hidden, self._weight, self._bias

    def run(self) -> Tensor:
        """The sum of the losses."""
        tokens, vocabulary = len(self.hidden), len(self.weight)
        block = _power_of_two(BLOCK_ELEMENTS // vocabulary)
        row_bytes = vocabulary * self.hidden.element_size()
        group = max(block, _power_of_two(GROUP_BYTES // row_bytes))
        if self._compiled:  # which reorder the weight for each block
            block = group
        total = torch.zeros((), dtype=wide_dtype(self.hidden.dtype), device=self.hidden.device)
        buffer = self.hidden.new_empty(min(group, tokens), vocabulary)
        for rows in _slices(tokens, group):
            hidden, labels = self.hidden[rows], self.labels[rows]
            own = buffer[: len(labels)]
            # ranks meet once in a group; a rank alone finishes a block while it is in the caches
            for part in _slices(len(labels), group if self.terms.group else block):
                total += self._losses(hidden[part], labels[part], own[part], block)
            if self.gradients:
                self._multiply_back(rows, own)
        return total

    def _losses(self, hidden: Tensor, labels: Tensor, logits: Tensor, block: int) -> Tensor:
        """Sum of the losses of some tokens; their logits are made, and then their gradient."""
        own_labels = labels - self.terms.first_id
        elsewhere = (own_labels < 0) | (own_labels >= logits.shape[1])
        own_labels = own_labels.masked_fill(elsewhere, 0)
        compiled = self.terms.softcap is None and LIBRARY.takes(logits)
        few = block if compiled else max(1, FEW_ELEMENTS // logits.shape[1])
        softmax = probabilities_ if compiled else partial(_to_probabilities_, terms=self.terms)
        parts = []
        for rows in _slices(len(labels), block):
            self._multiply(hidden[rows], logits[rows])
            for some in _slices(rows.stop - rows.start, few):
                parts.append(softmax(logits[rows][some], own_labels[rows][some]))
        counted = labels != self.terms.ignore_index
        own_log_z, target, total = torch.cat(parts, dim=1)
        losses, log_z = _losses(own_log_z, target, total, elsewhere, self.terms)
        if self.gradients:
            scale = counted.to(log_z.dtype) * (1 + 2 * self.terms.z_loss * log_z)
            hits = torch.where(elsewhere | ~counted, -1, own_labels)
            for some in _slices(len(labels), few):
                _to_gradient_(
                    logits[some],
                    hits[some],
                    own_log_z[some],
                    log_z[some],
                    scale[some],
                    counted[some],
                    self.terms,
                )
        return losses.masked_fill(~counted, 0.0).sum()

    def _multiply(self, hidden: Tensor, out: Tensor) -> None:
        if self._compiled:
            product_(hidden, self.weight.t(), out, self.bias)
        elif self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def _multiply_back(self, rows: slice, gradient: Tensor) -> None:
        """From the gradient of a group's logits to those of what made them.

        A part of the vocabulary at a time, whose gradient is still in the caches when it is used
        for the second product, whose product is when it is added. Measured for 1,024 tokens of
        50,304 x 384 in bf16: 462 against 578 ms for both products whole.
        """
        assert self._hidden is not None
        hidden, wide = self.hidden[rows], wide_dtype(gradient.dtype)
        if self._weight is None:
            self._weight = torch.empty_like(self.weight, dtype=wide)
        of_hidden = torch.zeros_like(hidden, dtype=wide)
        step = _power_of_two(PART_ELEMENTS // max(1, len(hidden)))
        for words in _slices(len(self.weight), step):
            part, own = gradient[:, words], self._weight[words]
            if self._compiled:
                product_(part, self.weight[words], of_hidden, add=True)
                weight_gradient_(part, hidden, own, not self._first, None, False)
                continue
            _add(of_hidden, part @ self.weight[words])
            product = part.t() @ hidden  # of no token: zeros
            own.copy_(product) if self._first else _add(own, product)
        self._hidden[rows] = of_hidden
        if self.bias is not None:
            summed = gradient.sum(0, dtype=wide)
            self._bias = summed if self._bias is None else self._bias + summed
        self._first = False


def _add(total: Tensor, values: Tensor) -> None:
    if LIBRARY.takes(values) and total.dtype == torch.float32:
        accumulate_(total, values)
    else:
        total += values


def _slices(length: int, step: int) -> list[slice]:
    """Consecutive intervals of `step` rows; of no rows a single empty one."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step) or [0]]


def _power_of_two(number: int) -> int:
    """The largest one that is not larger, at least 1: matrix products like such sizes."""
    return 1 << max(0, number.bit_length() - 1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    wide = widen(logits)
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def _to_probabilities_(logits: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """Put the part's probabilities in the logits' place, unless the logits are bounded.

    The softmax is the library's own kernel, one pass in the wide dtype; the normaliser follows from
    a logit and its probability: the label's, or where that is next to nothing the largest.

    Returns:
        (3, N): log of the part's normaliser, the label's logit, the sum of the logits (0 where no
        label smoothing wants it).
    """
    values = logits if terms.softcap is None else _capped(logits, terms.softcap)
    probabilities = torch.softmax(values, -1, dtype=wide_dtype(logits.dtype))
    target = widen(values.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    likelihood = probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if logits.is_cuda or bool((likelihood < LEAST_LIKELIHOOD).any()):
        log_z = widen(values.amax(-1)) - probabilities.amax(-1).log()
    else:
        log_z = target - likelihood.log()
    total = values.sum(-1, dtype=log_z.dtype) if terms.label_smoothing else torch.zeros_like(log_z)
    if terms.softcap is None:
        logits.copy_(probabilities)
    return torch.stack([log_z, target, total])


def _losses(
    own_log_z: Tensor, target: Tensor, total: Tensor, elsewhere: Tensor, terms: LossTerms
) -> tuple[Tensor, Tensor]:
    """Loss and log Z of each token, (N,); the part's sums become the vocabulary's."""
    log_z = own_log_z
    if terms.group is not None:
        largest = own_log_z.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=terms.group)
        sums = [torch.exp(own_log_z - largest), target.masked_fill(elsewhere, 0.0)]
        reduced = torch.stack([*sums, total] if terms.label_smoothing else sums)
        dist.all_reduce(reduced, group=terms.group)
        log_z, target = reduced[0].log() + largest, reduced[1]
        total = reduced[-1]
    losses = log_z - target
    if terms.label_smoothing:
        losses = losses + terms.label_smoothing * (target - total / terms.vocab_size)
    if terms.z_loss:
        losses = losses + terms.z_loss * log_z.square()
    return losses, log_z


def _to_gradient_(
    logits: Tensor,
    hits: Tensor,
    own_log_z: Tensor,
    log_z: Tensor,
    scale: Tensor,
    counted: Tensor,
    terms: LossTerms,
) -> None:
    """Put d loss / d logit in the place of what `_to_probabilities_` left.

    Args:
        logits: (N, V_local). hits: (N,) the label's column, or -1. The rest (N,): logs of the
            part's and of the whole normaliser, factor of the probabilities, whether it counts.
    """
    values = None
    out = logits
    if terms.softcap is not None:
        values = _capped(logits, terms.softcap)
        out = torch.softmax(values, dim=-1)
    trivial = terms.group is None and not terms.z_loss
    if not trivial or out.is_cuda or not bool(counted.all()):
        out *= (scale * torch.exp(own_log_z - log_z)).unsqueeze(-1).to(out.dtype)
    if terms.label_smoothing:
        spread = counted.to(out.dtype) * (terms.label_smoothing / terms.vocab_size)
        out -= spread.unsqueeze(-1)
    taken = (1 - terms.label_smoothing) * (hits >= 0).to(out.dtype)
    # not scatter_add_, which on CPU copies all of its tensor (torch 2.13: 38 ms for 256 x 50,304)
    place = torch.arange(len(out), device=out.device), hits.clamp(min=0)
    out.index_put_(place, -taken, accumulate=True)
    if values is not None and terms.softcap is not None:
        logits.copy_(out.mul_(1 - (values / terms.softcap).square()))
