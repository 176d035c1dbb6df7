"""Every accepted setting does something: each is changed alone, and a short run must show it.

The table names for every leaf of the config a legal other value and where its effect is seen. A
leaf without a row, a row without a leaf, and a change without an effect all fail.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megascale.config.schema import leaf_fields
from megascale.errors import UserError
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.integration.runs import (
    make_dataset,
    make_middle_tokenizer,
    make_tokenizer,
    settings,
)

STEPS = 4


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        leaf: its dotted path.
        value: what it is changed to; "{data}" and the like stand for prepared files.
        shows: keys of the observation that must all differ from the base run's.
        base: other settings under which it has a meaning, for both runs.
        world: ranks that both runs are made of.
    """

    leaf: str
    value: Any
    shows: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    world: int = 1


def _stage(start: int, *paths: str) -> dict[str, Any]:
    sources = [{"path": path, "weight": 1.0} for path in paths]
    return {"from_sample": start, "sources": sources}


_VALIDATES = {"evaluation.interval": 1}
_SGD = {"optimizer.name": "sgd"}
_FP16 = {"precision.dtype": "fp16"}
_OVERFLOWS = {**_FP16, "precision.initial_loss_scale_power": 40, "precision.hysteresis": 1}
_ROPE = {"model.position_embedding": "rope"}
_WINDOW = {"model.sliding_window": 3}
# large weights, so that scores and logits reach the bounds and the turns matter
_LOUD = {"model.init_std": 0.5}
_LLAMA3 = {
    **_ROPE,
    "model.rope_scaling": "llama3",
    "model.rope_scaling_factor": 8.0,
    "model.rope_original_length": 64,
}
_BERT = {"model.family": "bert", "data.path": "{bert_data}"}
_SERVED = {"data.path": "{served}", "data.cache_dir": "{folder}/scratch"}
_MIDDLE = {"data.path": "{middle}", "data.fim_rate": 1.0, "data.fim_spm_rate": 0.0}
_PIPELINE = {
    "parallel.pipeline_parallel_size": 2,
    "model.num_layers": 3,
    "train.micro_batch_size": 1,
}

