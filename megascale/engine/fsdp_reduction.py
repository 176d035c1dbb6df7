"""Reducing FSDP2's gradients when the schedule says so, and not when a backward ends.

FSDP2 has no public call for this. These are the steps of torch's own pipeline stage
(`_PipelineStageBase.perform_reduce_grad`, torch 2.13), which wants one FSDP module a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def accumulate(module: nn.Module) -> None:
    """Add the gradients that a backward left to the fp32 sums, where weights are not fp32."""
    for group in _parameter_groups(module):
        for param in group.fsdp_params:
            if hasattr(param, "_unsharded_param"):
                param.accumulate_unsharded_grad_if_needed()


def reduce_now(module: nn.Module) -> None:
    """Reduce-scatter the unsharded gradients of all modules below `module`, and reshard."""
    for group in _parameter_groups(module):
        group.post_backward()
    root: Any = module
    root._get_fsdp_state()._root_post_backward_final_callback()


def _parameter_groups(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            yield from state._fsdp_param_groups
