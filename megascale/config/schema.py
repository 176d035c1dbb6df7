"""The tree of settings of a run: frozen pydantic models, one a section, one field a setting.

Types are strict ("5" is not an integer, true is not a number; an integer is accepted where a
float is asked), unknown names are refused and every number is bounded and finite. Rules that
join several fields are in `megascale.config.checks`; what a section means to a part of the
program is in that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from posixpath import normpath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from megascale.config.fields import (
    Count,
    CountOrZero,
    Fraction,
    NamedPaths,
    NonNegative,
    Pair,
    Positive,
    Rate,
    SampleNumber,
    Section,
    Share,
    Split,
    Text,
    Texts,
    to_tuple,
)
from megascale.config.model_schema import ModelConfig
from megascale.config.performance_schema import PerformanceConfig


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    output_dir: Text = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, logs/."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1234
    """Seed of initial weights, sample order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA when a device is present, else the CPU."""


class WeightedPath(Section):
    """One dataset of a blend."""

    path: Text
    """A prepared dataset's folder, or a Megatron prefix (without .bin or .idx)."""
    weight: Positive
    """Share of the samples of this dataset, relative to the other weights."""


def _each_once(sources: tuple[WeightedPath, ...]) -> tuple[WeightedPath, ...]:
    paths = [normpath(source.path) for source in sources]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        rule = "must name each dataset once, and {path} is named twice; add up its weights"
        raise PydanticCustomError("paths_once", rule, {"path": twice[0]})
    return sources


Blend = Annotated[
    tuple[WeightedPath, ...],
    Field(min_length=1),
    BeforeValidator(to_tuple),
    AfterValidator(_each_once),
]


class DataStage(Section):
    """One mix of datasets."""

    from_sample: SampleNumber
    """Number of the first sample that is drawn from this mix; 0 for the first stage."""
    sources: Blend
    """The datasets, a list of {path, weight}."""


def _in_order(stages: tuple[DataStage, ...]) -> tuple[DataStage, ...]:
    starts = [stage.from_sample for stage in stages]
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
        rule = "must begin with from_sample 0 and ascend; these begin at {starts}"
        raise PydanticCustomError("stages", rule, {"starts": starts})
    return stages


def _path_form(value: Any) -> str | None:
    if isinstance(value, str):
        return "<one>"
    return "<blend>" if isinstance(value, (list, tuple)) else None


DataPath = Annotated[
    Annotated[Text, Tag("<one>")] | Annotated[Blend, Tag("<blend>")],
    Discriminator(
        _path_form,
        custom_error_type="data_path",
        custom_error_message="must be a path or a list of {path, weight}",
    ),
]


