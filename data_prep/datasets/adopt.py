"""A manifest for `.bin/.idx` pairs that Megatron-LM, or another program, wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_prep.datasets.copying import save_tokenizer, text_bytes_of
from data_prep.datasets.opening import check_one_side, replaceable_dataset
from data_prep.datasets.token_checks import shard_problems
from data_prep.local_copies import local_pair
from data_prep.outputs import check_output_folder
from data_prep.workplace import new_output
from megascale.data.atomic_files import file_checksum
from megascale.data.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    ShardRecord,
    TokenizerRecord,
)
from megascale.data.places import relative_to
from megascale.data.token_file import TokenFile
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError


def adopt(
    prefixes: Sequence[Path],
    tokenizer_path: Path,
    output: Path,
    bert: bool = False,
    overwrite: bool = False,
) -> DatasetManifest:
    """Write a dataset whose shards are the given files, where they are.

    Args:
        prefixes: paths without `.bin`, in the order of the shards.
        tokenizer_path: the tokenizer that made the ids.
        output: the folder to make; holds manifest and tokenizer only.
        bert: a sequence is a sentence and no end-of-document id is stored.

    Raises:
        UserError: a file is damaged, or holds what this tokenizer cannot have made.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    record = TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=None if bert else tokenizer.eod_id,
        special_ids=tokenizer.require_bert_tokens().ids if bert else {},
    )
    check_one_side([*prefixes, output])
    check_output_folder(output, MANIFEST_NAME, overwrite)
    shards = []
    for prefix in prefixes:
        if prefix.suffix in (".bin", ".idx"):
            prefix = prefix.with_suffix("")
        with local_pair(prefix) as near:
            shards.append(_shard(prefix, near, record, tokenizer, output))
    manifest = DatasetManifest(
        mode="bert" if bert else "gpt",
        tokenizer=record,
        shards=shards,
        source={"adopted": [str(prefix) for prefix in prefixes]},
        recipe={"step": "adopt"},
    )
    replaceable = partial(replaceable_dataset, overwrite)
    with new_output(output, MANIFEST_NAME, replaceable) as folder:
        save_tokenizer(tokenizer, folder / record.folder)
        manifest.save(folder)
    return manifest


def _shard(
    prefix: Path, near: Path, record: TokenizerRecord, tokenizer: Tokenizer, output: Path
) -> ShardRecord:
    """The record of the pair at `prefix`, of which `near` is the local copy or itself."""
    shard = TokenFile(near)
    shard.check_index()
    problems = shard_problems(shard, record)
    if problems:
        raise UserError(
            f"{shard.bin_path}: {'; '.join(problems)}",
            rule="the ids must be those of the tokenizer that is given with them",
            remedy="give the tokenizer that made them (--bert for files of sentences)",
        )
    return ShardRecord(
        prefix=prefix.name,
        folder=relative_to(prefix.parent, output),
        bin_bytes=shard.bin_path.stat().st_size,
        idx_bytes=shard.idx_path.stat().st_size,
        bin_xxh3=file_checksum(shard.bin_path),
        idx_xxh3=file_checksum(shard.idx_path),
        documents=shard.num_documents,
        tokens=shard.num_tokens,
        utf8_bytes=text_bytes_of(shard.tokens, tokenizer.byte_lengths()),
    )
