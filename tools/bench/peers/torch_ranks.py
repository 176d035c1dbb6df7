"""A plain PyTorch loop on several processes: DDP with autocast, or FSDP2 in mixed precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tools.bench.job import Job, job_of_command_line
from tools.bench.peers.plain_loop import GPT
from tools.bench.ranks import Batch, Step, join, run_ranks

# variant -> reshard_after_forward; ddp has none
FSDP2 = {"fsdp2": True, "fsdp2 kept": False}


def build(job: Job, variant: str, passes: int) -> Step:
    """Variant ddp, fsdp2 (weights freed after each layer, ZeRO-3) or "fsdp2 kept" (ZeRO-2)."""
    torch.manual_seed(7)
    half = job.dtype == "bf16"
    sharded = variant in FSDP2
    if sharded:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        with torch.device("meta"):
            model: nn.Module = GPT(job)
        for part in (*model.blocks, model):  # type: ignore[misc]
            fully_shard(part, mp_policy=policy, reshard_after_forward=FSDP2[variant])
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
    else:
        model = DistributedDataParallel(GPT(job), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True
    )

    def step(batches: Sequence[Batch]) -> float:
        total = 0.0
        for index, (inputs, targets) in enumerate(batches):
            last = index == passes - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            else:
                model.require_backward_grad_sync = last
            with torch.autocast("cpu", torch.bfloat16, enabled=half and not sharded):
                loss = model(inputs, targets) / passes
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    variant, passes = arguments.variant.split("/")
    join()
    run_ranks(job, lambda: build(job, variant, int(passes)), int(passes))


if __name__ == "__main__":
    main()
