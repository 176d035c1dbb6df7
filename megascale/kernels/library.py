"""Finds a compiler, compiles the C++ beside this file once for this machine, and loads it.

The result lies in a cache by everything that it depends on: sources, options, compiler, processor.
Ranks that start together may compile at once: each writes a file of its own and renames it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd import _profiler_enabled as is_profiled
from torch.profiler import record_function

from megascale.errors import UserError

_NAMES = ("kernels.cpp", "attention.cpp", "products.cpp")
SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("values.h", "blocks.h"))
COMPILERS = ("c++", "g++", "clang++")
_OPTIONS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-march=native", "-mprefer-vector-width=512"),
    # no exact errno and traps, and products with their sums: nothing that changes NaN or infinity
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
# Threads are those of torch: its OpenMP runtime is loaded, none is linked. Where that fails (an
# other runtime, a compiler without OpenMP) the passes run on one thread.
_THREADS = ("-fopenmp", "-nodefaultlibs", "-lm", "-lc", "-lstdc++")
_TIMEOUT_S = 120

PROFILED = "kernel:"
"""Before a function's name in what torch's profiler records."""

Choice = Literal["auto", "always", "never"]


class Library:
    """The compiled functions of a process, once `enable` found that they are wanted.

    Attributes:
        dtypes: what floating-point tensors are handed to them; empty where there are none.
    """

    def __init__(self) -> None:
        self.dtypes: frozenset[torch.dtype] = frozenset()
        self._loaded: ctypes.CDLL | None = None

    def enable(self, choice: Choice, device: torch.device, cache: Path | None = None) -> str | None:
        """Choose for the models that run from now on; compiles at the first use on a machine.

        Args:
            choice: auto: bf16, where it is faster than torch, and masks; always: fp32, too.
            cache: folder for the result; None for the user's.

        Returns:
            One line for the user where auto has to do without; None where all is as asked.

        Raises:
            UserError: always, and it cannot be.
        """
        self.dtypes = frozenset()
        if choice == "never" or device.type != "cpu":
            return None
        try:
            self._loaded = self._loaded or load(cache or user_cache())
        except KernelError as error:
            if choice == "always":
                raise UserError(
                    f"performance.compiled_kernels=always: {error}",
                    rule="it takes a C++ compiler on every machine",
                    remedy="install one (Debian: apt install g++), or use auto",
                ) from error
            return f"compiled kernels are not used, torch does the same slower: {error}"
        wide = {torch.float32} if choice == "always" else set()
        self.dtypes = frozenset({torch.bfloat16, *wide})
        return None

    @property
    def has_fast_products(self) -> bool:
        """Whether `passes.attention`, `product_` and `weight_gradient_` find the instructions for
        them, without which torch's products are faster."""
        return self._loaded is not None and self.enabled and bool(self._loaded.products_are_fast())

    @property
    def enabled(self) -> bool:
        """Whether there are compiled functions."""
        return bool(self.dtypes)

    def multiplies(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's matrix products go to the compiled functions."""
        return tensor.dtype == torch.bfloat16 and self.takes(tensor) and self.has_fast_products

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor goes to the compiled functions."""
        return tensor.dtype in self.dtypes and tensor.device.type == "cpu"

    def call(self, name: str, dtype: torch.dtype, *arguments: Any, flops: int = 0) -> None:
        """Call a function for a type; tensors, ints, tuples of them and floats as C has them.

        Args:
            flops: for torch's profiler, which stand behind the function's name there.
        """
        function = getattr(self._loaded, f"{name}_{str(dtype).removeprefix('torch.')}")
        label = f"{PROFILED}{name} {flops}" if flops else f"{PROFILED}{name}"
        with record_function(label) if is_profiled() else nullcontext():
            function(*(_as_c(argument) for argument in arguments))


class KernelError(Exception):
    """Why there are no compiled functions, in one line."""


def _as_c(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), argument.stride()
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p()
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def user_cache() -> Path:
    """Where compiled files of this user are kept.

    Raises:
        KernelError: the user has no home.
    """
    try:
        return Path.home() / ".cache" / "megascale"
    except RuntimeError as error:
        raise KernelError(f"no home folder to keep them in ({error})") from error


def load(cache: Path) -> ctypes.CDLL:
    """The functions, from the cache or compiled into it.

    Raises:
        KernelError: no compiler, or it fails, or the folder cannot be written.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelError(f"no C++ compiler (looked for {', '.join(COMPILERS)})")
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        source = b"".join(path.read_bytes() for path in (*SOURCES, *HEADERS))
    except OSError as error:
        raise KernelError(f"{error.filename}: {error.strerror}") from error
    for extra in (_THREADS, ()):
        path = cache / f"kernels-{_key(source, compiler, extra)}.so"
        try:
            if not path.exists():
                _compile(compiler, extra, path)
            return ctypes.CDLL(str(path))
        except (OSError, KernelError) as error:
            failure = error
    raise KernelError(str(failure).strip().replace("\n", " ")[:300])


def _key(source: bytes, compiler: str, extra: tuple[str, ...]) -> str:
    """Names everything that the compiled file depends on."""
    about = os.stat(compiler)
    rest = (*_OPTIONS, *extra, compiler, about.st_size, about.st_mtime_ns, _processor())
    return hashlib.sha256(source + repr(rest).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` looks at: a home folder may be shared by different machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() + platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith(names)]
    return "\n".join([platform.machine(), *lines])


def _compile(compiler: str, extra: tuple[str, ...], path: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *_OPTIONS, *map(str, SOURCES), *extra, "-o", name],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise KernelError(f"{compiler}: {(errors or ['it failed'])[0]}")
        os.replace(name, path)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{compiler} took more than {_TIMEOUT_S} s") from error
    finally:
        Path(name).unlink(missing_ok=True)


LIBRARY = Library()
"""Of this process: what is compiled is the machine's matter, and no model's."""
