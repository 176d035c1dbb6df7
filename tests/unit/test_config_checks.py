"""Every rule of the table that joins settings: cases that break it, and neighbours that keep it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megascale.config.checks import DEFAULT_CHECKS, Check, divisors_near, neighbours
from megascale.config.load import load_config
from megascale.config.problems import ConfigError, Problem
from megascale.config.schema import Config, leaf_fields


@dataclass(frozen=True)
class Case:
    """Overrides that break a rule at `path`, and overrides that keep it."""

    bad: str
    path: str
    good: str
    words: str = ""
    world_size: int | None = None


ROPE = "model.position_embedding=rope "
LINEAR = ROPE + "model.rope_scaling=linear model.rope_scaling_factor=2 "
LLAMA3 = ROPE + "model.rope_scaling=llama3 model.rope_scaling_factor=8 "
HEADS = "model.hidden_size=96 model.num_attention_heads="
SGD = "optimizer.name=sgd "
FP16 = "precision.dtype=fp16 "
RAMP = 'train.batch_size_ramp={{"start":{},"increment":{},"samples":90}}'.format
NO_VALID = "data.split=[1.0] "
BATCH = "train.global_batch_size={} train.micro_batch_size={}".format

STAGES = 'data.stages=[{"from_sample":0,"sources":[{"path":"s","weight":1}]}]'

CASES: dict[str, list[Case]] = {
    "heads_divide_hidden_size": [
        Case(HEADS + "9", "model.hidden_size", HEADS + "8", "num_attention_heads = 8"),
        Case("model.hidden_size=100", "model.hidden_size", "model.hidden_size=96", "96 or 108"),
        Case(
            "model.hidden_size=100", "model.hidden_size", "model.hidden_size=100 model.head_dim=8"
        ),
    ],
    "kv_heads_divide_heads": [
        Case("model.num_kv_heads=5", "model.num_kv_heads", "model.num_kv_heads=4", "4 or 6"),
        Case("model.num_kv_heads=24", "model.num_kv_heads", "model.num_kv_heads=12"),
    ],
    "rope_needs_even_width": [
        Case(
            "model.position_embedding=rope model.hidden_size=36",
            "model.position_embedding",
            "model.position_embedding=rope model.hidden_size=48",
            "36 / 12 = 3",
        ),
        Case(
            "model.position_embedding=rope model.hidden_size=36",
            "model.position_embedding",
            "model.hidden_size=36",
            "model.hidden_size = 24 or 48",
        ),
        Case(
            ROPE + "model.head_dim=5",
            "model.position_embedding",
            ROPE + "model.head_dim=6",
            "model.head_dim = 4 or 6",
        ),
        Case(
            ROPE + "model.rotary_fraction=0.33",
            "model.rotary_fraction",
            ROPE + "model.rotary_fraction=0.34375",
            "0.33 * 64 gives 21 model.rotary_fraction = 0.34375",
        ),
        Case(
            ROPE + "model.rotary_fraction=0.01",
            "model.rotary_fraction",
            ROPE + "model.rotary_fraction=0.03125",
            "0.03125",
        ),
    ],
    "stretching_needs_factor": [
        Case(
            ROPE + "model.rope_scaling=linear",
            "model.rope_scaling_factor",
            LINEAR,
            "must be > 1: model.rope_scaling = linear",
        ),
    ],
    "llama3_needs_a_passage": [
        Case(
            LLAMA3 + "model.rope_low_freq_factor=4",
            "model.rope_high_freq_factor",
            LLAMA3 + "model.rope_low_freq_factor=4 model.rope_high_freq_factor=16",
            "for example 16.0",
        ),
    ],
    "local_theta_needs_windows": [
        Case(
            ROPE + "model.rope_local_theta=500",
            "model.rope_local_theta",
            ROPE + "model.rope_local_theta=500 model.sliding_window=8",
            "sliding_window is None",
        ),
        Case(
            "model.rope_local_theta=500 model.sliding_window=8",
            "model.rope_local_theta",
            "model.sliding_window=8",
            "position_embedding is learned",
        ),
    ],
    "ignored:model.rotary_fraction": [
        Case("model.rotary_fraction=0.25", "model.rotary_fraction", ROPE),
    ],
    "ignored:model.rope_scaling": [
        Case("model.rope_scaling=linear model.rope_scaling_factor=2", "model.rope_scaling", LINEAR),
    ],
    "ignored:model.rope_scaling_factor": [
        Case(ROPE + "model.rope_scaling_factor=2", "model.rope_scaling_factor", LINEAR),
    ],
    **{
        f"ignored:model.{name}": [
            Case(LINEAR + f"model.{name}=2", f"model.{name}", LLAMA3 + f"model.{name}=2", "llama3"),
        ]
        for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
    },
    "ignored:model.norm_unit_offset": [
        Case(
            "model.norm_unit_offset=true",
            "model.norm_unit_offset",
            "model.norm_unit_offset=true model.norm=rmsnorm",
        ),
    ],
    "ignored:model.global_layer_interval": [
        Case(
            "model.global_layer_interval=2",
            "model.global_layer_interval",
            "model.global_layer_interval=2 model.sliding_window=8",
        ),
    ],
    "min_lr_below_lr": [
        Case("schedule.min_lr=4e-4", "schedule.min_lr", "schedule.min_lr=3e-4", "0.0003"),
    ],
    "warmup_inside_run": [
        Case("schedule.warmup_steps=1001", "schedule.warmup_steps", "schedule.warmup_steps=1000"),
    ],
    "decay_after_warmup": [
        Case(
            f"schedule.name={name} schedule.warmup_steps=20 schedule.decay_steps=19",
            "schedule.decay_steps",
            f"schedule.name={name} schedule.warmup_steps=20 schedule.decay_steps=20",
            "warmup_steps = 20",
        )
        for name in ("linear", "cosine")
    ],
    "wsd_fits_run": [
        Case(
            "schedule.name=wsd schedule.warmup_steps=100 schedule.decay_steps=901",
            "schedule.decay_steps",
            "schedule.name=wsd schedule.warmup_steps=100 schedule.decay_steps=900",
            "100 + 901",
        ),
        Case(
            "schedule.name=wsd schedule.warmup_steps=1000",
            "schedule.decay_steps",
            "schedule.name=wsd schedule.warmup_steps=900",
            "1000 + 100",
        ),
    ],
    "inverse_sqrt_needs_warmup": [
        Case(
            "schedule.name=inverse_sqrt",
            "schedule.warmup_steps",
            "schedule.name=inverse_sqrt schedule.warmup_steps=1",
        ),
    ],
    "micro_batch_divides_global": [
        Case(BATCH(30, 4), "train.global_batch_size", BATCH(32, 4), "28 or 32"),
        Case(BATCH(30, 4), "train.global_batch_size", BATCH(30, 5), "micro_batch_size = 3 or 5"),
        Case(BATCH(2, 4), "train.global_batch_size", BATCH(4, 4), "global_batch_size = 4,"),
    ],
    "world_size_fits_layout": [
        Case("", "world_size", "", "positive integer", world_size=0),
    ],
    "batch_fits_world_size": [
        Case(BATCH(32, 4), "train.global_batch_size", BATCH(36, 4), "24 or 36", world_size=3),
        Case(BATCH(24, 4), "train.global_batch_size", BATCH(24, 6), "3 or 6", world_size=4),
        Case(BATCH(24, 4), "train.global_batch_size", BATCH(32, 4), "24 = 4 * 4 * 1.5", 4),
        Case(BATCH(24, 4), "train.global_batch_size", BATCH(32, 4), "start 3 or 6 ranks", 4),
    ],
    "validation_needs_split": [
        Case(
            NO_VALID + "evaluation.interval=5",
            "evaluation.interval",
            "evaluation.interval=5",
            "[1.0]",
        ),
        Case(NO_VALID + "evaluation.max_samples=5", "evaluation.max_samples", NO_VALID),
        Case(
            NO_VALID + "evaluation.interval=5",
            "evaluation.interval",
            NO_VALID + 'evaluation.interval=5 data.validation={"books":"b"}',
            "no data.validation",
        ),
        Case(
            NO_VALID + "evaluation.interval=5",
            "evaluation.interval",
            NO_VALID + "evaluation.interval=5 evaluation.prompts=[a]",
        ),
    ],
    "stopping_needs_interval": [
        Case(
            f"evaluation.{name}=2",
            f"evaluation.{name}",
            f"evaluation.{name}=2 evaluation.interval=5",
        )
        for name in ("early_stop_patience", "target_loss")
    ],
    "ignored:model.rope_theta": [
        Case(
            "model.rope_theta=5e5",
            "model.rope_theta",
            "model.rope_theta=5e5 model.position_embedding=rope",
            "positions are rotary",
        ),
        Case("model.rope_theta=5e5", "model.rope_theta", "model.rope_theta=1e4"),
    ],
    **{
        f"ignored:parallel.{name}": [
            Case(
                f"parallel.{name}={value}",
                f"parallel.{name}",
                f"parallel.{name}={value} parallel.pipeline_parallel_size=2",
                "several ranks share the layers",
            )
        ]
        for name, value in (
            ("virtual_pipeline_stages", "2"),
            ("pipeline_schedule", "gpipe"),
            ("layers_per_stage", "[6,6]"),
        )
    },
    "ignored:optimizer.momentum": [
        Case("optimizer.momentum=0", "optimizer.momentum", SGD + "optimizer.momentum=0"),
    ],
    "ignored:optimizer.betas": [
        Case(SGD + "optimizer.betas=[0.8,0.9]", "optimizer.betas", "optimizer.betas=[0.8,0.9]"),
        Case(
            "optimizer.name=adafactor optimizer.betas=[0.8,0.9]",
            "optimizer.betas",
            "optimizer.name=lion optimizer.betas=[0.8,0.9]",
        ),
    ],
    "ignored:performance.fused_optimizer": [
        Case(
            "optimizer.name=lion performance.fused_optimizer=never",
            "performance.fused_optimizer",
            SGD + "performance.fused_optimizer=never",
        ),
    ],
    "ignored:optimizer.eps": [
        Case(SGD + "optimizer.eps=1e-3", "optimizer.eps", "optimizer.eps=1e-3"),
        Case(
            "optimizer.name=lion optimizer.eps=1e-3",
            "optimizer.eps",
            "optimizer.name=lamb optimizer.eps=1e-3",
        ),
    ],
    "loss_scale_needs_fp16": [
        Case("precision.loss_scale=8", "precision.loss_scale", FP16 + "precision.loss_scale=8"),
        Case(
            "precision.dtype=bf16 precision.hysteresis=3",
            "precision.hysteresis",
            FP16 + "precision.hysteresis=3",
            "only in fp16; precision.dtype is bf16",
        ),
    ],
    "static_loss_scale_stands_alone": [
        Case(
            FP16 + "precision.loss_scale=8 precision.loss_scale_window=9",
            "precision.loss_scale_window",
            FP16 + "precision.loss_scale_window=9",
            "is 0, not 8",
        ),
    ],
    "loss_scale_starts_in_bounds": [
        Case(
            FP16 + "precision.initial_loss_scale_power=2 precision.min_loss_scale=5",
            "precision.min_loss_scale",
            FP16 + "precision.initial_loss_scale_power=2 precision.min_loss_scale=4",
            "= 4",
        ),
    ],
    "ramp_reaches_batch": [
        Case(RAMP(32, 4), "train.batch_size_ramp", RAMP(28, 4), "global_batch_size = 32"),
        Case(RAMP(8, 16), "train.batch_size_ramp", RAMP(8, 12), "32 - 8 = 24"),
    ],
    "ramp_fits_micro_batch": [
        Case(RAMP(4, 14), "train.batch_size_ramp", RAMP(4, 28), "increment: 16"),
        Case(RAMP(8, 12), "train.batch_size_ramp", RAMP(8, 24), "4 * 2 = 8", world_size=2),
    ],
    "prompts_need_gpt": [
        Case(
            "model.family=bert evaluation.prompts=[a]",
            "evaluation.prompts",
            "evaluation.prompts=[a]",
            "bert model does not continue",
        ),
    ],
    "best_is_a_metric": [
        Case(
            "checkpoint.keep_best=loss evaluation.interval=5",
            "checkpoint.keep_best",
            "checkpoint.keep_best=valid_loss evaluation.interval=5",
            "one of valid_loss",
        ),
        Case(
            NO_VALID + "checkpoint.keep_best=valid_loss",
            "checkpoint.keep_best",
            "",
            "data.split a second part",
        ),
        Case(
            "checkpoint.keep_best=books_loss evaluation.interval=5",
            "checkpoint.keep_best",
            'checkpoint.keep_best=books_loss evaluation.interval=5 data.validation={"books":"b"}',
        ),
        Case("checkpoint.keep_best=valid_loss", "checkpoint.keep_best", "", "interval is 0"),
        Case(
            "checkpoint.keep_best=valid_masked_lm_accuracy evaluation.interval=5",
            "checkpoint.keep_best",
            "checkpoint.keep_best=valid_masked_lm_accuracy evaluation.interval=5 model.family=bert",
            "one of valid_loss, valid_perplexity",
        ),
        Case(
            "checkpoint.keep_best=valid_nsp_accuracy evaluation.interval=5 model.family=bert",
            "checkpoint.keep_best",
            "checkpoint.keep_best=valid_nsp_accuracy evaluation.interval=5 model.family=bert "
            "data.sentence_objective=nsp",
            "valid_masked_lm_accuracy",
        ),
    ],
    "ignored:evaluation.sample_tokens": [
        Case(
            "evaluation.sample_tokens=9",
            "evaluation.sample_tokens",
            'evaluation.sample_tokens=9 evaluation.prompts=[""]',
        ),
    ],
    "ignored:schedule.decay_steps": [
        Case(
            f"schedule.name={name} schedule.warmup_steps=5 schedule.decay_steps=50",
            "schedule.decay_steps",
            "schedule.name=linear schedule.warmup_steps=5 schedule.decay_steps=50",
        )
        for name in ("constant", "inverse_sqrt")
    ],
    "ignored:schedule.min_lr": [
        Case(
            "schedule.name=constant schedule.min_lr=1e-5",
            "schedule.min_lr",
            "schedule.name=inverse_sqrt schedule.warmup_steps=5 schedule.min_lr=1e-5",
        ),
    ],
    "ignored:evaluation.early_stop_min_delta": [
        Case(
            "evaluation.early_stop_min_delta=0.1",
            "evaluation.early_stop_min_delta",
            "evaluation.early_stop_min_delta=0.1 evaluation.early_stop_patience=2 "
            "evaluation.interval=5",
        ),
    ],
    "ignored:parallel.sequence_parallel": [
        Case(
            "parallel.sequence_parallel=true",
            "parallel.sequence_parallel",
            "parallel.sequence_parallel=true parallel.tensor_parallel_size=2",
        ),
    ],
    "ignored:parallel.tensor_parallel_across_machines": [
        Case(
            "parallel.tensor_parallel_across_machines=true",
            "parallel.tensor_parallel_across_machines",
            "parallel.tensor_parallel_across_machines=true parallel.tensor_parallel_size=2",
        ),
    ],
    "ignored:parallel.activation_memory_mb": [
        Case(
            f"parallel.activation_memory_mb=100 parallel.activation_recomputation={mode}",
            "parallel.activation_memory_mb",
            "parallel.activation_memory_mb=100",
            "auto",
        )
        for mode in ("none", "selective", "full")
    ],
    "ignored:parallel.context_parallel_method": [
        Case(
            "parallel.context_parallel_method=ring",
            "parallel.context_parallel_method",
            "parallel.context_parallel_method=ring parallel.context_parallel_size=2",
        ),
    ],
    "ignored:checkpoint.keep_every": [
        Case(
            "checkpoint.keep_every=1000",
            "checkpoint.keep_every",
            "checkpoint.keep_every=1000 checkpoint.keep_last=2",
        ),
    ],
    "ignored:checkpoint.init_optimizer": [
        Case(
            "checkpoint.init_optimizer=true",
            "checkpoint.init_optimizer",
            "checkpoint.init_optimizer=true checkpoint.init_from=a",
        ),
    ],
    "something_is_pruned": [
        Case(
            "checkpoint.keep_last=2 checkpoint.save_interval=0",
            "checkpoint.keep_last",
            "checkpoint.keep_last=2",
        ),
        Case(
            "checkpoint.keep_last=2 checkpoint.save_interval=0",
            "checkpoint.keep_last",
            "checkpoint.keep_last=2 checkpoint.save_interval=0 checkpoint.save_minutes=5.0",
            "save_minutes",
        ),
        Case(
            "checkpoint.keep_last=2 checkpoint.save_interval=0 evaluation.interval=5",
            "checkpoint.keep_last",
            "checkpoint.keep_last=2 checkpoint.save_interval=0 evaluation.interval=5 "
            "checkpoint.keep_best=valid_loss",
        ),
    ],
    "ignored:model.num_token_types": [
        Case(
            "model.num_token_types=3",
            "model.num_token_types",
            "model.num_token_types=3 model.family=bert",
            "is a bert",
        ),
    ],
    "ignored:data.masking": [
        Case(
            "data.masking=ngram",
            "data.masking",
            "data.masking=ngram model.family=bert",
            "is a bert",
        ),
    ],
    "ignored:data.mask_probability": [
        Case(
            "data.mask_probability=0.2",
            "data.mask_probability",
            "data.mask_probability=0.2 model.family=bert",
            "is a bert",
        ),
    ],
    "ignored:data.sentence_objective": [
        Case(
            "data.sentence_objective=sop",
            "data.sentence_objective",
            "data.sentence_objective=sop model.family=bert",
            "is a bert",
        ),
    ],
    **{
        f"only_gpt:{path}": [
            Case(
                f"model.family=bert {path}={value} {beside}",
                path,
                f"model.family=gpt {path}={value} {beside}",
                "gpt only",
            )
        ]
        for path, value, beside in (
            ("model.num_kv_heads", "6", ""),
            ("model.position_embedding", "rope", ""),
            ("model.norm", "rmsnorm", ""),
            ("model.bias", "false", ""),
            ("model.tie_word_embeddings", "false", ""),
            ("model.head_dim", "32", ""),
            ("model.norm_placement", "sandwich", ""),
            ("model.parallel_residual", "true", ""),
            ("model.qkv_bias", "false", ""),
            ("model.attention_output_bias", "false", ""),
            ("model.mlp_bias", "false", ""),
            ("model.qk_norm", "true", ""),
            ("model.query_scaling", "9.0", ""),
            ("model.attention_softcap", "9.0", ""),
            ("model.logit_softcap", "9.0", ""),
            ("model.sliding_window", "9", ""),
            ("model.scale_embeddings", "true", ""),
            ("data.isolate_documents", "true", ""),
            ("data.packing", "best_fit", ""),
            ("data.fim_rate", "0.5", ""),
        )
    },
    "bert_has_no_gate": [
        Case(
            "model.family=bert model.activation=swiglu",
            "model.activation",
            "model.family=bert model.activation=gelu",
        ),
    ],
    "pairs_need_token_types": [
        Case(
            "model.family=bert model.num_token_types=1 data.sentence_objective=nsp",
            "model.num_token_types",
            "model.family=bert model.num_token_types=1 data.sentence_objective=none",
            "two segments",
        ),
    ],
    "data_is_given": [
        Case("data.path=null", "data.path", "data.path=null " + STAGES, "must be given"),
        Case(STAGES, "data.path", "data.path=d", "make it the first stage"),
    ],
    "remote_data_is_copied": [
        Case(
            "data.path=s3://b/web",
            "data.cache_dir",
            "data.path=s3://b/web data.cache_dir=/scratch",
            "copied to each machine",
        ),
        Case('data.validation={"v":"gs://b/v"}', "data.cache_dir", "data.path=file:///d", "gs://b"),
    ],
    "isolation_needs_company": [
        Case(
            "data.isolate_documents=true data.packing=one_document",
            "data.isolate_documents",
            "data.isolate_documents=true data.packing=best_fit",
            "several documents",
        ),
    ],
    "ignored:data.fim_spm_rate": [
        Case("data.fim_spm_rate=1", "data.fim_spm_rate", "data.fim_spm_rate=1 data.fim_rate=0.1"),
    ],
}


def found_by(
    overrides: str, world_size: int | None, checks: tuple[Check, ...] = DEFAULT_CHECKS
) -> tuple[Problem, ...]:
    try:
        load_config(
            {"data": {"path": "d"}}, overrides.split(), checks=checks, world_size=world_size
        )
    except ConfigError as error:
        return error.problems
    return ()


def test_every_check_has_a_case_and_every_case_a_check() -> None:
    names = [check.name for check in DEFAULT_CHECKS]
    assert len(names) == len(set(names))
    assert set(names) == set(CASES)
    assert all(CASES.values())


def test_every_check_reads_settings_that_exist() -> None:
    leaves = {path for path, _ in leaf_fields()}
    for check in DEFAULT_CHECKS:
        assert check.reads, check.name
        assert set(check.reads) <= leaves, check.name


@pytest.mark.parametrize(
    ("name", "case"), [(n, case) for n, cases in CASES.items() for case in cases]
)
def test_rule(name: str, case: Case) -> None:
    """The case breaks this one rule and, among all rules, only this one; its neighbour none."""
    check = next(check for check in DEFAULT_CHECKS if check.name == name)
    for checks in ((check,), DEFAULT_CHECKS):
        found = found_by(case.bad, case.world_size, checks)
        (problem,) = found
        assert problem.path == case.path
        assert case.words in f"{problem.rule} {problem.hint}"
        assert problem.hint
    good_size = 1 if case.world_size == 0 else case.world_size
    assert found_by(case.good, good_size) == ()


@pytest.mark.parametrize("check", DEFAULT_CHECKS, ids=lambda check: check.name)
def test_a_check_reads_no_more_than_it_declares(check: Check) -> None:
    """Otherwise it could speak about the default that stands in for an invalid value."""
    leaves = {path for path, _ in leaf_fields()}
    seen: set[str] = set()

    class Spy:
        def __init__(self, value: object, prefix: str) -> None:
            self._value, self._prefix = value, prefix

        def __getattr__(self, name: str) -> object:
            value, path = getattr(self._value, name), self._prefix + name
            if path in leaves:
                seen.add(path)
                return value
            if path in Config.model_fields:
                return Spy(value, path + ".")
            # a property: run it on the spy, so that what it reads is seen
            return type(self._value).__dict__[name].fget(self)

    for case in CASES[check.name]:
        tree = {"data": {"path": "d"}}
        config = load_config(tree, case.bad.split(), checks=())
        assert list(check.run(Spy(config, ""), case.world_size))  # type: ignore[arg-type]
    assert seen <= set(check.reads)


def test_world_size_beside_a_layout() -> None:
    """The arithmetic of ranks, on its checks alone."""
    by_name = {check.name: check for check in DEFAULT_CHECKS}
    fits, batch = by_name["world_size_fits_layout"], by_name["batch_fits_world_size"]
    layout = "parallel.tensor_parallel_size=2 parallel.pipeline_parallel_size=2 "
    (problem,) = found_by(layout, 6, (fits, batch))
    assert "6 / 4" in problem.rule
    assert problem.hint == "start 4 or 8 ranks"
    assert found_by(layout, 8, (fits, batch)) == ()
    (problem,) = found_by(layout + BATCH(36, 4), 8, (fits, batch))
    assert "36 = 4 * 2 * 4.5" in problem.rule
    assert "global_batch_size = 32 or 40" in problem.hint
    assert "micro_batch_size = 3 or 6" in problem.hint
    # 36 / 4 = 9 micro-batches divide over 1 or 3 copies of 4 ranks
    assert "start 4 or 12 ranks" in problem.hint


def test_every_suggested_batch_works() -> None:
    for ranks in range(1, 9):
        for total in range(1, 40):
            for problem in found_by(BATCH(total, 3), ranks):
                for part in problem.hint.split(", or "):
                    name, _, numbers = part.partition(" = ")
                    if "ranks" in part:
                        sizes = [int(word) for word in part.split() if word.isdigit()]
                        assert all(found_by(BATCH(total, 3), size) == () for size in sizes)
                        continue
                    for number in numbers.split(" or "):
                        fixed = f"{BATCH(total, 3)} {name}={number}"
                        assert found_by(fixed, ranks) == (), fixed


def test_neighbours_and_divisors() -> None:
    assert neighbours(30, 4) == [28, 32]
    assert neighbours(3, 4) == [4]
    assert neighbours(8, 4) == [8]
    assert divisors_near(96, 9) == [8, 12]
    assert divisors_near(96, 8) == [8]
    assert divisors_near(7, 3) == [1, 7]
    assert divisors_near(1, 5) == [1]


def test_extra_checks_run_beside_the_table() -> None:
    extra = Check(
        reads=("run.seed",),
        run=lambda config, world_size: [Problem("run.seed", config.run.seed, f"on {world_size}")],
    )
    found = found_by("model.num_kv_heads=5", 2, (*DEFAULT_CHECKS, extra))
    assert [problem.rule for problem in found][-1] == "on 2"
    assert len(found) == 2
    assert {p.path for p in found_by("run.seed=x", 2, (extra,))} == {"run.seed"}
