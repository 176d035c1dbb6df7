"""Checkpoints that DeepSpeed itself saves, of tiny models trained on two ranks of a pool."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.hf_models import VOCAB, tiny_model

STEPS = 3
RATE = 1e-2
WEIGHT_DECAY = 0.1


def batch_of(step: int, rank: int) -> Tensor:
    """Ids (2, 16) of a rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(VOCAB, (2, 16), generator=generator)


def built(kind: str) -> nn.Module:
    """A module by the name of its family; "megascale" is one of ours."""
    if kind != "megascale":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return tiny_model(kind, **(still if kind == "gpt2" else {}))
    from megascale.config.load import load_config
    from megascale.training.tasks.registry import build_task

    torch.manual_seed(1)
    module = build_task(load_config({"model": MEGASCALE, "data": {"path": "x"}})).build_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return module


MEGASCALE = {
    "num_layers": 2,
    "hidden_size": 20,
    "num_attention_heads": 4,
    "ffn_hidden_size": 44,
    "seq_length": 16,
    "vocab_size": VOCAB,
}


def loss_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the next tokens."""
    logits = module(ids).logits if hasattr(module, "config") else module.logits(ids)  # type: ignore[operator]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def optimizer_of(module: nn.Module) -> torch.optim.AdamW:
    """AdamW with two groups, as trainings of this kind have."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    return torch.optim.AdamW(groups, lr=RATE)


class Losses(nn.Module):
    """A module whose forward pass is its loss, so that its parameters have one more name before."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, ids: Tensor) -> Tensor:
        return loss_of(self.model, ids)


def save(folder: str, kind: str, stage: int, precision: str = "fp32", frozen: str = "") -> None:
    """Runs on every rank: train some steps under DeepSpeed and save."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use
    module = Losses(built(kind))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10**5}
    zero |= {"allgather_bucket_size": 10**5, "stage3_prefetch_bucket_size": 10**4}
    zero |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 3000}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer_of(module), config=config, dist_init_required=False
    )
    for step in range(STEPS):
        engine.backward(engine(batch_of(step, dist.get_rank())))
        engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 3})
    dist.barrier()
    engine.destroy()


def reference(kind: str) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The same training in this process with torch alone: (module, moments by parameter)."""
    module = built(kind).train()
    optimizer = optimizer_of(module)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(loss_of(module, batch_of(step, rank)) for rank in range(2)) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
    names = {parameter: name for name, parameter in module.named_parameters()}
    return module.eval(), {names[p]: state for p, state in optimizer.state.items()}
