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

from megascale.checkpoint.compare import differences
from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.ranks import make_ranks
from megascale.checkpoint.reader import CheckpointReader
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.verification.layout import parse_layouts
from tests.distributed import Pools
from tests.integration.runs import call, write_config
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


def _settings(prefix: Path, text: str, **changes: Any) -> dict[str, Any]:
    layout = parse_layouts(text)[0]
    settings = settings_of(prefix, {**SHAPE, **changes})
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
    manager = CheckpointManager(folder, asynchronous=True)
    manager.save(AT_STEP, owned, saved, {}, replicas=held)
    manager.wait_until_copied()
    curve = run_steps(setup, state, STEPS - AT_STEP)  # the save goes on meanwhile
    manager.finish()
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


def _again(settings: dict[str, Any], folder: str, out: str) -> None:
    """Runs on every rank: load, and save what was loaded."""
    setup = set_up(settings, other_start=True)
    engine, ranks = setup.engine, make_ranks()
    reader, notes = CheckpointManager(folder, ranks=ranks).open_newest_intact()
    assert reader is not None, notes
    state, callbacks = load_state(reader, engine, setup.mesh)
    reader.close()
    saved = {"train": state.state_dict(), "engine": engine.state_dict(), "callbacks": callbacks}
    held = engine.fragments(engine.state_kinds, replicas=True)
    owned = engine.fragments(engine.state_kinds)
    CheckpointManager(out, ranks=ranks).save(state.step, owned, saved, {}, replicas=held)
    engine.close()


CHANGES = [  # layout and precision before, and after
    ("tp=2,engine=torch", "fp32", "dp=2,zero=1,engine=deepspeed", "bf16"),
    ("pp=2,vpp=2,schedule=interleaved,engine=torch", "bf16", "dp=2,zero=3,engine=torch", "fp32"),
    (
        *("pp=2,vpp=2,schedule=interleaved,engine=torch", "fp32"),
        *("pp=2,vpp=2,schedule=zbv,engine=torch", "fp16"),
    ),
    ("pp=2,schedule=gpipe,engine=torch", "fp16", "tp=2,sp=1,engine=torch", "bf16"),
]


@pytest.mark.parametrize(("source", "before", "target", "after"), CHANGES)
def test_another_precision_or_schedule_keeps_every_bit(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    source: str,
    before: str,
    target: str,
    after: str,
) -> None:
    """Masters and moments are fp32 in all of them: loaded and saved again they are the same."""
    scale = {"precision.initial_loss_scale_power": 8}
    settings = [
        _settings(
            token_prefix, text, **{"precision.dtype": dtype, **(scale if dtype == "fp16" else {})}
        )
        for text, dtype in ((source, before), (target, after))
    ]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    pools(2).run(_save, settings=settings[0], folder=first)
    pools(2).run(_again, settings=settings[1], folder=first, out=second)
    readers = [CheckpointReader(f"{root}/step_{AT_STEP:08d}") for root in (first, second)]
    lines = [line for line in differences(*readers) if not line.startswith("state engine")]
    assert lines == []


HELD_OUT = {  # sizes that no other test has, none a multiple of the other's
    "model.num_layers": 4,
    "model.hidden_size": 28,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 54,
    "model.seq_length": 18,
    "model.vocab_size": 107,
    "run.seed": 91,
}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("tp=2,pp=2,dp=2,zero=1,engine=torch", "dp=1,engine=torch"),
        ("dp=1,engine=torch", "tp=2,sp=1,dp=4,zero=1,engine=deepspeed"),
    ],
)
def test_eight_ranks_to_one_and_back(
    pools: Pools, token_prefix: Path, tmp_path: Path, source: str, target: str
) -> None:
    _journey(pools, token_prefix, tmp_path, source, target, HELD_OUT)


@pytest.mark.parametrize(("source", "target"), JOURNEYS)
def test_a_journey(
    pools: Pools, token_prefix: Path, tmp_path: Path, source: str, target: str
) -> None:
    _journey(pools, token_prefix, tmp_path, source, target, {})