ROWS = (
    Row("run.output_dir", "{folder}/elsewhere", ("files",)),
    Row("run.seed", 6, ("initial", "samples")),
    Row("run.device", "cuda", ("device",)),
    Row(
        "model.family",
        "bert",
        ("shapes", "samples"),
        {"data.path": "{bert_data}/shard_00000", "data.tokenizer": "{bert_data}/tokenizer"},
    ),
    Row("model.num_layers", 1, ("shapes",)),
    Row("model.hidden_size", 32, ("shapes",)),
    Row("model.num_attention_heads", 4, ("losses", "grad_norms")),
    Row("model.head_dim", 4, ("shapes",)),
    Row("model.num_kv_heads", 1, ("shapes",)),
    Row("model.ffn_hidden_size", 24, ("shapes",)),
    Row("model.seq_length", 8, ("shapes", "samples")),
    Row("model.vocab_size", 300, ("shapes",)),
    Row("model.position_embedding", "rope", ("shapes", "losses")),
    Row("model.norm", "rmsnorm", ("shapes", "grad_norms")),
    Row("model.norm_eps", 0.5, ("losses", "grad_norms")),
    # at small values gelu and its approximation agree to the last bit
    Row("model.activation", "gelu", ("losses",), {"model.init_std": 0.5}),
    Row("model.activation", "swiglu", ("shapes",)),
    Row("model.activation", "geglu", ("losses",), {**_LOUD, "model.activation": "swiglu"}),
    Row("model.activation", "geglu_tanh", ("losses",), {**_LOUD, "model.activation": "geglu"}),
    Row("model.norm_placement", "sandwich", ("shapes", "losses")),
    Row("model.norm_unit_offset", True, ("shapes", "initial"), {"model.norm": "rmsnorm"}),
    Row("model.parallel_residual", True, ("losses", "grad_norms"), _LOUD),
    Row("model.bias", False, ("shapes",)),
    Row("model.qkv_bias", False, ("shapes",)),
    Row("model.attention_output_bias", False, ("shapes",)),
    Row("model.mlp_bias", False, ("shapes",)),
    Row("model.qk_norm", True, ("shapes", "losses")),
    Row("model.query_scaling", 0.5, ("losses",), _LOUD),
    Row("model.attention_softcap", 0.1, ("losses",), _LOUD),
    Row("model.logit_softcap", 0.5, ("losses",), _LOUD),
    Row("model.sliding_window", 3, ("losses",), _LOUD),
    Row("model.global_layer_interval", 2, ("losses",), {**_LOUD, **_WINDOW}),
    Row("model.scale_embeddings", True, ("losses",)),
    Row("model.tie_word_embeddings", False, ("shapes",)),
    Row("model.dropout", 0.5, ("losses",)),
    Row("model.attention_dropout", 0.5, ("losses",)),
    Row("model.rope_theta", 20.0, ("losses",), _ROPE),
    Row("model.rope_local_theta", 20.0, ("losses",), {**_ROPE, **_WINDOW}),
    Row("model.rotary_fraction", 0.5, ("losses",), _ROPE),
    Row(
        "model.rope_scaling",
        "llama3",
        ("losses",),
        {**_ROPE, "model.rope_scaling": "linear", "model.rope_scaling_factor": 8.0},
    ),
    Row("model.rope_scaling_factor", 2.0, ("losses",), _LLAMA3),
    Row("model.rope_low_freq_factor", 3.0, ("losses",), _LLAMA3),
    Row("model.rope_high_freq_factor", 20.0, ("losses",), _LLAMA3),
    Row("model.rope_original_length", 16, ("losses",), _LLAMA3),
    Row("model.num_token_types", 3, ("shapes",), _BERT),
    Row("model.init_std", 0.1, ("initial", "losses")),
    Row("data.path", "{other}", ("samples",)),
    Row("data.cache_dir", "{folder}/near", ("files",), _SERVED),
    Row("data.split", [0.5, 0.5], ("validations", "samples")),
    Row(
        "data.tokenizer",
        "{tokenizer}",
        ("files",),
        {"data.path": "{prefix}", "model.vocab_size": 270},
    ),
    Row(
        "data.stages",
        [_stage(0, "{data}"), _stage(2, "{data}", "{other}")],
        ("samples", "losses", "sources"),
        {"data.path": None, "data.stages": [_stage(0, "{data}")]},
    ),
    Row("data.packing", "best_fit", ("samples", "losses", "sources", "notes")),
    Row("data.packing", "one_document", ("samples", "losses", "sources", "notes")),
    Row("data.fim_rate", 1.0, ("samples", "losses"), {"data.path": "{middle}"}),
    Row("data.fim_spm_rate", 1.0, ("samples", "losses"), _MIDDLE),
    Row("data.isolate_documents", True, ("samples", "losses")),
    Row("data.masking", "whole_word", ("samples", "losses"), _BERT),
    Row("data.masking", "ngram", ("samples", "losses"), _BERT),
    Row("data.mask_probability", 0.5, ("samples", "losses"), _BERT),
    Row("data.sentence_objective", "nsp", ("shapes", "samples", "losses"), _BERT),
    Row("data.sentence_objective", "sop", ("shapes", "samples", "losses"), _BERT),
    Row("data.validation", {"other": "{other}"}, ("validations",)),
    Row("train.global_batch_size", 8, ("samples", "samples_seen")),
    Row("train.micro_batch_size", 4, ("micro_batches",)),
    Row("train.max_steps", 2, ("losses", "checkpoints")),
    Row(
        "train.batch_size_ramp",
        {"start": 2, "increment": 2, "samples": 4},
        ("samples_seen", "losses"),
    ),
    Row("train.label_smoothing", 0.5, ("losses",)),
    Row("train.z_loss", 0.1, ("losses",)),
    Row("train.ema_decay", 0.5, ("saved_kinds",)),
    Row("optimizer.name", "sgd", ("losses", "state")),
    Row("optimizer.name", "lion", ("losses", "state")),
    Row("optimizer.name", "lamb", ("losses",)),
    Row("optimizer.name", "adafactor", ("losses", "state")),
    Row("optimizer.name", "muon", ("losses", "state")),
    Row("optimizer.layer_lr_decay", 0.5, ("losses",)),
    Row("optimizer.lr", 2e-2, ("lrs", "losses")),
    Row("optimizer.betas", [0.5, 0.6], ("losses",)),
    Row("optimizer.eps", 1e-2, ("losses",)),
    Row("optimizer.momentum", 0.5, ("losses",), _SGD),
    Row("optimizer.weight_decay", 0.9, ("losses",)),
    Row("optimizer.grad_clip", 0.1, ("losses",), _SGD),
    Row("schedule.name", "constant", ("lrs",), {"schedule.min_lr": 0.0}),
    Row("schedule.name", "linear", ("lrs",)),
    Row("schedule.name", "wsd", ("lrs",)),
    Row("schedule.name", "inverse_sqrt", ("lrs",)),
    Row("schedule.warmup_steps", 2, ("lrs",)),
    Row("schedule.min_lr", 5e-3, ("lrs",)),
    Row("schedule.decay_steps", 2, ("lrs",)),
    Row("precision.dtype", "bf16", ("dtype", "losses")),
    Row("precision.dtype", "fp16", ("dtype", "losses", "loss_scales")),
    Row("precision.loss_scale", 8.0, ("loss_scales",), _FP16),
    Row("precision.initial_loss_scale_power", 10, ("loss_scales",), _FP16),
    Row("precision.loss_scale_window", 1, ("loss_scales",), _FP16),
    Row("precision.hysteresis", 3, ("loss_scales",), _OVERFLOWS),
    Row("precision.min_loss_scale", 2.0**39, ("ended",), _OVERFLOWS),
    Row("parallel.engine", "torch", ("engine",), {"parallel.zero_stage": 1}),
    Row("parallel.zero_stage", 3, ("engine",), {"parallel.engine": "torch"}),
    Row("parallel.offload_optimizer", True, ("offloaded",), {"parallel.zero_stage": 1}),
    Row("parallel.offload_parameters", True, ("offloaded",), {"parallel.zero_stage": 3}),
    Row("parallel.tensor_parallel_size", 2, ("modules", "local_shapes"), world=2),
    Row(
        "parallel.sequence_parallel",
        True,
        ("modules",),
        {"parallel.tensor_parallel_size": 2},
        world=2,
    ),
    Row(
        "parallel.tensor_parallel_across_machines",
        True,
        ("on_two_machines",),
        {"parallel.tensor_parallel_size": 2},
        world=2,
    ),
    Row("parallel.activation_recomputation", "full", ("recomputed",)),
    Row("parallel.activation_recomputation", "selective", ("recomputed",)),
    Row("parallel.activation_memory_mb", 0.05, ("recomputed", "console_budget")),
    Row("parallel.collective_timeout_s", 99, ("timeout",)),
    Row("parallel.pipeline_parallel_size", 2, ("local_shapes", "actions"), world=2),
    Row(
        "parallel.virtual_pipeline_stages",
        2,
        ("local_shapes", "actions"),
        {
            "parallel.pipeline_parallel_size": 2,
            "parallel.pipeline_schedule": "interleaved_zero_bubble",
            "model.num_layers": 4,
        },
        world=2,
    ),
    Row("parallel.pipeline_schedule", "gpipe", ("actions",), _PIPELINE, world=2),
    Row("parallel.layers_per_stage", [1, 2], ("local_shapes",), _PIPELINE, world=2),
    Row("parallel.context_parallel_size", 2, ("modules",), world=2),
    Row(
        "parallel.context_parallel_method",
        "ring",
        ("modules",),
        {"parallel.context_parallel_size": 2},
        world=2,
    ),
    Row("evaluation.interval", 2, ("validations",)),
    Row("evaluation.max_samples", 1, ("validations",)),
    Row("evaluation.prompts", ["the quick"], ("texts",)),
    Row("evaluation.sample_tokens", 3, ("texts",), {"evaluation.prompts": ["the", "fox"]}),
    Row(
        "evaluation.early_stop_patience",
        1,
        ("stop", "losses"),
        {**_VALIDATES, "evaluation.early_stop_patience": 9, "evaluation.early_stop_min_delta": 9.0},
    ),
    Row(
        "evaluation.early_stop_min_delta",
        9.0,
        ("stop", "losses"),
        {**_VALIDATES, "evaluation.early_stop_patience": 1},
    ),
    Row("evaluation.target_loss", 99.0, ("stop", "losses"), _VALIDATES),
    Row("checkpoint.save_interval", 1, ("checkpoints",)),
    Row("checkpoint.keep_last", 1, ("checkpoints",), {"checkpoint.save_interval": 1}),
    Row(
        "checkpoint.keep_every",
        2,
        ("checkpoints",),
        {"checkpoint.save_interval": 1, "checkpoint.keep_last": 1},
    ),
    Row("checkpoint.save_minutes", 1e-6, ("checkpoints",)),
    Row("checkpoint.folder", "{folder}/run/saved", ("files",)),
    Row(
        "checkpoint.reuse_files",
        False,
        ("console_saved",),
        {"checkpoint.save_interval": 1, "checkpoint.keep_last": 1},
    ),
    Row("checkpoint.async_save", True, ("console_saved",)),
    Row("checkpoint.staging_dir", "{folder}/staging", ("files",)),
    Row("checkpoint.init_from", "{weights}", ("losses",)),
    Row("checkpoint.init_optimizer", True, ("losses",), {"checkpoint.init_from": "{weights}"}),
    Row("checkpoint.keep_best", "valid_loss", ("checkpoints",), _VALIDATES),
    Row("logging.log_interval", 3, ("console",)),
    Row("logging.tensorboard", True, ("files",)),
    Row("performance.shared_memory", "never", ("group",), world=2),
    Row("performance.fused_loss", "never", ("operations",)),
    Row("performance.attention", "blockwise", ("operations",)),
    Row("performance.recompute_activation", "never", ("gelus",)),
    Row("performance.fused_optimizer", "never", ("operations",)),
    Row("performance.compiled_kernels", "never", ("operations",), {"precision.dtype": "bf16"}),
    Row("performance.keep_memory", "never", ("keeps_memory",)),
)


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest()[:16]


