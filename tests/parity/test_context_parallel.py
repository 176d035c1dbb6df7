"""A sequence cut over ranks, by either method and under both engines, is the same training.

Losses, gradient norms, every gradient, every weight and the validation loss within 1e-5 of one
process. The models have what a seam could get wrong: rotary and learned positions, isolated
documents, windows, soft-caps, grouped heads, dropout of attention weights and features.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.engine import torch_engine
from megascale.models.attention import Visibility
from megascale.models.dropout import CounterDropout
from megascale.parallel import context_parallel, ring_attention
from megascale.parallel.context_parallel import own_tokens
from megascale.parallel.mesh import ParallelMesh
from megascale.training import step
from megascale.training.callbacks import samples
from megascale.verification.compare import FP32, compare
from megascale.verification.layout import SINGLE, Layout
from megascale.verification.record import read_record, record_run
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.parity.harness import (
    Record,
    merge,
    record_rank,
    relative,
    resume_rank,
    save_rank,
    set_up,
)
from tests.parity.test_engines import assert_same, settings_of

STEPS, LAYERS = 3, 2
GPT: dict[str, Any] = {
    "model.hidden_size": 40,
    "model.seq_length": 24,
    "model.dropout": 0.1,
    "train.micro_batch_size": 2,
    "optimizer.grad_clip": 0.5,
}
LLAMA: dict[str, Any] = {
    **GPT,
    "model.dropout": 0.0,
    "model.num_kv_heads": 2,
    "model.position_embedding": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.tie_word_embeddings": False,
    "data.isolate_documents": True,
    "optimizer.grad_clip": 0.0,
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "model.attention_dropout": 0.2,
    "model.norm_placement": "sandwich",
    "model.qk_norm": True,
    "model.head_dim": 12,
    "model.query_scaling": 9.0,
    "model.attention_softcap": 2.0,
    "model.logit_softcap": 10.0,
    "model.sliding_window": 7,
    "model.global_layer_interval": 2,
    "data.isolate_documents": False,
    # Its two norms and two bounds a layer amplify rounding to some 1e-5: in fp64 nothing is left.
    "precision.dtype": "fp64",
}
SGD = {**GPT, "optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.grad_clip": 0.0}
MODELS = {"gpt": GPT, "llama": LLAMA, "gemma": GEMMA, "sgd": SGD}

# world, method, cp, tp, sequence parallel, engine, stage, recomputation -> models
LAYOUTS: dict[tuple, tuple[str, ...]] = {
    (2, "ulysses", 2, 1, False, "torch", 0, "none"): tuple(MODELS),
    (2, "ring", 2, 1, False, "torch", 0, "none"): tuple(MODELS),
    (2, "ring", 2, 1, False, "deepspeed", 1, "selective"): ("gpt",),
    (2, "ulysses", 2, 1, False, "deepspeed", 3, "full"): ("llama",),
    (4, "ulysses", 4, 1, False, "torch", 0, "selective"): ("llama",),
    (4, "ring", 4, 1, False, "torch", 3, "full"): ("gemma",),
    (4, "ulysses", 2, 2, True, "torch", 0, "none"): ("gpt",),
    (4, "ring", 2, 2, True, "deepspeed", 2, "none"): ("gpt",),
    (4, "ring", 2, 2, False, "torch", 1, "none"): ("gemma",),
    (4, "ulysses", 2, 1, False, "torch", 2, "none"): ("gpt",),
    (4, "ring", 2, 1, False, "deepspeed", 3, "none"): ("llama",),
}


def _parallel(
    method: str, cp: int, tp: int, sp: bool, engine: str, stage: int, mode: str
) -> dict[str, Any]:
    changes = {
        "parallel.context_parallel_size": cp,
        "parallel.tensor_parallel_size": tp,
        "parallel.sequence_parallel": sp,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "parallel.activation_recomputation": mode,
    }
    return changes if cp == 1 else {**changes, "parallel.context_parallel_method": method}


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> dict[str, Record]:
    return {
        name: merge(
            pools(1).run(record_rank, settings=settings_of(token_prefix, changes), steps=STEPS)
        )
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_same_training(
    pools: Pools, token_prefix: Path, references: dict[str, Record], layout: tuple
) -> None:
    world, *parallel = layout
    for name in LAYOUTS[layout]:
        settings = settings_of(token_prefix, {**MODELS[name], **_parallel(*parallel)})
        found = merge(
            pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2)
        )
        assert_same(found, references[name], 1e-10 if name == "gemma" else 1e-5)
        if name in ("gpt", "sgd"):
            clip = MODELS[name]["optimizer.grad_clip"]
            assert not clip or min(found.norms) > clip, "clipping must be active"


@pytest.mark.parametrize(
    ("method", "engine", "stage"), [("ring", "torch", 3), ("ulysses", "deepspeed", 2)]
)
def test_resume_in_another_context_parallel_size(
    pools: Pools, token_prefix: Path, tmp_path: Path, method: str, engine: str, stage: int
) -> None:
    """cp 2 is continued bit for bit by cp 2, within 1e-5 by dp 2, and dp 2 by cp 2."""
    layouts = {
        "cp": _parallel(method, 2, 1, False, engine, stage, "none"),
        "dp": _parallel(method, 1, 1, False, "torch", 0, "none"),
    }
    settings = {
        name: settings_of(token_prefix, {**GPT, **changes}) for name, changes in layouts.items()
    }
    for begun, continued in (("cp", "dp"), ("dp", "cp")):
        folder = str(tmp_path / begun)
        straight = pools(2).run(
            save_rank, settings=settings[begun], folder=folder, at_step=2, steps=4
        )
        for name in (begun, continued):
            resumed = pools(2).run(resume_rank, settings=settings[name], folder=folder, steps=4)
            if name == begun:
                assert resumed == straight
            for found, expected in zip(resumed[0], straight[0], strict=True):
                assert relative(found, expected) < 1e-5


BERT: dict[str, Any] = {
    "family": "bert",
    "num_layers": 2,
    "hidden_size": 36,
    "num_attention_heads": 4,
    "seq_length": 32,
    "vocab_size": 281,
    "activation": "gelu",
    "dropout": 0.1,
}


def _bert(data: Path, **parallel: Any) -> dict[str, Any]:
    return {
        "model": BERT,
        "data": {"path": str(data), "split": [0.95, 0.05], "sentence_objective": "nsp"},
        "train": {"global_batch_size": 8, "micro_batch_size": 4, "max_steps": 20},
        "optimizer": {"lr": 1e-3, "eps": 1e-6, "grad_clip": 0.5},
        "parallel": parallel,
    }


def test_bert_with_padding_and_sentence_objective(
    pools: Pools, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both directions are seen, padding is not; [CLS] is on one rank of the sequence."""
    data = make_bert_dataset(tmp_path_factory.mktemp("bert"))
    single = pools(1).run(record_rank, settings=_bert(data, engine="torch"), steps=STEPS)
    for world, tensor, method, stage in (
        (2, 1, "ring", 2),
        (2, 1, "ulysses", 0),
        (4, 2, "ring", 1),
    ):
        settings = _bert(
            data,
            context_parallel_size=2,
            context_parallel_method=method,
            tensor_parallel_size=tensor,
            zero_stage=stage,
        )
        assert_same(
            merge(pools(world).run(record_rank, settings=settings, steps=STEPS)), merge(single)
        )


