"""How large the buffers are in which DeepSpeed reduces gradients."""

from __future__ import annotations

_LARGEST = 50_000_000
_SMALLEST = 500_000
_PARTS = 32


def reduce_bucket(parameters: int) -> int:
    """Elements of the buffer for a rank with so many parameters; even.

    Stage 3 keeps it between steps, so it is a small part of the model, and yet large enough for
    the network. DeepSpeed's default of 5e8 elements would allocate 2 GB of fp32 for any model.
    """
    bucket = min(parameters, _LARGEST, max(_SMALLEST, parameters // _PARTS))
    return bucket + bucket % 2  # stages 1 and 2 refuse one that is no multiple of their alignment
