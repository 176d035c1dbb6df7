"""DeepSpeed's engine on transformers' GPT-2, ZeRO stage 1; variant "cpuadam": its own Adam."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import deepspeed
import torch

from tools.bench.job import job_of_command_line, run
from tools.bench.peers.hf_trainer import model_of


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**place, "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"})
    with contextlib.redirect_stdout(sys.stderr):
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use
        model = model_of(job)
        own = arguments.variant == "cpuadam"
        kind: Any = deepspeed.ops.adam.DeepSpeedCPUAdam if own else torch.optim.AdamW
        optimizer = kind(
            model.parameters(), lr=job.lr, betas=job.betas, weight_decay=job.weight_decay
        )
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": job.micro_batch_size,
                "gradient_clipping": job.grad_clip,
                "bf16": {"enabled": job.dtype == "bf16"},
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )

    def step(inputs: torch.Tensor, _: torch.Tensor) -> float:
        loss = engine(input_ids=inputs, labels=inputs).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    run(job, step)


if __name__ == "__main__":
    main()
