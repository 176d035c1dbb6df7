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


def attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale Q K^T) V`` of bf16 heads, each query over an interval of keys.

    Args:
        query: (B, H, T, K). key, value: (B, H_kv, T, K), H_kv divides H; K is a multiple of 16 and
            contiguous.
        seen: (B or 1, 2, T) int32, contiguous: a query sees the keys [first, last); none is empty.

    Returns:
        (B, H, T, K), in memory as (B, T, H, K); (B, H, 2, T) fp32, what `attention_backward` wants
        of each row.
    """
    assert seen.shape in ((1, 2, query.shape[2]), (len(query), 2, query.shape[2]))
    out, norms = _places_first(query), torch.empty(*query.shape[:2], 2, query.shape[2])
    sizes, strides = _layout(key.shape[1], query, key, value, out)
    addresses = (t.data_ptr() for t in (query, key, value, out))
    arguments = sizes, strides, *addresses, norms, seen, int(len(seen) > 1), scale
    LIBRARY.call("attention", query.dtype, *arguments)
    return out, norms


def attention_backward(
    grad: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    norms: Tensor,
    seen: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in memory as (B, T, H, K).

    Args:
        grad: (B, H, T, K), of the result. tensors: query, key, value and the result.
        norms, seen, scale: as there.
    """
    query, key, value, _ = tensors
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = _places_first(query), _places_first(key), _places_first(value)
    sizes, strides = _layout(key.shape[1], *tensors, grad, *grads)
    addresses = (t.data_ptr() for t in (*tensors, grad, *grads))
    arguments = sizes, strides, *addresses, norms, seen, int(len(seen) > 1), scale
    LIBRARY.call("attention_backward", query.dtype, *arguments)
    return grads


def _places_first(like: Tensor) -> Tensor:
    """(B, H, T, K) that becomes (B, T, H * K) without a copy."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )


def _layout(kv_heads: int, *tensors: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What attention.cpp calls sizes and strides."""
    samples, heads, length, width = tensors[0].shape
    for tensor in tensors:
        assert (tensor.dtype, tensor.stride(-1)) == (torch.bfloat16, 1), tensor.stride()
        assert tensor.shape in ((samples, heads, length, width), (samples, kv_heads, length, width))
    strides = tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
    return (samples, heads, kv_heads, length, width), strides


def multiplies(weight: Tensor) -> bool:
    """Whether `product_` takes the products of a linear layer with this weight."""
    return LIBRARY.multiplies(weight) and all(size % 2 == 0 for size in weight.shape)


def product_(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> Tensor:
    """``a @ b + bias`` of bf16 matrices in `out`'s place, or added to it; summed in fp32.

    Args:
        a: (N, K), K even, its rows contiguous. b: (K, M), likewise, or a transposed such matrix.
        out: (N, M), likewise; bf16, or fp32, which alone can be added to. bias: (M,) bf16.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    turned = b.stride(1) != 1
    wide = out.dtype == torch.float32
    assert (depth, depth % 2, out.shape) == (len(b), 0, (rows, columns)), (a.shape, b.shape)
    assert depth > 0
    assert a.dtype == b.dtype == torch.bfloat16
    assert out.dtype in (torch.bfloat16, torch.float32)
    assert a.stride(1) == out.stride(1) == b.stride(0 if turned else 1) == 1
    assert wide or not add
    strides = a.stride(0), b.stride(1 if turned else 0), out.stride(0)
    sizes = rows, columns, depth, *strides
    assert bias is None or (bias.shape, bias.dtype) == ((columns,), a.dtype)
    addresses = a.data_ptr(), b.data_ptr(), int(turned), bias, out.data_ptr()
    flops = 2 * rows * columns * depth
    LIBRARY.call("product", a.dtype, sizes, *addresses, int(wide), int(add), flops=flops)
    return out


def weight_gradient_(
    grad: Tensor, x: Tensor, total: Tensor, add: bool, sums: Tensor | None, add_sums: bool
) -> None:
    """``grad.T @ x`` of bf16 matrices in `total`'s place, or added to it; all in fp32.

    Args:
        grad: (N, O), of a linear layer's output. x: (N, I), its input.
        total: (O, I) fp32, contiguous. add: whether there are numbers, to be added to.
        sums: (O,) fp32 for the sums of `grad` over N, the bias's gradient, or None.
        add_sums: likewise.
    """
    grad, x = (t if t.stride(1) == 1 else t.contiguous() for t in (grad, x))
    (tokens, outputs), inputs = grad.shape, x.shape[1]
    assert (total.shape, total.dtype) == ((outputs, inputs), torch.float32)
    assert grad.dtype == x.dtype == torch.bfloat16
    assert len(x) == tokens
    assert sums is None or (sums.shape, sums.dtype) == ((outputs,), torch.float32)
    sizes = outputs, inputs, tokens, grad.stride(0), x.stride(0)
    arguments = grad.data_ptr(), x.data_ptr(), total, int(add), sums, int(add_sums)
    flops = 2 * tokens * outputs * inputs
    LIBRARY.call("weight_gradient", grad.dtype, sizes, *arguments, flops=flops)


def accumulate_(total: Tensor, values: Tensor) -> None:
    """``total += values``, both contiguous, ``total`` in fp32; torch's addition of two types is
    several times slower."""
    LIBRARY.call("accumulate", values.dtype, total, values, values.numel())


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weight: Tensor,
    numbers: tuple[float, ...],
) -> None:
    """An update of AdamW, in place, and the master rounded to the weight; see `OnePassAdamW`.

    Args:
        master, exp_avg, exp_avg_sq, grad: fp32. weight: bf16. All contiguous, of one shape.
        numbers: factor of the gradient, 1 - lr * decay, 1 - beta1, 1 - beta2,
            lr / (1 - beta1^t), sqrt(1 - beta2^t), eps.
    """
    tensors = master, exp_avg, exp_avg_sq, grad, weight
    assert all(t.shape == master.shape for t in tensors)
    assert all(t.dtype == torch.float32 for t in tensors[:4])
    by = torch.tensor(numbers, dtype=torch.float32)
    LIBRARY.call("adamw", weight.dtype, *tensors, master.numel(), by)


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


def gelu_again_(x: Tensor, grad: Tensor, name: GeluName) -> Tensor:
    """GELU of x once more, and its gradient, which becomes that of x in place; both contiguous."""
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
    out = torch.empty_like(x)
    LIBRARY.call(f"{name}_backward", x.dtype, x, grad, grad, out, x.numel())
    return out


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
        arguments = x, grad.contiguous(), out, None, x.numel()
        LIBRARY.call(f"{ctx.name}_backward", x.dtype, *arguments)
        return out, None
