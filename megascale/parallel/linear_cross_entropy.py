"""A head's product and its cross-entropy as one: the logits never exist whole.

Logits are the largest tensor of a training step: (N, V), for 2,048 tokens of a vocabulary of
50,304 in fp32 412 MB, and again as much for their gradient. Here a block of tokens at a time is
multiplied, turned in place from logits into their gradient

    d loss / d z_j = (1 + 2 c L) exp(z_j - L) - (1 - e) [j = y] - e / V        (cross_entropy.py)

and multiplied back at once, to the gradients of the hidden states and of the weight. The backward
only scales them: the loss is a sum that nothing but a factor follows.

    block             z = h W^T  ->  L, loss  ->  dz in z's place
    group of blocks   dh = dz W,  dW += dz^T h   in fp32; a group is as large as its memory allows,
                                                 because each addition passes over all of dW

With the vocabulary cut over ranks the rows' maxima, and then their sums, are reduced over the
group, as in cross_entropy.py: the same bytes, in one message for each group of blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megascale.wide import wide_dtype, widen

_LOG = logging.getLogger(__name__)

GROUP_BYTES = 128 * 2**20
"""Of the logits that are kept for one addition to the weight's gradient."""

BLOCK_ELEMENTS = 2**24
"""Of the logits that are multiplied at a time: small enough for the caches of a large CPU."""

FEW_ELEMENTS = 2**19
"""Of the logits that a pass which is not compiled works on at a time."""