def _journey(
    pools: Pools,
    prefix: Path,
    tmp_path: Path,
    source: str,
    target: str,
    changes: dict[str, Any],
) -> None:
    """Save in one layout, continue in the other; what is read and made is counted."""
    sizes = [parse_layouts(text)[0].world_size for text in (source, target)]
    before, after = (_settings(prefix, text, **changes) for text in (source, target))
    folder = str(tmp_path)
    straight = pools(sizes[0]).run(_save, settings=before, folder=folder)
    manifest = CheckpointReader(f"{folder}/step_{AT_STEP:08d}").manifest
    state = sum(4 * piece.numel * len(piece.kinds) for piece in manifest.pieces)
    elements = sum(torch.Size(shape).numel() for shape in manifest.parameters.values())
    assert state == 3 * 4 * elements  # replicated data once: master and two moments

    ranks = pools(sizes[1]).run(_load, settings=after, folder=folder)
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


def _exchanged() -> None:
    """Runs on every rank: messages around the length that one collective carries."""
    ranks = make_ranks()
    for size in (0, 1, 1012, 1013, 1014, 1015, 1016, 5000):
        for short in (False, True):
            sent = ["é" if rank and short else f"{rank}" * size for rank in range(ranks.size)]
            assert ranks.exchange(sent[ranks.rank]) == sent


def test_ranks_exchange_messages_of_any_length(pools: Pools) -> None:
    pools(2).run(_exchanged)


def test_all_ranks_write_their_share(pools: Pools, token_prefix: Path, tmp_path: Path) -> None:
    """Replicas without ZeRO hold the same: each writes about as much as the others."""
    settings = _settings(token_prefix, "dp=4,engine=torch")
    pools(4).run(_save, settings=settings, folder=str(tmp_path))
    files = CheckpointReader(str(tmp_path / f"step_{AT_STEP:08d}")).manifest.files
    sizes = [entry.bytes for entry in files]
    assert len(sizes) == 4
    assert max(sizes) < 1.5 * min(sizes)


# fp16 whose scale overflows at first, and grows back to where it overflows after every good step
SKIPS = {
    "precision.dtype": "fp16",
    "precision.initial_loss_scale_power": 19,
    "precision.loss_scale_window": 1,
    "precision.hysteresis": 1,
}


@pytest.mark.parametrize(
    ("source", "target", "changes", "says"),
    [
        ("dp=1,engine=torch", "dp=1,engine=torch", SKIPS, "bit-identical"),
        ("dp=1,engine=torch", "tp=2,sp=1,engine=torch", {}, "samples and learning rates"),
    ],
)
def test_verify_resume(
    token_prefix: Path,
    tmp_path: Path,
    source: str,
    target: str,
    changes: dict[str, Any],
    says: str,
) -> None:
    """Dropout everywhere; with skipped steps on both sides of the save."""
    config = write_config(tmp_path / "c.yaml", settings_of(token_prefix, {**SHAPE, **changes}))
    at = ("--at-step", AT_STEP, "--steps", 3 if changes else 2)
    done = call("verify", "resume", config, "--from", source, "--to", target, *at)
    assert done.code == 0, done.output
    assert "that was meant" in done.stdout
    assert says in done.stdout.replace("\n", " ")
    assert "not bit-identical" not in done.stdout or source != target


def test_the_scale_of_that_run_overflows_before_and_after_the_save(
    pools: Pools, token_prefix: Path
) -> None:
    """What the test above rests on; which steps are skipped does not depend on the layout."""
    settings = _settings(token_prefix, "dp=2,zero=1,engine=torch", **SKIPS)
    skipped = pools(2).run(_skipped, settings=settings)[0]
    assert True in skipped[:AT_STEP]
    assert True in skipped[AT_STEP:]
    assert False in skipped[:AT_STEP]
    assert False in skipped[AT_STEP:]


def _skipped(settings: dict[str, Any]) -> list[bool]:
    """Runs on every rank: which of the first five steps are skipped."""
    setup, state, found = set_up(settings), TrainState(), []
    for _ in range(AT_STEP + 3):
        before = state.updates
        run_steps(setup, state, 1)
        found.append(state.updates == before)
    setup.engine.close()
    return found
