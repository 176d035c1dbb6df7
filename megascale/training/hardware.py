"""What the device could do at best, and how much memory the process holds."""

from __future__ import annotations

import time

import psutil
import torch

# Dense bf16 peaks from the vendors' data sheets, FLOP/s.
_PUBLISHED_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}
_SIZES = (96, 192, 384, *[768] * 6)
_BUDGET_S = 0.3


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak matrix-multiplication rate of one device, FLOP/s.

    GPUs: the published bf16 peak where the name is known. Otherwise measured: the best of a few
    square products with the process's own threads, for at most 0.3 s, so that a type which the
    device computes slowly (fp16 on most CPUs: 0.2 s a product of 768) is measured on small ones.
    On a machine that others load it is too low, and an MFU over it too high.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, peak in _PUBLISHED_PEAKS.items():
            if key in name:
                return peak
    best, left = 0.0, _BUDGET_S
    for size, following in zip(_SIZES, (*_SIZES[1:], _SIZES[-1]), strict=True):
        seconds = _product_seconds(size, device, dtype)
        best = max(best, 2 * size**3 / seconds)
        left -= seconds
        if left < seconds * (following / size) ** 3:
            break
    return best


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time of one product of two (size, size) matrices; the first of its kind sets things up."""
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def memory_bytes(device: torch.device) -> int:
    """Peak allocated bytes on a GPU; resident set size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