@dataclass(frozen=True)
class LossTerms:
    """What is added up over the targets; see `TokenLoss`.

    Attributes:
        vocab_size: V of the whole vocabulary.
        first_id: first id of the part of it that the weight has.
        group: the ranks that share it; None where the weight is whole.
        ignore_index: label of positions without a target.
        label_smoothing, z_loss: see `TokenLoss`. softcap: see `LMHead`.
        compiled: whether the passes over the logits are compiled.
    """

    vocab_size: int
    first_id: int = 0
    group: dist.ProcessGroup | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    compiled: bool = False


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
        ctx.gradients = work.grad_hidden, work.grad_weight, work.grad_bias
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: a backward that keeps the graph may come twice
        scaled = [None if g is None else (g * grad).to(ctx.dtype) for g in ctx.gradients]
        return (*scaled, None, None, None)


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
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.labels, self.terms, self.gradients = labels, terms, gradients
        self.grad_hidden: Tensor | None = torch.empty_like(hidden) if gradients else None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        self._statistics, self._differentiate = _passes(terms.compiled, terms.group is None)

    def run(self) -> Tensor:
        """The sum of the losses."""
        tokens, vocabulary = len(self.hidden), len(self.weight)
        block = _power_of_two(BLOCK_ELEMENTS // vocabulary)
        row_bytes = vocabulary * self.hidden.element_size()
        group = max(block, _power_of_two(GROUP_BYTES // row_bytes))
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
        sums = torch.empty(4, len(labels), dtype=wide_dtype(logits.dtype), device=logits.device)
        for rows in _slices(len(labels), block):
            self._multiply(hidden[rows], logits[rows])
            sums[:, rows] = self._statistics(logits[rows], own_labels[rows], self.terms.softcap)
        counted = labels != self.terms.ignore_index
        losses, log_z = _losses(sums, elsewhere, self.terms)
        if self.gradients:
            hits = torch.where(elsewhere | ~counted, -1, own_labels)
            for rows in _slices(len(labels), block):
                self._turn(logits[rows], hits[rows], counted[rows], log_z[rows])
        return losses.masked_fill(~counted, 0.0).sum()

    def _multiply(self, hidden: Tensor, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def _turn(self, logits: Tensor, hits: Tensor, counted: Tensor, log_z: Tensor) -> None:
        """Put the gradient of the sum of losses in the place of a block's logits."""
        terms = self.terms
        scale = counted.to(log_z.dtype) * (1 + 2 * terms.z_loss * log_z)
        spread = counted.to(log_z.dtype) * (terms.label_smoothing / terms.vocab_size)
        share = 1 - terms.label_smoothing
        self._differentiate(logits, hits, log_z, scale, spread, share=share, softcap=terms.softcap)

    def _multiply_back(self, rows: slice, gradient: Tensor) -> None:
        """From the gradient of a group's logits to those of what made them."""
        assert self.grad_hidden is not None
        torch.mm(gradient, self.weight, out=self.grad_hidden[rows])
        product = gradient.t() @ self.hidden[rows]  # of no token: zeros
        summed = None if self.bias is None else gradient.sum(0, dtype=wide_dtype(gradient.dtype))
        if self.grad_weight is None:
            last = rows.stop >= len(self.hidden)
            self.grad_weight, self.grad_bias = product if last else widen(product), summed
            return
        self.grad_weight += product
        if self.grad_bias is not None and summed is not None:
            self.grad_bias += summed


@cache
def _passes(compiled: bool, whole: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two passes over a block of logits: compiled, or step by step.

    Step by step, each line of them walks over a tensor: a few rows at a time, for the caches.

    Args:
        whole: whether the rows are whole, and not a rank's part of the vocabulary.
    """
    turn = _differentiate_by_softmax_ if whole else _differentiate_

    def statistics(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        parts = _slices(len(logits), max(1, FEW_ELEMENTS // logits.shape[1]))
        return torch.cat([_statistics(logits[p], labels[p], softcap) for p in parts], dim=1)

    def differentiate_(
        logits: Tensor, *rows: Tensor, share: float, softcap: float | None
    ) -> Tensor:
        for part in _slices(len(logits), max(1, FEW_ELEMENTS // logits.shape[1])):
            turn(logits[part], *(values[part] for values in rows), share=share, softcap=softcap)
        return logits

    if not compiled:
        return statistics, differentiate_
    return _compiled_or(_statistics, statistics), _compiled_or(_differentiate_, differentiate_)


def _compiled_or(
    function: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A function compiled at its first call; `plain` where there is no working compiler."""
    from torch._dynamo.exc import BackendCompilerFailed  # its import takes seconds

    compiled = torch.compile(function)
    chosen: list[Callable[..., Tensor]] = []

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if chosen:
            return chosen[0](*args, **kwargs)
        try:
            result = compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).strip().splitlines()[0]
            _LOG.warning("performance.compile: not compiled, slower, same result: %s", reason)
            chosen.append(plain)
            return plain(*args, **kwargs)
        chosen.append(compiled)
        return result

    return call


def _slices(length: int, step: int) -> list[slice]:
    """Consecutive intervals of `step` rows; of no rows a single empty one."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step) or [0]]


def _power_of_two(number: int) -> int:
    """The largest one that is not larger, at least 1: matrix products like such sizes."""
    return 1 << max(0, number.bit_length() - 1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    wide = widen(logits)
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


def _statistics(logits: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """(4, N): maximum m, sum of exp(z - m), the label's logit and the sum of the logits."""
    values = logits if softcap is None else _capped(logits, softcap)
    largest = widen(values.amax(-1, keepdim=True))
    normaliser = torch.exp(values - largest).sum(-1)
    target = widen(values.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    total = values.sum(-1, dtype=largest.dtype)
    return torch.stack([largest.squeeze(-1), normaliser, target, total])


def _losses(rows: Tensor, elsewhere: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Loss and log Z of each token, (N,); the part's statistics become the vocabulary's."""
    own_largest, normaliser, target, total = rows
    largest = own_largest
    if terms.group is not None:
        largest = own_largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=terms.group)
        sums = [normaliser * torch.exp(own_largest - largest), target.masked_fill(elsewhere, 0.0)]
        reduced = torch.stack([*sums, total] if terms.label_smoothing else sums)
        dist.all_reduce(reduced, group=terms.group)
        normaliser, target, *smoothed = reduced
        total = smoothed[0] if smoothed else total
    log_z = normaliser.log() + largest
    losses = log_z - target
    if terms.label_smoothing:
        mean = total / terms.vocab_size
        losses = losses + terms.label_smoothing * (target - mean)
    if terms.z_loss:
        losses = losses + terms.z_loss * log_z.square()
    return losses, log_z


def _differentiate_(
    logits: Tensor,
    hits: Tensor,
    log_z: Tensor,
    scale: Tensor,
    spread: Tensor,
    *,
    share: float,
    softcap: float | None,
) -> Tensor:
    """Put d loss / d logit in the logits' place.

    Args:
        logits: (N, V_local). hits: (N,) the label's column, or -1.
        log_z, scale, spread: (N,), factor of the probabilities and what is taken off each.
        share: what is taken off the label's.
    """
    wide = _capped(logits, softcap)
    out = torch.exp(wide - log_z.unsqueeze(-1)) * scale.unsqueeze(-1) - spread.unsqueeze(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    out = torch.where(columns == hits.unsqueeze(-1), out - share, out)
    if softcap is not None:
        out = out * (1 - (wide / softcap).square())
    return logits.copy_(out)


def _differentiate_by_softmax_(
    logits: Tensor,
    hits: Tensor,
    log_z: Tensor,
    scale: Tensor,
    spread: Tensor,
    *,
    share: float,
    softcap: float | None,
) -> Tensor:
    """The same of whole rows, in the library's own kernels: their log_z follows from them."""
    values = logits if softcap is None else _capped(logits, softcap)
    out = torch.softmax(values, dim=-1)
    out *= scale.unsqueeze(-1).to(out.dtype)
    out -= spread.unsqueeze(-1).to(out.dtype)
    taken = share * (hits >= 0).to(out.dtype).unsqueeze(-1)
    out.scatter_add_(-1, hits.clamp(min=0).unsqueeze(-1), -taken)
    if softcap is not None:
        out *= 1 - (values / softcap).square()
    return logits.copy_(out)
