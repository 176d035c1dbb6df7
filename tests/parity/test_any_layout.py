"""Any layout to any layout, directly: what each rank reads and allocates is counted.

The files are read by byte ranges; over all ranks each byte at most once (and once more when the
checksums are compared before); no rank makes a tensor that is larger than its own largest part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.verification.layout import parse_layouts
from tests.distributed import Pools
from tests.integration.runs import run, write_config
from tests.parity.harness import relative, run_steps, set_up
from tests.parity.test_engines import settings_of

AT_STEP, STEPS = 2, 4
SHAPE = {
    "model.num_layers": 4,
    "model.hidden_size": 40,
    "model.num_attention_heads": 4,
    "model.ffn_hidden_size": 76,
    "model.seq_length": 24,
    "model.vocab_size": 101,
    "optimizer.grad_clip": 0.5,
    "model.dropout": 0.1,
}
JOURNEYS = [
    ("tp=2,sp=1,dp=2,zero=1,engine=deepspeed", "dp=1,engine=torch"),
    ("dp=1,engine=torch", "tp=2,dp=2,zero=3,engine=deepspeed"),
    ("pp=2,vpp=2,schedule=interleaved,dp=2,zero=1,engine=torch", "tp=4,sp=1,engine=torch"),
    ("dp=4,zero=3,engine=torch", "pp=4,schedule=1f1b,engine=torch"),
    ("tp=4,engine=torch", "dp=4,engine=torch"),
    ("cp=2,dp=2,zero=1,engine=torch", "cp=2,tp=2,engine=torch"),
    ("dp=4,zero=2,engine=deepspeed", "pp=2,tp=2,zero=1,engine=deepspeed"),
]


class Allocations(TorchDispatchMode):
    """The largest storage that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def _settings(prefix: Path, text: str) -> dict[str, Any]:
    layout = parse_layouts(text)[0]
    changes = dict(SHAPE)
    settings = settings_of(prefix, changes)
    settings["parallel"] = {
        "tensor_parallel_size": layout.tp,
        "sequence_parallel": bool(layout.sp),
        "context_parallel_size": layout.cp,
        "pipeline_parallel_size": layout.pp,
        "virtual_pipeline_stages": layout.vpp,
        "pipeline_schedule": layout.schedule,
        "zero_stage": layout.zero,
        "engine": layout.engine,
    }
    return settings


def _save(settings: dict[str, Any], folder: str) -> list[tuple[float, float]]:
    """Runs on every rank: save after AT_STEP with the work shared out; the curve after it."""
    setup = set_up(settings)
    state = TrainState()
    run_steps(setup, state, AT_STEP)
    engine = setup.engine
    saved = {"train": state.state_dict(), "engine": engine.state_dict(), "callbacks": {}}
    held = engine.fragments(engine.state_kinds, replicas=True)
    owned = engine.fragments(engine.state_kinds)
    CheckpointManager(folder, asynchronous=True).save(AT_STEP, owned, saved, {}, replicas=held)
    curve = run_steps(setup, state, STEPS - AT_STEP)  # the save goes on meanwhile
    dist.barrier()
    engine.close()
    return curve


def _load(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Runs on every rank: load elsewhere, counting; then the curve."""
    setup = set_up(settings, other_start=True)
    reader, notes = CheckpointManager(folder).open_newest_intact()
    assert reader is not None, notes
    owned = max(
        (f.tensor.numel() * 4 for f in setup.engine.fragments(["master"], replicas=True)), default=0
    )
    fill = reader.fill
    counting = Allocations()

    def counted(fragment: Any) -> None:
        with counting:
            fill(fragment)

    reader.fill = counted  # type: ignore[method-assign]
    state, _ = load_state(reader, setup.engine, setup.mesh)
    outcome = {
        "read": reader.bytes_read,
        "largest": counting.largest,
        "owned": owned,
        "curve": run_steps(setup, state, STEPS - AT_STEP),
    }
    reader.close()
    setup.engine.close()
    return outcome


@pytest.mark.parametrize(("source", "target"), JOURNEYS)
def test_a_journey(
    pools: Pools, token_prefix: Path, tmp_path: Path, source: str, target: str
) -> None:
    sizes = [parse_layouts(text)[0].world_size for text in (source, target)]
    folder = str(tmp_path)
    straight = pools(sizes[0]).run(_save, settings=_settings(token_prefix, source), folder=folder)
    manifest = CheckpointReader(f"{folder}/step_{AT_STEP:08d}").manifest
    state = sum(4 * piece.numel * len(piece.kinds) for piece in manifest.pieces)
    elements = sum(torch.Size(shape).numel() for shape in manifest.parameters.values())
    assert state == 3 * 4 * elements  # replicated data once: master and two moments

    ranks = pools(sizes[1]).run(_load, settings=_settings(token_prefix, target), folder=folder)
    assert sum(rank["read"] for rank in ranks) <= 1.05 * state
    if sizes[1] > 1:
        assert max(rank["read"] for rank in ranks) < state
    for rank in ranks:
        assert rank["largest"] <= rank["owned"]
        for (loss, norm), (expected_loss, expected_norm) in zip(
            rank["curve"], straight[0], strict=True
        ):
            assert relative(loss, expected_loss) < 1e-5
            assert relative(norm, expected_norm) < 1e-5


def test_all_ranks_write_their_share(pools: Pools, token_prefix: Path, tmp_path: Path) -> None:
    """Replicas without ZeRO hold the same: each writes about as much as the others."""
    settings = _settings(token_prefix, "dp=4,engine=torch")
    pools(4).run(_save, settings=settings, folder=str(tmp_path))
    files = CheckpointReader(str(tmp_path / f"step_{AT_STEP:08d}")).manifest.files
    sizes = [entry.bytes for entry in files]
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("dp=2,zero=1,engine=torch", "dp=2,zero=1,engine=torch", "bit-identical"),
        ("tp=2,sp=1,engine=torch", "dp=1,engine=torch", "samples and learning rates"),
    ],
)
def test_verify_resume(
    token_prefix: Path, tmp_path: Path, source: str, target: str, says: str
) -> None:
    config = write_config(tmp_path / "c.yaml", settings_of(token_prefix, SHAPE))
    done = run("verify", "resume", config, "--from", source, "--to", target, "--steps", 2)
    assert done.code == 0, done.output
    assert says in done.stdout.replace("\n", " ")
    assert "not bit-identical" not in done.stdout or source != target
