"""DeepSpeed's engine on several processes, on the plain loop's model; variant: the ZeRO stage."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import deepspeed
import torch

from tools.bench.job import Job, job_of_command_line
from tools.bench.peers.plain_loop import GPT
from tools.bench.ranks import Batch, Step, join, run_ranks


def build(job: Job, stage: int, passes: int) -> Step:
    """The engine with its default bucket sizes, but no larger than the model."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use
    torch.manual_seed(7)
    bucket = min(500_000_000, job.parameters // 2 * 2)
    config = {
        "train_micro_batch_size_per_gpu": job.micro_batch_size,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": job.grad_clip,
        "bf16": {"enabled": job.dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    with contextlib.redirect_stdout(sys.stderr):
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = GPT(job)
        optimizer = torch.optim.AdamW(
            model.parameters(), job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True
        )
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, dist_init_required=False, config=config
        )

    def step(batches: Sequence[Batch]) -> float:
        total = 0.0
        for inputs, targets in batches:
            loss = engine(inputs, targets)
            engine.backward(loss)
            engine.step()
            total += loss.item() / passes
        return total

    return step


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    stage, passes = map(int, arguments.variant.split("/"))
    join()
    run_ranks(job, lambda: build(job, stage, passes), passes)


if __name__ == "__main__":
    main()
