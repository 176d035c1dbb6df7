"""From a config to a run, in the one legal order, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megascale import __version__
from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.ranks import make_ranks
from megascale.checkpoint.reader import CheckpointReader
from megascale.config.load import dump_config
from megascale.config.schema import Config
from megascale.data.atomic_files import write_file
from megascale.data.batch_size import batch_size_schedule
from megascale.data.ledger import Ledger
from megascale.data.loader import BatchLoader, EvaluationLoader
from megascale.data.protocol import FiniteSampleSource, SampleSource
from megascale.engine.capabilities import choose_engine
from megascale.engine.factory import DTYPES, build_engine
from megascale.engine.protocol import Engine, OptimizerRecipe, SumOverShards
from megascale.errors import UserError
from megascale.optim.factory import (
    COUNTS_STEPS,
    STATE_KEYS,
    OptimizerSettings,
    build_optimizer,
    state_shapes,
)
from megascale.optim.param_groups import parameter_groups
from megascale.optim.schedule import LearningRateSchedule
from megascale.parallel.activation_checkpoint import recompute
from megascale.parallel.context_parallel import ContextGroup
from megascale.parallel.mesh import ParallelMesh, build_mesh, limit_waits
from megascale.parallel.pipeline import PipelineLayout, balance, cut_chunks
from megascale.parallel.tensor_parallel import TensorGroup, whole_placements
from megascale.training.activation_budget import choose_modes
from megascale.training.callbacks.average import WeightAverageCallback
from megascale.training.callbacks.base import Callback
from megascale.training.callbacks.checkpointing import CheckpointCallback
from megascale.training.callbacks.console import ConsoleCallback
from megascale.training.callbacks.early_stop import EarlyStopCallback
from megascale.training.callbacks.ledger import LedgerCallback
from megascale.training.callbacks.metrics_file import MetricsFileCallback
from megascale.training.callbacks.samples import SampleCallback
from megascale.training.callbacks.save_requests import SaveRequests
from megascale.training.callbacks.tensorboard import TensorBoardCallback
from megascale.training.callbacks.validation import ValidationCallback
from megascale.training.data_record import run_attachments, run_constants
from megascale.training.datasets import (
    Corpora,
    RunData,
    open_corpora,
    resolve_vocab_size,
)
from megascale.training.hardware import peak_flops
from megascale.training.host import prepare_host
from megascale.training.initial_weights import load_initial_weights, open_initial_weights
from megascale.training.output import open_output, run_manager
from megascale.training.resume import load_state, require_same_data, restore
from megascale.training.state import TrainState
from megascale.training.step import StepParts
from megascale.training.tasks.base import Task
from megascale.training.tasks.registry import build_task
from megascale.training.throughput import Throughput
from megascale.training.trainer import Trainer


@dataclass
class Run:
    """An assembled run, ready for `trainer.fit()`."""

    config: Config
    trainer: Trainer
    engine: Engine
    corpora: Corpora
    data: RunData


def assemble(
    config: Config, device: torch.device, *, resume: bool = False, console: Console | None = None
) -> Run:
    """Build everything that a run needs; the default process group must be initialised.

    Args:
        config: checked against the world size.
        device: this process's device.
        resume: continue from the newest intact checkpoint of run.output_dir.
        console: where progress goes; None prints nothing.

    Raises:
        UserError: data, output folder or checkpoint do not fit the config.
    """
    mesh = mesh_of(config, device)
    say = _speaker(console, mesh)
    corpora = open_corpora(config)
    config = resolve_vocab_size(config, corpora)
    ranks = make_ranks()
    manager = run_manager(config, ranks, open_output(config, ranks))
    try:
        return _assemble(config, corpora, mesh, device, manager, resume, say, console)
    except BaseException:
        manager.close()
        raise


def _assemble(
    config: Config,
    corpora: Corpora,
    mesh: ParallelMesh,
    device: torch.device,
    manager: CheckpointManager,
    resume: bool,
    say: Callable[[str], None],
    console: Console | None,
) -> Run:
    """The rest of `assemble`, with the run's folder locked."""
    for note in prepare_host(config.performance, device):
        say(note)
    reader = _find_checkpoint(manager, resume, say)
    task = build_task(config)
    data = task.open_data(corpora)
    source = config.checkpoint.init_from if reader is None else None
    initial = open_initial_weights(source, task, corpora.tokenizer) if source else None
    engine = assemble_engine(config, task, mesh, device, None, data.train, say)

    state = TrainState()
    saved: dict[str, Any] = {}
    if reader is not None:
        require_same_data(reader, config, corpora)
        state, saved = load_state(reader, engine, mesh)
        say(f"resumed from {reader.storage.root} at step {state.step}")
    if initial is not None:
        state.updates = load_initial_weights(initial, engine, config.checkpoint.init_optimizer)
        say(f"initial weights from {initial.storage.root}")
    if mesh.is_main:  # not before: a refused resume leaves the run's own config as it was
        write_file(Path(config.run.output_dir) / "config.yaml", dump_config(config).encode())

    parts = _step_parts(config, data, engine, mesh, device)
    average = _weight_average(config, engine, reader)
    ledger = LedgerCallback(parts.ledger)
    callbacks = [*average, ledger, *_callbacks(config, corpora, data, mesh, manager, console)]
    for callback in callbacks:
        if callback.name in saved:
            restore(callback, saved[callback.name], reader)
    if reader is not None:
        reader.close()
    enrich = Throughput(task.flops_per_sample(), peak_flops(device, DTYPES[config.precision.dtype]))
    trainer = Trainer(parts, state, config.train.max_steps, callbacks, enrich, say)
    say(_headline(config, task, mesh, device))
    for note in data.notes:
        say(note)
    return Run(config, trainer, engine, corpora, data)


