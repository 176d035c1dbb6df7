"""What a dataset holds, in a few lines or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.datasets.opening import open_corpus
from megascale.errors import UserError


def inspect_dataset(path: Path) -> dict[str, Any]:
    """Sizes, tokenizer, source and shards of a dataset or a Megatron prefix.

    Raises:
        UserError: it cannot be opened.
    """
    corpus = open_corpus(path)
    shards = [
        {
            "prefix": shard.prefix,
            "documents": shard.num_documents,
            "sequences": len(shard.sequence_lengths),
            "tokens": shard.num_tokens,
            "dtype": shard.dtype.name,
        }
        for shard in corpus.token_files
    ]
    found: dict[str, Any] = {
        "path": str(path),
        "fingerprint": corpus.fingerprint,
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "tokens_per_document": round(corpus.num_tokens / max(corpus.num_documents, 1), 2),
        "shards": shards,
    }
    if corpus.manifest is not None:
        manifest = corpus.manifest
        found |= {
            "mode": manifest.mode,
            "version": manifest.version,
            "utf8_bytes": corpus.utf8_bytes,
            "bytes_per_token": round((corpus.utf8_bytes or 0) / max(corpus.num_tokens, 1), 4),
            "tokenizer": manifest.tokenizer.model_dump(),
            "source": manifest.source,
            "recipe": manifest.recipe,
            "skipped": manifest.skipped,
        }
    return found


def document_text(path: Path, number: int) -> str:
    """The text of one document, or its ids where the tokenizer is not known.

    Raises:
        UserError: there is no such document.
    """
    corpus = open_corpus(path)
    if not 0 <= number < corpus.num_documents:
        raise UserError(
            f"--document {number} of {path}",
            rule=f"it holds the documents 0 to {corpus.num_documents - 1}",
            remedy="give one of them",
        )
    starts = corpus.document_starts
    stop = int(starts[number + 1]) if number + 1 < len(starts) else corpus.num_tokens
    ids = corpus.read(int(starts[number]), stop - int(starts[number])).tolist()
    return str(ids) if corpus.tokenizer is None else corpus.tokenizer.decode(ids)
