"""checkpoint.init_from gives every engine and stage the same start, and refuses what cannot fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.errors import UserError
from tests.distributed import Pools
from tests.integration.runs import make_dataset, make_tokenizer, metrics, settings

LAYOUTS = [("torch", 0), ("torch", 1), ("torch", 3), ("deepspeed", 1), ("deepspeed", 3)]
STEPS = 3


def train(tree: dict[str, Any]) -> list[tuple[float, float]] | str:
    """Runs on every rank: (loss, gradient norm) of each step, or the refusal."""
    from megascale.cli.config import all_checks
    from megascale.config.load import load_config
    from megascale.training.assemble import assemble

    try:
        config = load_config(
            tree, checks=all_checks(), world_size=torch.distributed.get_world_size()
        )
        run = assemble(config, torch.device("cpu"))
    except UserError as error:
        return str(error)
    try:
        run.trainer.fit()
    finally:
        run.engine.close()
    torch.distributed.barrier()  # the main rank has written its file
    lines = metrics(Path(config.run.output_dir))
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def folder(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a run of two steps whose checkpoint the others start from."""
    folder = tmp_path_factory.mktemp("init_from")
    make_dataset(folder, make_tokenizer(folder))
    tree = settings(folder / "data", folder / "source", train__max_steps=2, run__seed=77)
    pools(1).run(train, tree=tree)
    return folder


def started(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    source = folder / "source" / "checkpoints" / "step_00000002"
    more = {"train__max_steps": STEPS, "checkpoint__init_from": str(source)} | changes
    return settings(folder / "data", folder / name, **more)


def test_every_engine_and_stage_starts_from_them(pools: Pools, folder: Path) -> None:
    tree = started(folder, "one", parallel__engine="torch")
    (expected,) = pools(1).run(train, tree=tree)
    random = settings(folder / "data", folder / "random", train__max_steps=STEPS)
    (other,) = pools(1).run(train, tree=random)
    assert abs(other[0][0] - expected[0][0]) > 1e-2
    for engine, stage in LAYOUTS:
        tree = started(
            folder, f"{engine}{stage}", parallel__engine=engine, parallel__zero_stage=stage
        )
        for found in pools(2).run(train, tree=tree):
            assert found == [pytest.approx(step, rel=1e-5) for step in expected], (engine, stage)


def test_moments_come_too_where_they_are_wanted(pools: Pools, folder: Path) -> None:
    fresh = started(folder, "fresh", parallel__engine="torch")
    (without,) = pools(1).run(train, tree=fresh)
    wanted = {"checkpoint__init_optimizer": True}
    tree = started(folder, "moments", parallel__engine="torch", **wanted)
    (expected,) = pools(1).run(train, tree=tree)
    assert expected[0] == pytest.approx(without[0], rel=1e-5)  # the same weights
    assert abs(expected[1][0] - without[1][0]) > 1e-4 * without[1][0]
    for engine, stage in (("torch", 3), ("deepspeed", 1)):
        layout = {"parallel__engine": engine, "parallel__zero_stage": stage}
        tree = started(folder, f"moments_{engine}", **layout, **wanted)
        for found in pools(2).run(train, tree=tree):
            assert found == [pytest.approx(step, rel=1e-5) for step in expected], engine
    other = {"optimizer__name": "sgd", "parallel__engine": "torch"}
    for said in pools(1).run(train, tree=started(folder, "sgd", **other, **wanted)):
        assert "has no momentum_buffer" in said


def test_bf16_starts_from_exact_masters(pools: Pools, folder: Path) -> None:
    tree = started(folder, "bf16_one", parallel__engine="torch", precision__dtype="bf16")
    (expected,) = pools(1).run(train, tree=tree)
    for engine, stage in (("torch", 3), ("deepspeed", 2)):
        name = f"bf16_{engine}"
        parallel = {"parallel__engine": engine, "parallel__zero_stage": stage}
        tree = started(folder, name, precision__dtype="bf16", **parallel)
        found = pools(2).run(train, tree=tree)[0]
        assert found[0][0] == pytest.approx(expected[0][0], rel=1e-4), engine
        assert found[-1][0] == pytest.approx(expected[-1][0], rel=1e-2), engine


def test_other_shapes_and_names_are_all_listed(pools: Pools, folder: Path) -> None:
    tree = started(folder, "misfit", model__mlp_bias=False, model__hidden_size=12)
    for said in pools(2).run(train, tree=tree):
        assert "does not fit this config" in said
        assert "not in the model: model.layers.{0-1}.mlp.up.bias" in said
        assert "model.embedding.tokens.weight: model (270, 12), checkpoint (270, 16)" in said
        assert "model.final_norm.bias: model (12,), checkpoint (16,)" in said


def test_damage_and_absence_are_refused(pools: Pools, folder: Path) -> None:
    source = folder / "source" / "checkpoints" / "step_00000002"
    shutil.copytree(source, folder / "damaged")
    file = folder / "damaged" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    for path, said in (
        (folder / "damaged", "its bytes changed"),
        (folder / "nowhere", "not a complete checkpoint"),
    ):
        tree = started(folder, "refused", checkpoint__init_from=str(path))
        assert all(said in answer for answer in pools(2).run(train, tree=tree))


def test_another_tokenizer_is_refused(pools: Pools, folder: Path) -> None:
    (folder / "other").mkdir(exist_ok=True)
    data = make_dataset(folder / "other", make_tokenizer(folder / "other", vocab_size=265))
    tree = started(folder, "ids", data__path=str(data), model__vocab_size=270)
    (said,) = pools(1).run(train, tree=tree)
    assert "the same ids mean other tokens" in said
    assert "step_00000002/tokenizer" in said
