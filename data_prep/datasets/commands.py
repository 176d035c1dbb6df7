"""The commands on prepared datasets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.worker_pool import available_cpus
from megascale.data.places import as_path, is_remote
from megascale.errors import UserError

if TYPE_CHECKING:
    from data_prep.datasets.split import Part
    from megascale.data.manifest import DatasetManifest

Dataset = Annotated[
    Path, typer.Argument(parser=as_path, metavar="PATH", help="A prepared dataset's folder.")
]
Output = Annotated[
    Path, typer.Option("--output", parser=as_path, metavar="PATH", help="Folder to make.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes; one a processor if not given.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


def merge_command(
    inputs: Annotated[
        list[Path],
        typer.Option("--input", parser=as_path, metavar="PATH", help="A dataset; two or more."),
    ],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Make one dataset of several, by a manifest that names their files: nothing is copied."""
    from data_prep.datasets.merge import merge

    _print_made(output, merge(inputs, output, overwrite))


def split_command(
    dataset: Dataset,
    output: Output,
    fractions: Annotated[
        list[float] | None, typer.Option("--fraction", help="Share of tokens of a part.")
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option("--documents", help="Documents of a part, or rest."),
    ] = None,
    shards: Annotated[
        int | None, typer.Option("--shards", help="One dataset with so many shards instead.")
    ] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Cut a dataset into OUTPUT/train, OUTPUT/validation (and test), or into other shards.

    Give --fraction, or --documents, once a part, or --shards.
    """
    from data_prep.datasets.split import write_parts

    parts = _parts(dataset, fractions, documents, shards)
    made = write_parts(dataset, output, parts, workers or available_cpus(), overwrite)
    if made is None:
        print(f"already done: {output} holds these parts")
    for name, manifest in (made or {}).items():
        _print_made(output / name, manifest)


def adopt_command(
    prefixes: Annotated[
        list[Path],
        typer.Option(
            "--input",
            parser=as_path,
            metavar="PATH",
            help="Prefix of a .bin/.idx pair; one or more.",
        ),
    ],
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", parser=as_path, metavar="PATH", help="What made the ids.")
    ],
    output: Output,
    bert: Annotated[bool, typer.Option("--bert", help="A sequence is a sentence.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a manifest for Megatron's .bin/.idx files, which stay where they are."""
    from data_prep.datasets.adopt import adopt

    _print_made(output, adopt(prefixes, tokenizer, output, bert, overwrite))


def inspect_command(
    dataset: Annotated[
        Path,
        typer.Argument(
            parser=as_path, metavar="PATH", help="A dataset's folder, or a Megatron prefix."
        ),
    ],
    document: Annotated[
        int | None, typer.Option("--document", help="Print the text of this document.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a dataset holds."""
    from data_prep.datasets.inspect import document_text, inspect_dataset

    if document is not None:
        print(document_text(dataset, document))
        return
    found = inspect_dataset(dataset)
    if as_json:
        _print_json(found)
        return
    shards = found.pop("shards")
    for name, value in found.items():
        print(f"{name:20} {value}")
    for shard in shards:
        print(
            f"{Path(shard['prefix']).name:20} {shard['documents']} documents, "
            f"{shard['sequences']} sequences, {shard['tokens']} tokens, {shard['dtype']}"
        )


def verify_command(
    dataset: Dataset,
    deep: Annotated[
        bool, typer.Option("--deep", help="Tokenise some shards again from their source.")
    ] = False,
    deep_shards: Annotated[int, typer.Option("--deep-shards", min=1, help="How many.")] = 1,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Check files, index, ids and tokenizer; exit code 1 when anything is wrong."""
    from data_prep.datasets.verify import verify

    verdict = verify(dataset, workers or available_cpus(), deep_shards if deep else None)
    if as_json:
        _print_json(verdict.as_json())
    else:
        print(f"checked: {', '.join(verdict.checked)}")
        if verdict.deep is not None:
            print(f"tokenised again: {verdict.deep} shards")
        for problem in verdict.problems:
            print(f"problem: {problem}")
        print("sound" if not verdict.problems else f"{len(verdict.problems)} problems")
    if verdict.problems:
        sys.exit(1)


def repair_command(
    dataset: Dataset, output: Output, workers: Workers = None, overwrite: Overwrite = False
) -> None:
    """Save all whole documents of a damaged dataset, and tell what was lost."""
    from data_prep.datasets.repair import repair

    manifest, lost = repair(dataset, output, workers or available_cpus(), overwrite)
    for name, what in lost.items():
        print(
            f"lost of {name} ({what['state']}): {what['documents']} documents, "
            f"{what['tokens']} tokens"
        )
    _print_made(output, manifest)


def diff_command(
    first: Annotated[
        Path, typer.Argument(parser=as_path, metavar="PATH", help="A dataset or Megatron prefix.")
    ],
    second: Annotated[Path, typer.Argument(parser=as_path, metavar="PATH", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare two datasets; exit code 1 when their documents differ."""
    from data_prep.datasets.diff import diff

    found = diff(first, second)
    if as_json:
        _print_json(found)
    else:
        for name, (one, other) in found["differences"].items():
            print(f"{name}: {one} / {other}")
        print(", ".join(f"{name} {count}" for name, count in found["documents"].items()))
        for name, value in found.get("first", {}).items():
            print(f"first difference, {name}: {value!r}")
        print("same documents" if found["same"] else "different")
    if not found["same"]:
        sys.exit(1)


def fetch_command(
    dataset: Annotated[
        Path,
        typer.Argument(
            parser=as_path, metavar="URL", help="A dataset, or Megatron prefix, in a store."
        ),
    ],
    cache_dir: Annotated[
        Path,
        typer.Option("--cache-dir", help="Local folder of copies, as data.cache_dir."),
    ],
) -> None:
    """Copy a dataset of an object store to this machine, checked, before a training asks for it."""
    from megascale.data.dataset_cache import cached_dataset

    if not is_remote(dataset):
        raise UserError(
            f"{dataset} is on this machine",
            rule="only datasets in an object store are copied",
            remedy="train on it as it is",
        )
    print(cached_dataset(dataset, cache_dir))


def stats_command(
    dataset: Annotated[
        Path,
        typer.Argument(
            parser=as_path, metavar="PATH", help="A dataset's folder, or a Megatron prefix."
        ),
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            parser=as_path,
            metavar="PATH",
            help="Write a page with tables and plots here.",
        ),
    ] = None,
) -> None:
    """Print statistics as JSON, or write them as a page that needs no network."""
    from data_prep.datasets.stats import dataset_stats
    from data_prep.datasets.stats_page import stats_page

    stats = dataset_stats(dataset)
    if page is None:
        _print_json(stats)
        return
    from megascale.data.atomic_files import write_file

    write_file(page, stats_page(stats).encode("utf-8", "backslashreplace"))
    print(f"wrote {page}")


def with_dataset_commands(app: typer.Typer) -> typer.Typer:
    """The same app, with all of them."""
    for name, command in (
        ("merge", merge_command),
        ("split", split_command),
        ("adopt", adopt_command),
        ("inspect", inspect_command),
        ("verify", verify_command),
        ("repair", repair_command),
        ("diff", diff_command),
        ("fetch", fetch_command),
        ("stats", stats_command),
    ):
        app.command(name)(command)
    return app


def _parts(
    dataset: Path,
    fractions: list[float] | None,
    documents: list[str] | None,
    shards: int | None,
) -> list[Part]:
    if sum(bool(given) for given in (fractions, documents, shards is not None)) != 1:
        raise UserError(
            f"--fraction {fractions}, --documents {documents}, --shards {shards}",
            rule="exactly one of them says how to split",
            remedy="for example --fraction 0.98 --fraction 0.02",
        )
    from data_prep.datasets.split import REST, reshard_parts, split_parts

    if shards is not None:
        return reshard_parts(dataset, shards)
    wrong = [given for given in documents or () if given != "rest" and not given.isdecimal()]
    if wrong:
        raise UserError(
            f"--documents {wrong[0]}",
            rule="it is a number of documents, or rest",
            remedy="for example --documents rest --documents 1000",
        )
    counts = [REST if given == "rest" else int(given) for given in documents or ()]
    return split_parts(dataset, fractions or None, counts or None)


def _print_made(path: Path, manifest: DatasetManifest) -> None:
    documents = sum(shard.documents for shard in manifest.shards)
    tokens = sum(shard.tokens for shard in manifest.shards)
    print(
        f"made {path}: {len(manifest.shards)} shards, {documents} documents, {tokens} tokens, "
        f"fingerprint {manifest.fingerprint}"
    )


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))
