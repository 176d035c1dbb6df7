"""Several datasets as one, by a manifest that names their files: nothing is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_prep.datasets.copying import described, save_tokenizer
from data_prep.datasets.opening import (
    check_one_side,
    check_same_kind,
    open_with_manifest,
    replaceable_dataset,
)
from data_prep.outputs import check_output_folder
from data_prep.workplace import new_output
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord
from megascale.data.places import as_path, is_remote, relative_to
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError


def merge(inputs: Sequence[Path], output: Path, overwrite: bool = False) -> DatasetManifest:
    """Write a dataset that holds the shards of `inputs`, in this order.

    The shards stay where they are; the manifest names their folders relative to its own, so that
    all can be moved together. Without them the new dataset cannot be read.

    Raises:
        UserError: an input cannot be opened, two of them are the same or do not fit together, or
            the output is taken.
    """
    check_one_side([*inputs, output])
    manifests = {str(path): _manifest(path) for path in inputs}
    if len(manifests) < 2:
        raise UserError(
            f"{len(manifests)} dataset to merge",
            rule="at least two different ones make a merge",
            remedy="give --input several times",
        )
    check_same_kind(manifests)
    _check_different(manifests)
    check_output_folder(output, MANIFEST_NAME, overwrite)
    first = next(iter(manifests.values()))
    skipped: Counter[str] = Counter()
    for manifest in manifests.values():
        skipped.update(manifest.skipped)
    merged = DatasetManifest(
        mode=first.mode,
        tokenizer=first.tokenizer.model_copy(update={"folder": "tokenizer"}),
        shards=[
            _moved(shard, as_path(path), output)
            for path, manifest in manifests.items()
            for shard in manifest.shards
        ],
        source={"merged": [described(m, as_path(path)) for path, m in manifests.items()]},
        recipe={"step": "merge"},
        skipped=dict(skipped),
    )
    tokenizer = load_tokenizer(inputs[0] / first.tokenizer.folder)
    replaceable = partial(replaceable_dataset, overwrite)
    with new_output(output, MANIFEST_NAME, replaceable) as folder:
        save_tokenizer(tokenizer, folder / "tokenizer")
        merged.save(folder)
    return merged


def _moved(shard: ShardRecord, dataset: Path, output: Path) -> ShardRecord:
    """The record as seen from `output`."""
    folder = relative_to(shard.path(dataset).parent, output)
    return shard.model_copy(update={"folder": folder})


def _manifest(path: Path) -> DatasetManifest:
    """Of a store the manifest and the sizes of its files are read; a local one is opened."""
    return DatasetManifest.load(path) if is_remote(path) else open_with_manifest(path)[1]


def _check_different(manifests: dict[str, DatasetManifest]) -> None:
    seen: dict[str, str] = {}
    for path, manifest in manifests.items():
        if manifest.fingerprint in seen:
            raise UserError(
                f"{path} holds the same tokens as {seen[manifest.fingerprint]}",
                rule="a dataset is merged once",
                remedy="leave one out; to read it more often, give it a weight in data.stages",
            )
        seen[manifest.fingerprint] = path