class DataConfig(Section):
    """What is read, and how it is divided."""

    path: DataPath | None = Field(default=None, examples=["data/my_dataset"])
    """A prepared dataset's folder, a Megatron prefix, or a list of {path, weight}; null where
    data.stages tells. A path is local, or a URL of an object store."""
    cache_dir: Text | None = None
    """Folder on each machine's own disk where datasets given by URL are copied to, once."""
    stages: Annotated[
        tuple[DataStage, ...], BeforeValidator(to_tuple), AfterValidator(_in_order)
    ] = ()
    """Mixes that follow each other in a run, a list of {from_sample, sources}."""
    split: Split = (0.98, 0.02)
    """Fractions of the documents for training, validation and test (the last two optional)."""
    tokenizer: Text | None = None
    """Tokenizer of a Megatron prefix that has no manifest; otherwise null, or equal to the
    dataset's own."""
    packing: Literal["concat", "best_fit", "one_document"] = "concat"
    """How documents become samples (gpt only): concat cuts the stream into windows, best_fit puts
    whole documents together and pads the rest, one_document pads or truncates each."""
    isolate_documents: bool = False
    """Whether attention and positions stop at document boundaries inside a sample."""
    fim_rate: Share = 0.0
    """Share of the documents in samples whose middle is moved behind the rest (gpt only)."""
    fim_spm_rate: Share = 0.5
    """Share of those that give the suffix before the prefix."""
    validation: NamedPaths = Field(default={})
    """More validation sets, name to path of a prepared dataset; each is evaluated whole."""

    masking: Literal["token", "whole_word", "ngram"] = "token"
    """What is masked as a whole (bert only): a token, a word, or up to three words in a row."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Expected share of the tokens that are to be predicted (bert only)."""
    sentence_objective: Literal["none", "nsp", "sop"] = "none"
    """Second objective (bert only): nsp tells whether the second segment follows the first or is
    from another document, sop whether the two are in order; none: one segment, no second loss."""

    @property
    def resolved_stages(self) -> tuple[DataStage, ...]:
        """The mixes in their order: data.stages, or the one of data.path."""
        if self.path is None:
            return self.stages
        blend = self.path
        if isinstance(blend, str):
            blend = (WeightedPath(path=blend, weight=1.0),)
        return (DataStage(from_sample=0, sources=blend),)

    @property
    def source_paths(self) -> tuple[str, ...]:
        """Every dataset that is trained on, once, in the order of its first stage."""
        found: dict[str, str] = {}
        for stage in self.resolved_stages:
            for source in stage.sources:
                found.setdefault(normpath(source.path), source.path)
        return tuple(found.values())

    @property
    def has_validation(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.validation_names)

    @property
    def validation_names(self) -> tuple[str, ...]:
        """The validation sets; stopping and keeping the best look at the first of them."""
        return (*(("valid",) if len(self.split) > 1 else ()), *self.validation)


class BatchSizeRamp(Section):
    """A global batch size that grows over the first samples of a run."""

    start: Count
    """Samples of the first steps."""
    increment: Count
    """Samples by which a step grows at a time, up to global_batch_size."""
    samples: Count
    """Samples after which global_batch_size is reached."""


class TrainConfig(Section):
    """How much is trained, in which portions, by which loss."""

    global_batch_size: Count = 32
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: Count = 4
    """Samples of one forward-backward pass on one rank."""
    max_steps: Count = 1000
    """Length of the run, in optimizer steps."""
    batch_size_ramp: BatchSizeRamp | None = None
    """Growth of the batch to global_batch_size, {start, increment, samples}; null: none."""
    label_smoothing: Rate = 0.0
    """Share of each target's probability that is spread evenly over the vocabulary."""
    z_loss: NonNegative = 0.0
    """Coefficient of log(Z)^2 of each target, Z the softmax's normaliser; 0: without."""
    ema_decay: Rate | None = None
    """Decay per update of an average of the weights kept beside them; null: none."""


class OptimizerConfig(Section):
    """The update rule."""

    name: Literal["adamw", "sgd", "lion", "lamb", "adafactor", "muon"] = "adamw"
    """Update rule; muon is Muon for the matrices inside layers and AdamW for the rest."""
    lr: Positive = 3e-4
    """Peak learning rate, per optimizer step."""
    layer_lr_decay: Fraction = 1.0
    """Factor of the learning rate from each layer to the one below it, for fine-tuning."""
    betas: Pair = (0.9, 0.95)
    """Decay rates per step of the first and second moment (adamw, lamb, muon), or of lion's
    update and momentum."""
    eps: Positive = 1e-8
    """Added to the root of the second moment (adamw, lamb, muon)."""
    momentum: Rate = 0.9
    """Decay rate per step of the momentum (sgd, muon)."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, times the learning rate, per step."""
    grad_clip: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up; wsd is warm-up, stable, decay."""
    warmup_steps: CountOrZero = 0
    """Length of the linear rise from 0 to optimizer.lr, in steps."""
    min_lr: NonNegative = 0.0
    """Learning rate below which the schedule does not fall."""
    decay_steps: Count | None = None
    """linear, cosine: the step at which min_lr is reached (null: train.max_steps); wsd: length of
    the final decay in steps (null: a tenth of train.max_steps)."""


class PrecisionConfig(Section):
    """The arithmetic."""

    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Type of forward and backward; the optimizer keeps fp32 master weights, in fp64 fp64 ones (for
    proofs: what differs there is no rounding)."""
    loss_scale: NonNegative = 0.0
    """Factor of the loss in fp16; 0: dynamic, halved at overflows and doubled in between."""
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=60)] = 16
    """The dynamic loss scale starts at 2 to this power."""
    loss_scale_window: Count = 1000
    """Steps without overflow after which the dynamic loss scale is doubled."""
    hysteresis: Count = 2
    """Overflows until the dynamic loss scale is halved, counted anew at each doubling."""
    min_loss_scale: Positive = 1.0
    """The dynamic loss scale is never halved below it; an overflow there ends the run."""