def assemble_step(
    config: Config,
    device: torch.device,
    wrap: Callable[[Engine], Any] | None = None,
    weights_of: Config | None = None,
) -> StepParts:
    """Only what a step needs, without output folder, callbacks or checkpoints.

    Args:
        wrap: put around the engine, to observe it.
        weights_of: a config whose seed draws the initial weights instead.
    """
    prepare_host(config.performance, device)
    mesh = mesh_of(config, device)
    corpora = open_corpora(config)
    config = resolve_vocab_size(config, corpora)
    task = build_task(config)
    data = task.open_data(corpora)
    start = task if weights_of is None else build_task(resolve_vocab_size(weights_of, corpora))
    engine = assemble_engine(config, task, mesh, device, start, data.train)
    return _step_parts(config, data, wrap(engine) if wrap else engine, mesh, device)


def mesh_of(config: Config, device: torch.device) -> ParallelMesh:
    """The mesh of the config's layout over all processes."""
    mesh = build_mesh(
        device.type,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
        through_memory=config.performance.shared_memory == "auto",
    )
    limit_waits(timedelta(seconds=config.parallel.collective_timeout_s))
    return mesh


def _step_parts(
    config: Config,
    data: RunData,
    engine: Engine,
    mesh: ParallelMesh,
    device: torch.device,
) -> StepParts:
    train = config.train
    loader = BatchLoader(
        data.train,
        batch_size_schedule(train),
        train.micro_batch_size,
        mesh.dp_rank,
        mesh.dp_size,
        vocab_size=config.model.vocab_size,
    )
    return StepParts(
        engine=engine,
        loader=loader,
        schedule=build_schedule(config),
        mesh=mesh,
        device=device,
        ledger=Ledger(data.train, config.data.source_paths),
    )


def assemble_engine(
    config: Config,
    task: Task,
    mesh: ParallelMesh,
    device: torch.device,
    start: Task | None = None,
    samples: SampleSource | None = None,
    say: Callable[[str], None] | None = None,
) -> Engine:
    """Model on meta -> cuts over tp, cp, pp -> recomputation -> engine -> initial weights.

    The engine divides the parameters before they take memory, and the weights are drawn into the
    parts that this rank keeps: the start needs no more than a step.

    Args:
        start: draws the initial weights instead of `task`: with another seed.
        samples: what is trained on; see `choose_modes`, as for `say`.
    """
    with torch.device("meta"):
        module = task.build_module()
    placements = whole_placements(module)
    if mesh.tp_size > 1:
        placements = task.parallelize(module, tensor_group(config, mesh))
    if mesh.cp_size > 1:
        task.parallelize_context(module, context_group(config, mesh))
    layout = pipeline_layout(config, task)
    if layout is not None:
        task.keep_chunks(module, [layout.chunks[stage] for stage in layout.stages_of(mesh.pp_rank)])
        placements = {name: placements[name] for name, _ in module.named_parameters()}
    blocks = task.blocks(module)
    recompute(blocks, choose_modes(config, module, blocks, mesh, layout, device, samples, say))
    recipe = optimizer_recipe(config, device)
    engine = build_engine(config, module, device, blocks, recipe, mesh, placements, layout)
    with torch.no_grad():
        for fragment in engine.fragments(["master"], replicas=True):
            (start or task).fill_initial(fragment)
    engine.finish_load()
    limit_waits(timedelta(seconds=config.parallel.collective_timeout_s))  # the engine's own groups
    return engine


