"""Replicated data parallelism with fp32 main gradients.

torch's DistributedDataParallel reduces in the parameter's dtype: with bf16 weights the sum over
micro-batches and over ranks would both be rounded to bf16. Here each bucket is one flat fp32
buffer; micro-batch gradients are added into it in fp32, and on the last micro-batch a bucket is
all-reduced as soon as its last gradient arrived, beside the rest of the backward:

    backward:  layer N grads -> bucket 0 --all-reduce--------->
                        layer N-1 grads -> bucket 1 --all-reduce-------->   ... finish(): wait
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megascale.wide import wide_dtype

BUCKET_ELEMENTS = 8 * 1024 * 1024


class _Bucket:
    """One flat fp32 buffer and the parameters whose gradients live in it.

    Of narrow parameters it exists from a step's first gradient to the next `zero` only: in a step
    of one micro-batch gradients come as activations go.
    """

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.dtype = wide_dtype(params[0].dtype)
        self.pending = 0
        self.work: dist.Work | None = None
        self._buffer: torch.Tensor | None = None
        self._views: dict[torch.nn.Parameter, torch.Tensor] = {}

    def buffer(self) -> torch.Tensor:
        """All gradients; holding anything where there was no memory for them."""
        if self._buffer is None:
            sizes = [param.numel() for param in self.params]
            self._buffer = self.params[0].new_empty(sum(sizes), dtype=self.dtype)
            parts = zip(self.params, self._buffer.split(sizes), strict=True)
            self._views = {param: part.view_as(param) for param, part in parts}
        return self._buffer

    def view(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of one of the parameters, in its shape."""
        self.buffer()
        return self._views[param]

    def free(self) -> None:
        """Give the memory back."""
        self._buffer, self._views = None, {}


class ReducerSink:
    """A main gradient of a reducer; see `models.gradient_sink.GradientSink`.

    Autograd runs the hook of a parameter after all of its operations, also where none of them
    handed it anything, so that the bucket is reduced as any other.
    """

    def __init__(self, reducer: GradientReducer, param: torch.nn.Parameter) -> None:
        self._reducer, self._param = reducer, param

    def claim(self) -> torch.Tensor | None:
        """See `GradientSink.claim`."""
        return self._reducer.claim(self._param)

    def numbers(self) -> torch.Tensor:
        """See `GradientSink.numbers`."""
        place = self.claim()
        return self._reducer.main_gradient(self._param) if place is None else place.zero_()


class GradientReducer:
    """Accumulates gradients in fp32 and sums them over the data-parallel group.

    Args:
        params: parameters in module order; buckets are filled from the last one backwards, since
            that is the order in which the backward produces gradients.
        group: data-parallel group, or None for a single process.
    """

    def __init__(
        self, params: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None
    ) -> None:
        self._group = group
        self._buckets = [_Bucket(part) for part in _cut(list(reversed(params)), BUCKET_ELEMENTS)]
        self._reducing = False
        self._next = 0
        self._bucket_of: dict[torch.nn.Parameter, _Bucket] = {}
        # of narrow parameters: main gradients that hold anything; the first gradient is copied
        # there, which spares a pass for zeros and one for the sum
        self._stale: set[torch.nn.Parameter] = set()
        self._empty: set[torch.nn.Parameter] = set()
        self._hooks = []
        for bucket in self._buckets:
            hook = self._hook(bucket)
            for param in bucket.params:
                self._bucket_of[param] = bucket
                self._hooks.append(param.register_post_accumulate_grad_hook(hook))
        self.zero()

    def claim(self, param: torch.nn.Parameter) -> torch.Tensor | None:
        """The place of a main gradient that has no numbers of this step yet; None: it has."""
        if param not in self._empty:
            return None
        self._empty.discard(param)
        self._stale.discard(param)
        return self._place(param)

    def main_gradient(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The fp32 gradient of `param`, in its shape (a view of the bucket)."""
        main = self._place(param)
        if param in self._stale:  # none came
            self._stale.remove(param)
            main.zero_()
        return main

    def _place(self, param: torch.nn.Parameter) -> torch.Tensor:
        return self._bucket_of[param].view(param)

    def zero(self) -> None:
        """Clear the gradients for the next step."""
        for bucket in self._buckets:
            bucket.work = None
            self._empty.update(bucket.params)
            if bucket.params[0].dtype == bucket.dtype:  # masters accumulate straight into it
                for param in bucket.params:
                    param.grad = bucket.view(param).zero_()
            else:  # the hook moves them there
                bucket.free()
                self._stale.update(bucket.params)
                for param in bucket.params:
                    param.grad = None

    def begin_backward(self, *, last: bool) -> None:
        """Announce the backward of a micro-batch; `last` starts the reduction."""
        self._reducing = last and self._group is not None
        self._next = 0
        for bucket in self._buckets:
            bucket.pending = len(bucket.params)

    def finish(self) -> None:
        """Wait until every bucket is summed over the group; call after the last backward."""
        if not self._reducing:
            return
        for bucket in self._buckets[self._next :]:  # parameters without a gradient in this step
            self._launch(bucket)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._reducing = False

    def collect(self) -> None:
        """Add to the buckets what a backward left in `.grad` without running the hooks.

        The weight half of a split backward (zero-bubble pipelines) writes `.grad` itself.
        """
        for param in self._bucket_of:
            self._take(param)

    def reduce(self) -> None:
        """Sum all buckets over the group now, where no backward announced itself as the last."""
        self._reducing, self._next = self._group is not None, 0
        self.finish()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, bucket: _Bucket) -> Callable[[torch.nn.Parameter], None]:
        def after_accumulate(param: torch.nn.Parameter) -> None:
            self._take(param)
            bucket.pending -= 1
            if self._reducing:
                self._launch_ready()

        return after_accumulate

    def _take(self, param: torch.nn.Parameter) -> None:
        """Move what a backward left in `.grad` to the main gradient."""
        grad = param.grad
        if grad is None:
            return
        self._empty.discard(param)
        main = self._place(param)
        if grad.data_ptr() == main.data_ptr():
            return
        if param in self._stale:
            self._stale.remove(param)
            main.copy_(grad)
        else:
            main.add_(grad)
        param.grad = main if param.dtype == main.dtype else None

    def _launch_ready(self) -> None:
        # Strictly in bucket order: ranks must issue their collectives alike.
        while self._next < len(self._buckets) and self._buckets[self._next].pending <= 0:
            self._launch(self._buckets[self._next])
            self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        for param in bucket.params:
            self.main_gradient(param)  # zeros where no gradient came
        bucket.work = dist.all_reduce(bucket.buffer(), group=self._group, async_op=True)


def _cut(params: list[torch.nn.Parameter], limit: int) -> list[list[torch.nn.Parameter]]:
    """Cut a list of parameters into runs of at most `limit` elements (at least one each)."""
    runs: list[list[torch.nn.Parameter]] = []
    filled = limit
    for param in params:
        if filled + param.numel() > limit:
            runs.append([])
            filled = 0
        runs[-1].append(param)
        filled += param.numel()
    return runs