class ParallelConfig(Section):
    """How the work is divided; data_parallel_size follows from the world size."""

    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    """Which engine trains; auto takes one that supports the rest of this config."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """What data-parallel ranks share: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights
    too."""
    offload_optimizer: bool = False
    """Whether optimizer state and fp32 weights live in host memory (ZeRO stages 1 to 3)."""
    offload_parameters: bool = False
    """Whether the divided weights live in host memory (ZeRO stage 3)."""
    tensor_parallel_size: Count = 1
    """Ranks that share every matrix of a layer."""
    tensor_parallel_across_machines: bool = False
    """Whether a tensor-parallel group may have ranks on several machines; else it is refused."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also share the activations between matrices."""
    pipeline_parallel_size: Count = 1
    """Ranks that share the layers."""
    virtual_pipeline_stages: Count = 1
    """Chunks of layers that each pipeline rank holds."""
    pipeline_schedule: Literal[
        "1f1b", "gpipe", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"
    ] = "1f1b"
    """Order of the forward and backward passes of a pipeline."""
    layers_per_stage: list[Count] | None = None
    """Layers of each of the pipeline_parallel_size x virtual_pipeline_stages stages, first to last;
    null: as even in FLOPs as whole layers can be."""
    context_parallel_size: Count = 1
    """Ranks that share the tokens of a sample."""
    context_parallel_method: Literal["auto", "ulysses", "ring"] = "auto"
    """How attention sees all tokens: ulysses exchanges them for heads, ring passes keys and values
    round; auto: ulysses where every rank gets a head, else ring."""
    activation_recomputation: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward computes again instead of keeping: nothing, the attention scores, or whole
    layers; auto: nothing, or with activation_memory_mb the least that stays within it."""
    activation_memory_mb: Positive | None = None
    """Most memory of a rank, in MB, for what its layers keep for the backward: layer by layer the
    rest is computed again, on GPUs at last moved to host memory; null: no bound."""
    collective_timeout_s: Count = 600
    """Longest wait of a rank for the others, in seconds; after it the run ends with an error."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def sequence_multiple(self) -> int:
        """Samples are cut into equal parts when their length is a multiple of this."""
        inside = self.tensor_parallel_size if self.sequence_parallel else 1
        chunks = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return lcm(chunks, self.context_parallel_size * inside)


class EvaluationConfig(Section):
    """Validation during training, and stopping by it."""

    interval: CountOrZero = 0
    """Steps between two validations; 0: only at the end of the run."""
    max_samples: Count | None = None
    """Samples of each validation set in one validation; null: all."""
    prompts: Texts = ()
    """Texts (or "", a new document) that the model continues at each validation, into
    samples.jsonl."""
    sample_tokens: Count = 50
    """Length of each continuation, in tokens."""
    early_stop_patience: Count | None = None
    """Validations without improvement after which the run stops; null: never."""
    early_stop_min_delta: NonNegative = 0.0
    """Decrease of the validation loss, in nats per token, that counts as improvement."""
    target_loss: Positive | None = None
    """Validation loss, in nats per token, at which the run stops; null: never."""