def pipeline_layout(config: Config, task: Task) -> PipelineLayout | None:
    """Which layers lie on which pipeline rank; None without a pipeline."""
    parallel = config.parallel
    if parallel.pipeline_parallel_size == 1:
        return None
    num_stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_stages
    counts = parallel.layers_per_stage or balance(task.stage_costs(), num_stages)
    return PipelineLayout(
        schedule=parallel.pipeline_schedule,
        size=parallel.pipeline_parallel_size,
        chunks=cut_chunks(counts),
        hidden_size=config.model.hidden_size,
        sequence_shards=parallel.tensor_parallel_size if parallel.sequence_parallel else 1,
        tied_weight=task.tied_weight(),
    )


def tensor_group(config: Config, mesh: ParallelMesh) -> TensorGroup:
    """What a cut needs to know of the mesh."""
    return TensorGroup(mesh.tp_group, mesh.tp_rank, mesh.tp_size, config.parallel.sequence_parallel)


def context_group(config: Config, mesh: ParallelMesh) -> ContextGroup:
    """What a cut of the sequence needs to know of the mesh."""
    return ContextGroup(
        group=mesh.cp_group,
        rank=mesh.cp_rank,
        size=mesh.cp_size,
        method=config.resolved_context_parallel_method,
        tensor_rank=mesh.tp_rank,
        tensor_size=mesh.tp_size,
    )


def optimizer_recipe(config: Config, device: torch.device) -> OptimizerRecipe:
    """How every engine builds the config's optimizer."""
    optimizer = config.optimizer
    settings = OptimizerSettings(
        optimizer.name,
        optimizer.lr,
        optimizer.betas,
        optimizer.eps,
        optimizer.momentum,
        fused=_fuses_optimizer(config, device),
    )

    def build(
        named: Iterable[tuple[str, torch.Tensor]], sum_over_shards: SumOverShards | None = None
    ) -> torch.optim.Optimizer:
        groups = parameter_groups(
            named,
            optimizer.weight_decay,
            optimizer.layer_lr_decay,
            config.model.num_layers,
            apart=optimizer.name == "muon",
        )
        for group in groups:
            group.pop("names")
        return build_optimizer(settings, groups, sum_over_shards)

    keeps_state = optimizer.name != "sgd" or optimizer.momentum > 0
    return OptimizerRecipe(
        build=build,
        state_keys=STATE_KEYS[optimizer.name] if keeps_state else (),
        counts_steps=optimizer.name in COUNTS_STEPS,
        grad_clip=optimizer.grad_clip,
        state_shapes=partial(state_shapes, optimizer.name) if keeps_state else None,
    )


def _fuses_optimizer(config: Config, device: torch.device) -> bool:
    """Whether an update is one pass.

    On CPUs torch's fused kernels round the last elements of a tensor, too few for a vector, unlike
    all others. DeepSpeed steps on flat partitions, in which the copies that tensor-parallel ranks
    or two pipeline stages hold of one weight lie at different places: they would drift apart.
    """
    choice, parallel = config.performance.fused_optimizer, config.parallel
    if choice != "auto":
        return choice == "always"
    holds_copies = parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1
    is_flat = choose_engine(config, device.type) == "deepspeed"
    return not (is_flat and holds_copies and device.type == "cpu")


def build_schedule(config: Config) -> LearningRateSchedule:
    """The learning rate as a function of the step."""
    return LearningRateSchedule(
        name=config.schedule.name,
        lr=config.optimizer.lr,
        min_lr=config.schedule.min_lr,
        warmup_steps=config.schedule.warmup_steps,
        max_steps=config.train.max_steps,
        decay_steps=config.schedule.decay_steps,
    )