def saved_bytes(settings: dict[str, Any]) -> int:
    """Runs on every rank: bytes that the backward of one micro-batch needs, weights left out."""
    setup = set_up(settings)
    module, mesh = setup.engine.module, setup.mesh
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = own_tokens(setup.parts.loader.load(0)[0], mesh.cp_rank, mesh.cp_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = module(**batch)
    loss.backward()
    setup.engine.close()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_activations_fall_as_one_over_cp(
    pools: Pools, token_prefix: Path, model: str, recompute: str
) -> None:
    """What a rank keeps for the backward, within 10 % of its share; the same on each rank.

    Ulysses keeps attention's output in two orders, as heads and as tokens. Where the activation is
    not kept this alone is 6 % of a layer of these widths, and is not counted.
    """
    changes = {**MODELS[model], "model.dropout": 0.0, "model.seq_length": 64}
    changes |= {"model.hidden_size": 80, "model.ffn_hidden_size": 192}  # tables of angles are small
    changes["performance.recompute_activation"] = recompute
    changes["data.isolate_documents"] = False  # its mask is T x T bits for every method

    def kept(world: int, method: str) -> list[int]:
        parallel = _parallel(method, world, 1, False, "torch", 0, "none")
        return pools(world).run(saved_bytes, settings=settings_of(token_prefix, changes | parallel))

    (whole,) = kept(1, "")
    for world in (2, 4):
        output = LAYERS * 2 * 64 // world * 80 * 4  # layers, samples, tokens, width, fp32
        for method, twice in (("ring", 0), ("ulysses", output if recompute == "always" else 0)):
            for share in kept(world, method):
                assert abs((share - twice) * world / whole - 1) < 0.1, (world, method, share, whole)


def continued(settings: dict[str, Any], length: int) -> torch.Tensor:
    """Runs on every rank: the logits after `length` tokens, as text samples ask for them."""
    setup = set_up(settings)
    mesh, seen = setup.mesh, {}

    def ask(next_logits: Any, *args: Any, **kwargs: Any) -> list[int]:
        seen["logits"] = next_logits(torch.arange(length)[None] % 90)
        return [1]

    tokenizer: Any = SimpleNamespace(
        vocab_size=101, eod_id=0, encode=lambda text: [3], decode=lambda ids: ""
    )
    callback = samples.SampleCallback(
        Path("unused"),
        ("",),
        tokenizer,
        max_new_tokens=1,
        context_length=24,
        interval=0,
        seed=0,
        multiple=4 if mesh.cp_size > 1 else 1,
    )
    trainer: Any = SimpleNamespace(parts=setup.parts)
    with mock.patch.object(samples, "generate", ask), setup.engine.evaluating():
        callback._continue(trainer, 0, "")
    setup.engine.close()
    return seen["logits"]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_text_samples_see_the_whole_prompt(pools: Pools, token_prefix: Path, method: str) -> None:
    """A prompt is padded, cut, and its logits gathered: on all ranks those of one process."""
    for length in (1, 7, 24):
        layouts = [(1, _parallel("", 1, 1, False, "torch", 0, "none"))]
        layouts.append((2, _parallel(method, 2, 1, False, "torch", 3, "none")))
        (alone,), cut = (
            pools(world).run(
                continued, settings=settings_of(token_prefix, {**GPT, **changes}), length=length
            )
            for world, changes in layouts
        )
        for logits in cut:
            assert relative(logits.numpy(), alone.numpy()) < 1e-5


def _local_positions(micro_batch: Any, rank: int, size: int) -> dict[str, torch.Tensor]:
    own = own_tokens(micro_batch, rank, size)
    return {**own, "position_ids": torch.arange(own["input_ids"].shape[1])[None]}


def _planted(bug: str) -> AbstractContextManager[Any]:
    """Break something at a seam in this process for a while, as a mistake in the code would."""
    mask, spans, reducer = Visibility.mask, ring_attention._spans, torch_engine.GradientReducer
    target, name, wrong = {
        "mask a token off": (
            Visibility,
            "mask",
            lambda self, rows, columns: mask(self, rows + 1, columns),
        ),
        "chunks of the next rank": (
            ring_attention,
            "_spans",
            lambda rank, size, length: spans(size - 1 - rank, size, length),
        ),
        "positions begin anew on each rank": (step, "own_tokens", _local_positions),
        "chunks joined in the order of ranks": (
            context_parallel,
            "join_tokens",
            lambda parts, dim=1: torch.cat(parts, dim),
        ),
        "dropout of local places": (CounterDropout, "set_chunks", lambda *args: None),
        "gradients not summed": (
            torch_engine,
            "GradientReducer",
            lambda params, group: reducer(params, None),
        ),
        "loss not summed": (ParallelMesh, "sum_over_data", lambda self, values: values * 1.0),
        "": (step, "own_tokens", own_tokens),
    }[bug]
    return mock.patch.object(target, name, wrong)


def record_layout(settings: dict[str, Any], folder: str, layout: Layout, bug: str) -> None:
    """Runs on every rank."""
    config = load_config(
        settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
    )
    with _planted(bug):
        record_run(config, torch.device("cpu"), 1, Path(folder) / str(layout))


PLANTED = {**SGD, "train.global_batch_size": 4, "train.micro_batch_size": 4}
CORE, SEAM = "model.layers.0.attention.core", "at a seam of the sequence"
RING, ULYSSES = (Layout(cp=2, engine="torch", method=method) for method in ("ring", "ulysses"))


@pytest.fixture(scope="module")
def alone(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    settings = settings_of(token_prefix, PLANTED)
    pools(1).run(record_layout, settings=settings, folder=str(folder), layout=SINGLE, bug="")
    return folder


@pytest.mark.parametrize(
    ("bug", "layout", "what", "tensor", "cause"),
    [
        ("", RING, "", "", ""),
        ("mask a token off", RING, "output", CORE, SEAM),
        ("chunks of the next rank", RING, "output", CORE, SEAM),
        ("positions begin anew on each rank", ULYSSES, "output", "positions", "its positions"),
        ("chunks joined in the order of ranks", ULYSSES, "output", CORE, SEAM),
        ("dropout of local places", ULYSSES, "output", "embedding.dropout", "its dropout masks"),
        ("gradients not summed", RING, "replicas", "", "a missing synchronisation"),
        ("loss not summed", ULYSSES, "replicas", "", "different losses"),
    ],
)
def test_a_planted_bug_is_found_and_named(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    alone: Path,
    bug: str,
    layout: Layout,
    what: str,
    tensor: str,
    cause: str,
) -> None:
    settings = settings_of(token_prefix, PLANTED)
    pools(2).run(record_layout, settings=settings, folder=str(tmp_path), layout=layout, bug=bug)
    found = read_record(tmp_path / str(layout), layout.world_size)
    reference = read_record(alone / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        first = compare(found, reference, layout, FP32, micro=1, lr=0.1).first
    if not bug:
        assert first is None
        return
    assert first is not None
    assert first.what == what
    assert first.tensor.endswith(tensor)
    assert cause in first.cause
