"""What a run asks of its machine: compiled passes, and an allocator that keeps memory."""

from __future__ import annotations

import ctypes
import functools

import torch

from megascale.config.performance_schema import PerformanceConfig
from megascale.kernels.library import LIBRARY

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1
_TOP_PAD = 64 * 2**20


def prepare_host(performance: PerformanceConfig, device: torch.device) -> list[str]:
    """Set this process up as the settings say; before a model is made.

    Returns:
        Lines for the user: what could not be had, and what is done instead.

    Raises:
        UserError: a setting says `always` where it cannot be.
    """
    note = LIBRARY.enable(performance.compiled_kernels, device)
    if performance.keep_memory != "never" and device.type == "cpu":
        keep_freed_memory()
    return [] if note is None else [note]


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed for the next tensor.

    By default it gives each large block back to the system at once and takes it anew, so that
    every tensor of every step is mapped and zeroed page by page. Other allocators (tcmalloc, by
    LD_PRELOAD) do so by themselves and ignore this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # there is none outside of glibc
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
        mallopt(_M_TOP_PAD, _TOP_PAD)