def evaluation_loaders(
    datasets: Iterable[FiniteSampleSource],
    micro_batch_size: int,
    mesh: ParallelMesh,
    max_samples: int | None = None,
) -> list[EvaluationLoader]:
    """One loader a dataset, dealt over the data-parallel ranks."""
    return [
        EvaluationLoader(dataset, micro_batch_size, mesh.dp_rank, mesh.dp_size, max_samples)
        for dataset in datasets
    ]


def _callbacks(
    config: Config,
    corpora: Corpora,
    data: RunData,
    mesh: ParallelMesh,
    manager: CheckpointManager,
    console: Console | None,
) -> list[Callback]:
    """In the order in which a step's result passes them: judge, record, show, save."""
    output = Path(config.run.output_dir)
    evaluation = config.evaluation
    loaders = {
        name: evaluation_loaders(
            data.held_out[name], config.train.micro_batch_size, mesh, evaluation.max_samples
        )
        for name in config.data.validation_names
    }
    callbacks: list[Callback] = [
        ValidationCallback(loaders, evaluation.interval),
        *_samples(config, corpora),
        EarlyStopCallback(
            evaluation.early_stop_patience,
            evaluation.early_stop_min_delta,
            evaluation.target_loss,
            next(iter(loaders), ""),
        ),
        MetricsFileCallback(output / "metrics.jsonl"),
    ]
    if console is not None:
        callbacks.append(ConsoleCallback(console, config.logging.log_interval))
    if config.logging.tensorboard:
        callbacks.append(TensorBoardCallback(output / "tensorboard"))
    callbacks.append(
        CheckpointCallback(
            manager,
            config.checkpoint.save_interval,
            run_constants(config, corpora),
            run_attachments(config, corpora),
            config.checkpoint.keep_best,
            SaveRequests(output, config.checkpoint.save_minutes),
        )
    )
    return callbacks


def _weight_average(
    config: Config, engine: Engine, reader: CheckpointReader | None
) -> list[Callback]:
    decay = config.train.ema_decay
    return [] if decay is None else [WeightAverageCallback(engine, decay, reader)]


def _samples(config: Config, corpora: Corpora) -> list[Callback]:
    evaluation = config.evaluation
    if not evaluation.prompts:
        return []
    if corpora.tokenizer is None:
        raise UserError(
            f"evaluation.prompts of {len(evaluation.prompts)} texts, but the data has no tokenizer",
            rule="a text is continued with the tokenizer of the training data",
            remedy="set data.tokenizer, or leave evaluation.prompts out",
        )
    callback = SampleCallback(
        Path(config.run.output_dir) / "samples.jsonl",
        evaluation.prompts,
        corpora.tokenizer,
        max_new_tokens=evaluation.sample_tokens,
        context_length=config.model.seq_length,
        interval=evaluation.interval,
        seed=config.run.seed,
        multiple=config.parallel.sequence_multiple,
    )
    return [callback]


def _find_checkpoint(
    manager: CheckpointManager, resume: bool, say: Callable[[str], None]
) -> CheckpointReader | None:
    """The checkpoint to continue from, or None for a new run."""
    if not resume:
        existing = manager.steps()
        if existing:
            raise UserError(
                f"{manager.root} already holds checkpoints, the newest of step {existing[-1]}",
                rule="a new run may not overwrite another one",
                remedy="continue it with --resume, or choose another run.output_dir",
            )
        return None
    reader, notes = manager.open_newest_intact()
    for note in notes:
        say(f"warning: {note}")
    if reader is None:
        say(f"--resume: no checkpoint in {manager.root} yet, starting from step 0")
    return reader


def _speaker(console: Console | None, mesh: ParallelMesh) -> Callable[[str], None]:
    def say(text: str) -> None:
        if console is not None and mesh.is_main:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    return say


def _headline(config: Config, task: Task, mesh: ParallelMesh, device: torch.device) -> str:
    with torch.device("meta"):  # a rank's own module may be a part of it
        parameters = sum(parameter.numel() for parameter in task.build_module().parameters())
    return (
        f"megascale {__version__}: {config.model.family}, {parameters:,} parameters, "
        f"{mesh.world_size} process(es) on {device.type}, "
        f"engine {choose_engine(config, device.type)}, "
        f"ZeRO stage {config.parallel.zero_stage}, {config.precision.dtype}"
    )
