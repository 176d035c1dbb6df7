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
_SIZE = 768
_REPEATS = 12


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak matrix-multiplication rate of one device, FLOP/s.

    GPUs: the published bf16 peak where the name is known. Otherwise measured: the best of a few
    square products with the process's own threads (about 0.2 s); on a machine that
    others load it is too low, and an MFU over it too high.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, peak in _PUBLISHED_PEAKS.items():
            if key in name:
                return peak
    a = torch.randn(_SIZE, _SIZE, device=device).to(dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best


def memory_bytes(device: torch.device) -> int:
    """Peak allocated bytes on a GPU; resident set size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
