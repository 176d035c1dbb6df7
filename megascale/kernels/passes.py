"""The compiled passes as functions of tensors; `LIBRARY.takes` says which go here."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megascale.kernels.library import LIBRARY

GeluName = Literal["gelu", "gelu_tanh"]


def probabilities_(logits: Tensor, labels: Tensor) -> Tensor:
    """Put the softmax over each row in the logits' place.

    Args:
        logits: (N, V), contiguous. labels: (N,) int64 in [0, V).

    Returns:
        (3, N) fp32: log of each row's normaliser, the label's logit, the sum of the logits.
    """
    terms = torch.empty(3, len(logits))
    LIBRARY.call("probabilities", logits.dtype, logits, *logits.shape, labels, terms)
    return terms


def attend_(scores: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Put the softmax of ``scale * scores`` over what each row sees in the scores' place, and 0
    elsewhere.

    Args:
        scores: (n, R, C), contiguous. scale: positive.
        seen: (2, P) int32, contiguous: the columns [first, last) of row r of R are those at
            r % P; no interval is empty.
    """
    rows, columns = scores.numel() // scores.shape[-1], scores.shape[-1]
    LIBRARY.call("attend", scores.dtype, scores, rows, columns, *seen, seen.shape[1], scale)
    return scores


def attend_backward_(grad: Tensor, weights: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Turn the gradient of `attend_`'s result into that of the scores, in place.

    Args:
        grad, weights: (n, R, C), contiguous; `weights` are the result. seen, scale: as there.
    """
    rows, columns = grad.numel() // grad.shape[-1], grad.shape[-1]
    arguments = grad, weights, rows, columns, *seen, seen.shape[1], scale
    LIBRARY.call("attend_backward", grad.dtype, *arguments)
    return grad


def accumulate_(total: Tensor, values: Tensor) -> None:
    """``total += values``, both contiguous, ``total`` in fp32; torch's addition of two types is
    several times slower."""
    LIBRARY.call("accumulate", values.dtype, total, values, values.numel())


def keep_mask(
    keys: Tensor, site: int, rows: Tensor, places: Tensor, full: int, bound: int
) -> Tensor:
    """Which elements dropout keeps, see `megascale.models.dropout`: (B, R, C) bool.

    Args:
        keys: (B,) of the samples. site: of the model, as int64.
        rows, places: (R,), (C,) int64: the element's row in the sample's tensor, flat but for its
            last dim, and its place there. full: length of that dim.
        bound: what the upper 53 bits of an element's hash must reach.
    """
    assert all(t.dtype == torch.int64 and t.device.type == "cpu" for t in (keys, rows, places))
    keep = torch.empty(len(keys), len(rows), len(places), dtype=torch.bool)
    arguments = keys, len(keys), site, rows, len(rows), places, len(places), full, bound, keep
    LIBRARY.call("keep_mask", keys.dtype, *arguments)
    return keep


def gelu(x: Tensor, name: GeluName) -> Tensor:
    """GELU, exact or by tanh, with its gradient."""
    return _Gelu.apply(x.contiguous(), name)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: GeluName) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        out = torch.empty_like(x)
        LIBRARY.call(name, x.dtype, x, out, x.numel())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        arguments = x, grad.contiguous(), out, x.numel()
        LIBRARY.call(f"{ctx.name}_backward", x.dtype, *arguments)
        return out, None