def _on_two_machines(config: Any) -> str:
    """What is said of this run if its second half of ranks were on another machine."""
    from megascale.launcher.preflight import check_tensor_groups

    parallel = config.parallel
    ranks = parallel.tensor_parallel_size
    may_cross = parallel.tensor_parallel_across_machines
    try:
        return check_tensor_groups(["a", "b"][:ranks], ranks, may_cross=may_cross)
    except UserError as error:
        return f"refused: {error}"


@contextmanager
def _operations(seen: dict[str, Any]) -> Iterator[None]:
    """Put the names of what torch runs inside into `seen`, and how often that is GELU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield
    names = [event.name for event in profiler.events() if event.name.startswith("aten::")]
    seen["operations"], seen["gelus"] = sorted(set(names)), names.count("aten::gelu")


def observe(tree: dict[str, Any], folder: str, watched: bool = False) -> dict[str, Any]:
    """Runs on the rank: train by this config as the command line does, and tell what is seen.

    Args:
        watched: whether the names of torch's operations are wanted, too.
    """
    from rich.console import Console

    from megascale.cli.config import all_checks
    from megascale.config.load import load_config
    from megascale.launcher.environment import ProcessInfo
    from megascale.launcher.rendezvous import choose_device
    from megascale.training import host
    from megascale.training.assemble import assemble

    text = io.StringIO()
    try:
        world = torch.distributed.get_world_size()
        config = load_config(tree, checks=all_checks(), world_size=world)
        device = choose_device(config.run.device, ProcessInfo(0, 1, 0, False))
        with mock.patch.object(host, "keep_freed_memory") as kept:  # of a process: not undone
            run = assemble(config, device, console=Console(file=text, width=300))
    except UserError as error:
        return {"refused": str(error), "device": "refused"}
    engine, loader = run.engine, run.trainer.parts.loader
    masters = {
        f.name: (f.global_shape, f.tensor.numpy().copy()) for f in engine.fragments(["master"])
    }
    batches = loader.load(0)
    seen: dict[str, Any] = {
        "device": device.type,
        "keeps_memory": kept.called,
        "ended": "",
        "engine": type(engine).__name__,
        "dtype": str(next(iter(engine.module.parameters())).dtype),
        "modules": sorted({type(module).__name__ for module in engine.module.modules()}),
        "local_shapes": {name: tuple(p.shape) for name, p in engine.module.named_parameters()},
        "recomputed": [n for n, m in engine.module.named_modules() if "forward" in vars(m)],
        "shapes": {name: shape for name, (shape, _) in masters.items()},
        "initial": {name: _digest(values.tobytes()) for name, (_, values) in masters.items()},
        "micro_batches": [tuple(batch["input_ids"].shape) for batch in batches],
        "samples": [[sorted((k, v.tolist()) for k, v in batch.items())] for batch in batches],
    }
    seen["on_two_machines"] = _on_two_machines(config)
    group = run.trainer.parts.mesh.dp_group
    backend = group._get_backend(torch.device("cpu"))
    seen["timeout"] = backend.options._timeout
    seen["group"] = type(group).__name__
    zero = getattr(engine, "_zero", None)
    offloading = ("cpu_offload", "offload_optimizer", "offload_param")
    seen["offloaded"] = [bool(getattr(zero, name, False)) for name in offloading]
    try:
        with _operations(seen) if watched else nullcontext():
            run.trainer.fit()
    except UserError as error:
        seen["ended"] = str(error)
    finally:
        pipeline = engine.pipeline
        seen["actions"] = [] if pipeline is None else [tuple(action) for action in pipeline.trace]
        seen["state"] = sorted({f.kind for f in engine.fragments(engine.state_kinds)})
        engine.close()
    return {**seen, **_written(config.run.output_dir, folder, text.getvalue(), run.trainer)}


def _written(output: str, folder: str, console: str, trainer: Any) -> dict[str, Any]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    manifests = sorted(Path(output).glob("checkpoints/*/manifest.json"))
    return {
        "losses": [line["loss"] for line in lines],
        "lrs": [line["lr"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "samples_seen": [line["samples_seen"] for line in lines],
        "loss_scales": [line["loss_scale"] for line in lines],
        "sources": [[list(count.values()) for count in line["sources"].values()] for line in lines],
        "notes": [line.split(" of ")[0] for line in console.splitlines() if "padding" in line],
        "console": [
            line.split("  loss")[0] for line in console.splitlines() if "grad norm" in line
        ],
        "validations": [line for line in console.splitlines() if "perplexity" in line],
        "console_budget": [line for line in console.splitlines() if "activations" in line],
        "console_saved": [
            line.split(" saved")[0] for line in console.splitlines() if "checkpoint of" in line
        ],
        "checkpoints": sorted(path.parent.name for path in manifests),
        "saved_kinds": [json.loads(path.read_text())["kinds"] for path in manifests],
        "texts": [path.read_text() for path in Path(output).glob("samples.jsonl")],
        "stop": trainer.stop_reason,
        # an event file's name has a time and a process number in it
        "files": sorted(
            {
                str(path.relative_to(folder)).split("events.out")[0]
                for path in Path(folder).rglob("*")
                if path.is_file()
            }
        ),
    }


@dataclass
class Observer:
    """Runs configs on a pool of one rank; base runs are made once."""

    pools: Pools
    root: Path
    names: dict[str, str]
    _base: dict[str, dict[str, Any]] = field(default_factory=dict)
    _count: int = 0

    def __call__(
        self, changes: Mapping[str, Any], world: int = 1, watched: bool = False
    ) -> dict[str, Any]:
        self._count += 1
        folder = self.root / f"run_{self._count}"
        folder.mkdir()
        tree = settings(Path(self.names["data"]), folder / "run", train__max_steps=STEPS)
        tree["checkpoint"]["save_interval"] = 0
        for path, value in changes.items():
            section, _, name = path.partition(".")
            value = self._filled(value, folder)
            tree.setdefault(section, {})[name] = value
        return self.pools(world).run(observe, tree=tree, folder=str(folder), watched=watched)[0]

    def _filled(self, value: Any, folder: Path) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(item, folder) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, folder) for item in value]
        return value.format(folder=folder, **self.names) if isinstance(value, str) else value

    def base(
        self, changes: Mapping[str, Any], world: int = 1, watched: bool = False
    ) -> dict[str, Any]:
        """The run that a change is compared with."""
        key = f"{world} {watched} {json.dumps(dict(changes), sort_keys=True)}"
        if key not in self._base:
            self._base[key] = self(changes, world, watched)
        return self._base[key]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL under which all processes of this machine see it."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def observer(
    pools: Pools, tmp_path_factory: pytest.TempPathFactory, served: tuple[Path, str]
) -> Observer:
    root = tmp_path_factory.mktemp("effects")
    (root / "other").mkdir()
    (root / "bert").mkdir()
    (root / "middle").mkdir()
    tokenizer = make_tokenizer(root)
    data = make_dataset(root, tokenizer)
    shutil.copytree(data, served[0] / "data")
    names = {
        "data": str(data),
        "other": str(make_dataset(root / "other", tokenizer, shift=3)),
        "middle": str(make_dataset(root / "middle", make_middle_tokenizer(tokenizer))),
        "bert_data": str(make_bert_dataset(root / "bert")),
        "served": f"{served[1]}/data",
        "prefix": str(data / "shard_00000"),
        "tokenizer": str(tokenizer),
    }
    observer = Observer(pools, root, names)
    (root / "source").mkdir()
    observer({"run.output_dir": str(root / "source"), "run.seed": 9})
    names["weights"] = str(root / "source" / "checkpoints" / f"step_{STEPS:08d}")
    return observer


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    assert {row.leaf for row in ROWS} == {path for path, _ in leaf_fields()}


def test_two_runs_of_one_config_show_the_same(observer: Observer) -> None:
    """Else a difference could be chance."""
    first, second = observer.base({}), observer({})
    for seen in (first, second):
        seen["files"] = [name for name in seen["files"] if name.startswith("run/")]
    assert first == second
    assert len(first["losses"]) == STEPS
    assert all(loss > 0 for loss in first["losses"])


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.leaf}={row.value}" for row in ROWS])
def test_a_change_has_an_effect(row: Row, observer: Observer) -> None:
    watched = bool({"operations", "gelus"} & set(row.shows))
    changed = observer({**row.base, row.leaf: row.value}, row.world, watched)
    base = observer.base(row.base, row.world, watched)
    assert "refused" not in base, base["refused"]
    if row.leaf != "run.device":  # refused where there is no GPU: that is its effect
        assert "refused" not in changed, changed["refused"]
    for key in row.shows:
        assert changed[key] != base[key], f"{row.leaf} = {row.value} left {key} as it was"
