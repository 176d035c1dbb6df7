"""What a checkpoint remembers of its data, and whether a run may go on with what it finds.

Two parts: a short one in the manifest (fingerprints, mixes, what decides the order of samples), and
the shards of every dataset in `data.json` beside it, so that a change can be named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megascale.checkpoint.reader import CheckpointReader
from megascale.config.load import dump_config
from megascale.config.schema import Config
from megascale.data.blend import Stage, block_quotas
from megascale.data.corpus import ShardIdentity, TokenCorpus
from megascale.errors import UserError
from megascale.training.datasets import Corpora, stages_of, tokenizer_files

SHARDS_FILE = "data.json"


def data_record(config: Config, corpora: Corpora) -> dict[str, Any]:
    """JSON values of everything that decides which sample has which number, but for the seed."""
    fingerprints = [corpus.fingerprint for corpus in corpora.corpora]
    return {
        "stages": [_stage_record(stage, fingerprints) for stage in stages_of(config)],
        "paths": dict(zip(fingerprints, config.data.source_paths, strict=True)),
        "order": {
            "data.split": list(config.data.split),
            "data.packing": config.data.packing,
            "model.seq_length": config.model.seq_length,
        },
    }


def run_constants(config: Config, corpora: Corpora) -> dict[str, Any]:
    """What every checkpoint of a run says of it, and a resume compares."""
    return {
        "data_fingerprint": corpora.fingerprint,
        "data": data_record(config, corpora),
        "seed": config.run.seed,
    }


def run_attachments(config: Config, corpora: Corpora) -> dict[str, bytes]:
    """The small files that lie in every checkpoint of a run."""
    shards = {c.fingerprint: [asdict(s) for s in c.shard_identities] for c in corpora.corpora}
    return {
        "config.yaml": dump_config(config).encode(),
        SHARDS_FILE: json.dumps(shards, indent=1).encode(),
        **tokenizer_files(corpora.tokenizer),
    }


def require_same_samples(
    reader: CheckpointReader, config: Config, corpora: Corpora, samples_seen: int
) -> None:
    """Refuse to go on where the samples already seen would now be others.

    Stages that begin at or after `samples_seen` may change, and so may their datasets.

    Raises:
        UserError: names the dataset and its shard, the stage, or the setting that differs.
    """
    saved = reader.manifest.state.get("data")
    if saved is None:  # written before there were stages
        _require_fingerprint(reader, corpora)
        return
    now = data_record(config, corpora)
    for name, value in saved["order"].items():
        if now["order"][name] != value:
            raise UserError(
                f"{name} {now['order'][name]}",
                rule=f"checkpoint {reader.storage.root} was trained with {value}; with another "
                "value the samples have other numbers in the middle of a run",
                remedy=f"set {name}={value}, or start a new run.output_dir",
            )
    before, after = (_past(record["stages"], samples_seen) for record in (saved, now))
    for number, (was, now_is) in enumerate(zip(before, after, strict=False)):
        _require_same_datasets(reader, corpora, saved, was, now_is)
        if _mix(was) != _mix(now_is):
            raise _other_mix(reader, number, was, samples_seen)
    if len(before) != len(after):
        number = min(len(before), len(after))
        old = before[number] if number < len(before) else None
        raise _other_mix(reader, number, old, samples_seen)


def _stage_record(stage: Stage, fingerprints: Sequence[str]) -> dict[str, Any]:
    sources = zip(stage.sources, stage.weights, strict=True)
    mix = [[fingerprints[source], weight] for source, weight in sources]
    return {"from_sample": stage.from_sample, "sources": mix}


def _past(stages: list[dict[str, Any]], samples_seen: int) -> list[dict[str, Any]]:
    """The stages that gave samples; before the first sample none did."""
    return [stage for stage in stages if stage["from_sample"] < samples_seen]


def _mix(stage: Mapping[str, Any]) -> tuple[int, list[str], list[int]]:
    names, weights = zip(*stage["sources"], strict=True)
    return stage["from_sample"], list(names), block_quotas(weights).tolist()


def _require_fingerprint(reader: CheckpointReader, corpora: Corpora) -> None:
    expected = reader.manifest.state.get("data_fingerprint")
    if expected != corpora.fingerprint:
        raise UserError(
            f"data.path has the fingerprint {corpora.fingerprint}",
            rule=f"checkpoint {reader.storage.root} was trained on {expected}",
            remedy="give the dataset that the run began with, or start a new run.output_dir",
        )


def _require_same_datasets(
    reader: CheckpointReader,
    corpora: Corpora,
    saved: Mapping[str, Any],
    old: Mapping[str, Any],
    new: Mapping[str, Any],
) -> None:
    """The datasets of one stage, place by place."""
    by_fingerprint = {corpus.fingerprint: corpus for corpus in corpora.corpora}
    expected = [fingerprint for fingerprint, _ in old["sources"]]
    found = [fingerprint for fingerprint, _ in new["sources"]]
    if len(expected) != len(found) or set(expected) == set(found):
        return  # another mix, or the same datasets
    for was, now in zip(expected, found, strict=True):
        if was != now and was not in found:
            corpus = by_fingerprint[now]
            if corpus.was_prefix(was):
                raise _has_a_manifest_now(corpus, reader, saved["paths"].get(was))
            shards = json.loads(reader.attachment(SHARDS_FILE)).get(was, [])
            identities = [ShardIdentity(**shard) for shard in shards]
            raise UserError(
                f"{corpus.path} has the fingerprint {now}: "
                f"{describe_change(identities, corpus.shard_identities)}",
                rule=f"checkpoint {reader.storage.root} was trained on {was} "
                f"({saved['paths'].get(was)})",
                remedy="give the dataset that the run began with, or start a new run.output_dir",
            )


def _has_a_manifest_now(
    corpus: TokenCorpus, reader: CheckpointReader, prefix: str | None
) -> UserError:
    return UserError(
        f"{corpus.path} holds the same tokens as {prefix}, and has a manifest",
        rule=f"checkpoint {reader.storage.root} read the files without one, by another "
        "fingerprint, and samples are drawn by it",
        remedy=f"give the prefix again ({prefix}), with data.tokenizer where it is needed",
    )


def describe_change(old: Sequence[ShardIdentity], new: Sequence[ShardIdentity]) -> str:
    """The first shard that differs, and in what."""
    for was, now in zip(old, new, strict=False):
        if was == now:
            continue
        changes = []
        if was.prefix != now.prefix:
            changes.append(f"was {was.prefix}")
        for name, unit in (("documents", "documents"), ("tokens", "tokens"), ("bytes", "bytes")):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                changes.append(f"{after:,} {unit} instead of {before:,}")
        if was.content != now.content:
            changes.append("the content of its .bin is another")
        if was.index != now.index:
            changes.append("the content of its .idx is another")
        return f"shard {now.prefix}: {', '.join(changes)}"
    if len(old) > len(new):
        return f"shard {old[len(new)].prefix} is gone"
    if len(new) > len(old):
        return f"shard {new[len(old)].prefix} was not there"
    return "the shards are the same, the tokenizer is another"


def _other_mix(
    reader: CheckpointReader, number: int, old: Mapping[str, Any] | None, samples_seen: int
) -> UserError:
    was = "not there" if old is None else json.dumps(dict(old))
    return UserError(
        f"stage {number} of the data is not that of the checkpoint, which was: {was}",
        rule=f"{samples_seen:,} samples of checkpoint {reader.storage.root} are read; what they "
        "were drawn from stays as it was",
        remedy="give the mixes of the checkpoint's config.yaml, and change the mix by a stage of "
        f"data.stages with from_sample >= {samples_seen}",
    )