class CheckpointConfig(Section):
    """When the state of training is saved, and how much of it is kept."""

    save_interval: CountOrZero = 500
    """Steps between two checkpoints; 0: only at the end of the run."""
    keep_last: Count | None = None
    """Number of newest checkpoints that are kept; null: all."""
    keep_every: Count | None = None
    """Checkpoints of steps that are multiples of this are kept beside the newest ones."""
    save_minutes: Positive | None = None
    """Minutes after the last checkpoint at which another is due, whatever the step."""
    folder: Text | None = None
    """Where checkpoints are kept: a folder, or a URL such as s3://bucket/run; null: checkpoints/
    in run.output_dir."""
    async_save: bool = False
    """Whether writing goes on beside training: a step waits for a copy in host memory only, which
    takes as much memory as the state that this process owns."""
    staging_dir: Text | None = None
    """A folder on the machine's own disk where checkpoints are written first; they are copied to
    where they are kept while training goes on."""
    reuse_files: bool = True
    """Whether a save writes over the files of the checkpoint that keep_last lets go, which is
    faster than new ones: on a file system of this machine alone, where no program has them open.
    Until the next save that one's space stays taken."""
    init_from: Text | None = None
    """A checkpoint folder whose weights a new run starts with, with fresh optimizer state; null:
    random initial weights."""
    init_optimizer: bool = False
    """Whether the optimizer's moments and its count of updates come from init_from, too."""
    keep_best: Text | None = None
    """Score of a validation, such as valid_loss or valid_masked_lm_accuracy, whose best checkpoint
    is saved and kept."""


class LoggingConfig(Section):
    """What is told while training."""

    log_interval: Count = 10
    """Steps between two lines on the console."""
    tensorboard: bool = True
    """Whether metrics are also written for TensorBoard."""


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    """Where the run lives and what makes it repeatable."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The shape of the model."""
    data: DataConfig
    """What is read, and how it is divided."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How much is trained, in which portions."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The update rule."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    """The arithmetic."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How the work is divided among ranks."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """Validation during training, and stopping by it."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """When the state of training is saved."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """What is told while training."""
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig)
    """Faster ways to the same result."""

    @property
    def resolved_decay_steps(self) -> int | None:
        """`schedule.decay_steps` with its default filled in; None where nothing decays by it."""
        if self.schedule.name in ("constant", "inverse_sqrt"):
            return None
        if self.schedule.decay_steps is not None:
            return self.schedule.decay_steps
        if self.schedule.name == "wsd":
            return max(1, round(0.1 * self.train.max_steps))
        return self.train.max_steps

    @property
    def resolved_context_parallel_method(self) -> Literal["ulysses", "ring"]:
        """How attention sees all tokens of a sample that is cut."""
        parallel = self.parallel
        if parallel.context_parallel_method != "auto":
            return parallel.context_parallel_method
        ranks = parallel.tensor_parallel_size * parallel.context_parallel_size
        return "ring" if self.model.num_attention_heads % ranks else "ulysses"

    @property
    def fuses_loss(self) -> bool:
        """Whether head and loss are one."""
        choice = self.performance.fused_loss
        return choice == "always" or (choice == "auto" and self.precision.dtype != "fp16")

    @property
    def derived(self) -> dict[str, object]:
        """What follows from the fields that may be left null, by dotted path."""
        return {
            "model.head_dim": self.model.head_width,
            "model.num_kv_heads": self.model.resolved_num_kv_heads,
            "model.ffn_hidden_size": self.model.resolved_ffn_hidden_size,
            "model.attention_dropout": self.model.resolved_attention_dropout,
            "schedule.decay_steps": self.resolved_decay_steps,
        }


def section_of(field: FieldInfo) -> type[Section] | None:
    """The model of a field that is a section, None for a leaf."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def leaf_fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and pydantic field of every setting of the tree, in the tree's order."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from leaf_fields(section, f"{prefix}{name}.")


def config_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors that complete and check while typing."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(mode="validation"),
    }


def read_path(config: Config, path: str) -> Any:
    """The value at a dotted path of a leaf or a section."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
