"""megatron-core's GPT with its own optimizer and schedule, local layer spec, on one CPU rank.

The package takes a GPU for granted in a few places outside of the arithmetic; `_on_cpu` answers
these for the CPU. Its fused kernels need Apex or Transformer Engine and are off, as they are
there without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tools.bench.job import Job, job_of_command_line, run


class _CudaMeansCpu(TorchFunctionMode):
    """Answers `device="cuda"` with tensors on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def _on_cpu() -> None:
    from megatron.core.tensor_parallel import random

    def state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(tensor, *args, **kwargs)
        if not isinstance(found, str) or "cuda" in found:
            return found
        return found.replace("torch.", "torch.cuda.")

    original = torch.Tensor.type
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.get_rng_state = state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    random._get_cuda_rng_state = state
    random._set_cuda_rng_state = lambda new, *_, **__: torch.set_rng_state(new)
    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda module, *_, **__: module  # type: ignore[method-assign]


def build(job: Job) -> tuple[Any, Any, Any]:
    """Model, optimizer and the forward-backward function."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(1, 1)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    half = job.dtype == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    config = TransformerConfig(
        num_layers=job.num_layers,
        hidden_size=job.hidden_size,
        num_attention_heads=job.num_heads,
        use_cpu_initialization=True,
        bf16=half,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=job.dropout,
        attention_dropout=job.dropout,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        attention_softmax_in_fp32=True,
        deallocate_pipeline_outputs=False,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=job.vocab_size,
        max_sequence_length=job.seq_length,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    model = Float16Module(config, model) if half else model
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
    )
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=job.lr,
            weight_decay=job.weight_decay,
            adam_beta1=job.betas[0],
            adam_beta2=job.betas[1],
            clip_grad=job.grad_clip,
            bf16=half,
            params_dtype=dtype,
        ),
        [model],
    )
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer, get_forward_backward_func()


def main() -> None:
    """Run the job."""
    job, _ = job_of_command_line()
    warnings.filterwarnings("ignore")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with contextlib.redirect_stdout(sys.stderr):
        _on_cpu()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with _CudaMeansCpu():
            model, optimizer, forward_backward = build(job)
    positions = torch.arange(job.seq_length).expand(job.micro_batch_size, -1)
    length = job.seq_length
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def forward(batches: Any, module: Any) -> tuple[torch.Tensor, Any]:
        inputs, targets = next(batches)
        losses = module(inputs, positions, hidden, labels=targets)
        return losses, lambda out: (out.mean(), {"loss": out.detach().mean()})

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        with _CudaMeansCpu():
            found = forward_backward(
                forward_step_func=forward,
                data_iterator=iter([(inputs, targets)]),
                model=[model],
                num_microbatches=1,
                seq_length=length,
                micro_batch_size=job.micro_batch_size,
                forward_only=False,
            )
            optimizer.step()
        return found[0]["loss"].item()

    run(job, step)


if __name__ == "__main__":
    main()
