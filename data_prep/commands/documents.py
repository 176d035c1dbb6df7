"""The commands `read`, `clean`, `dedup`, `decontaminate` and `run`.

Each imports its step when it is called: all of them take twice as long as the one that is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.choices import Action, Executor
from data_prep.documents import DocumentUnit
from data_prep.input_shards import parse_size
from data_prep.worker_pool import available_cpus
from megascale.data.places import as_path

if TYPE_CHECKING:
    from data_prep.clean.augment import Augment
    from data_prep.step import StepResult

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="[NAME=]PATH of text, jsonl, HTML, parquet, arrow, Hugging Face dataset or "
        ".bin/.idx; folder, quoted glob, fsspec URL, python-stdlib or python-stdlib-prose. "
        "May be given several times.",
    ),
]
Source = Annotated[
    Path,
    typer.Option(
        "--input", parser=as_path, metavar="PATH", help="Folder of documents, from `read`."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", parser=as_path, metavar="PATH", help="Folder to make.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes; one a processor if not given.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")
]
KeepRejected = Annotated[
    bool, typer.Option("--keep-rejected", help="Write what goes to a folder in the output.")
]


def with_document_commands(app: typer.Typer) -> typer.Typer:
    """The app with the commands of this module."""
    app.command("read")(read_command)
    app.command("clean")(clean_command)
    app.command("dedup")(dedup_command)
    app.command("decontaminate")(decontaminate_command)
    app.command("run")(run_command)
    return app


def read_command(
    inputs: Inputs,
    output: Output,
    documents: Annotated[
        DocumentUnit, typer.Option("--documents", help="What one document is in a text file.")
    ] = DocumentUnit.FILE,
    text_key: Annotated[
        str, typer.Option("--text-key", help="Key or column of the text.")
    ] = "text",
    id_key: Annotated[str, typer.Option("--id-key", help="Key or column of its name.")] = "id",
    meta_keys: Annotated[
        list[str] | None, typer.Option("--meta-key", help="Key or column to keep as meta.")
    ] = None,
    extract_html: Annotated[
        bool, typer.Option("--extract-html", help="The texts are HTML: keep their main text.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            parser=as_path,
            metavar="PATH",
            help="For .bin/.idx: turns ids back to text.",
        ),
    ] = None,
    max_document: Annotated[
        str, typer.Option("--max-document", help="Longer documents are skipped.")
    ] = "134MB",
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="Text of a shard, like 500MB.")
    ] = "64MB",
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Read files of any kind into shards of documents (zstd-compressed JSON lines)."""
    from data_prep.read.options import FormatOptions
    from data_prep.read.step import ReadOptions, named_inputs, prepare_read
    from data_prep.step import run_step

    form = FormatOptions(
        documents,
        text_key,
        id_key,
        tuple(meta_keys or ()),
        parse_size(max_document, "--max-document"),
        extract_html,
        tokenizer,
    )
    options = ReadOptions(form, parse_size(shard_size))
    step = prepare_read(named_inputs(inputs), output, options)
    _tell(output, run_step(step, _count(workers), overwrite))


def clean_command(
    source: Source,
    output: Output,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="Name of a rule, or YAML as 'length: {min_characters: 200}'; several are applied "
            "in the order given. There are repair, normalize, length, symbols, language, "
            "word_list, c4, gopher_quality, gopher_repetition and scrub. Without: repair, "
            "normalize, language, gopher_quality, gopher_repetition, scrub.",
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option("--augment", help="YAML as '{copies: 2, typo_rate: 0.02}': altered copies."),
    ] = None,
    keep_rejected: KeepRejected = False,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Repair, normalise, filter and scrub documents, each rule counted per source."""
    from data_prep.clean.step import CleanOptions, prepare_clean
    from data_prep.recipe.rules import rules_from_options
    from data_prep.step import run_step

    chosen = rules_from_options(rules) if rules else None
    options = CleanOptions(chosen, _augment(augment), keep_rejected)
    step = prepare_clean(source, output, options)
    _tell(output, run_step(step, _count(workers), overwrite))


def dedup_command(
    source: Source,
    output: Output,
    exact: Annotated[bool, typer.Option(help="Documents with the same bytes.")] = True,
    near: Annotated[bool, typer.Option(help="Documents that are nearly the same.")] = True,
    lines: Annotated[bool, typer.Option(help="Lines that occurred before.")] = False,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Smallest Jaccard index of near duplicates.")
    ] = 0.8,
    ngram: Annotated[int, typer.Option("--ngram", help="Words that are compared at once.")] = 5,
    bins: Annotated[int, typer.Option("--bins", help="Size of a signature.")] = 256,
    min_line: Annotated[
        int, typer.Option("--min-line", help="Characters of a line from which on it is compared.")
    ] = 30,
    memory: Annotated[str, typer.Option("--memory", help="Of the search, at most.")] = "1GB",
    self_test: Annotated[
        bool, typer.Option(help="Plant duplicates in a sample; report precision and recall.")
    ] = True,
    keep_rejected: KeepRejected = False,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Remove documents and lines that occurred before, in any shard."""
    from data_prep.dedup.signatures import DedupOptions, NearOptions
    from data_prep.dedup.step import DedupRun, dedup

    options = DedupOptions(
        exact, NearOptions(threshold, ngram, bins) if near else None, lines, min_line
    )
    run = DedupRun(keep_rejected, self_test, parse_size(memory, "--memory"))
    _tell(output, dedup(source, output, options, run, _count(workers), overwrite))


def decontaminate_command(
    source: Source,
    output: Output,
    against: Annotated[
        list[str],
        typer.Option("--against", help="[NAME=]PATH of an evaluation set; several times."),
    ],
    text_key: Annotated[str, typer.Option("--text-key", help="Of the evaluation sets.")] = "text",
    documents: Annotated[
        DocumentUnit, typer.Option("--documents", help="An example in a text file.")
    ] = DocumentUnit.LINE,
    ngram: Annotated[int, typer.Option("--ngram", help="Words that must be the same.")] = 13,
    min_words: Annotated[
        int, typer.Option("--min-words", help="Examples from this length on are searched.")
    ] = 8,
    min_matches: Annotated[
        int, typer.Option("--min-matches", help="N-grams that a document must share.")
    ] = 1,
    action: Annotated[
        Action, typer.Option("--action", help="Drop the document, or cut the text out.")
    ] = Action.DROP,
    window: Annotated[
        int, typer.Option("--window", help="Characters that are cut on either side.")
    ] = 200,
    max_pieces: Annotated[
        int, typer.Option("--max-pieces", help="Documents in more pieces are dropped.")
    ] = 10,
    keep_rejected: KeepRejected = False,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Remove text of evaluation sets, found by n-grams of words."""
    from data_prep.dedup.decontaminate import DecontaminateOptions, prepare_decontaminate
    from data_prep.read.step import named_inputs
    from data_prep.step import run_step

    options = DecontaminateOptions(
        ngram=ngram,
        min_words=min_words,
        min_matches=min_matches,
        action=action,
        window=window,
        max_pieces=max_pieces,
        text_key=text_key,
        documents=documents,
        keep_removed=keep_rejected,
    )
    step = prepare_decontaminate(source, output, named_inputs(against), options)
    _tell(output, run_step(step, _count(workers), overwrite))


def run_command(
    recipe: Annotated[
        Path, typer.Argument(parser=as_path, metavar="PATH", help="YAML file, as in configs/data.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", parser=as_path, metavar="PATH", help="In place of the recipe's own."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe.")] = False,
    executor: Annotated[
        Executor | None,
        typer.Option("--executor", help="Let datatrove deal out the shards: local or slurm."),
    ] = None,
    tasks: Annotated[int, typer.Option("--tasks", help="With --executor: tasks a phase.")] = 8,
    partition: Annotated[
        str | None, typer.Option("--partition", help="Of Slurm; needed with --executor slurm.")
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Of a Slurm task.")] = "04:00:00",
    memory_gb: Annotated[int, typer.Option("--mem-gb", help="Of a Slurm task.")] = 4,
    qos: Annotated[str | None, typer.Option("--qos", help="Of a Slurm task.")] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Run several steps as one; a second run goes on where the first one ended."""
    from data_prep.recipe.load import load_recipe
    from data_prep.recipe.phases import RunAs
    from data_prep.recipe.run import run_recipe, summary_lines

    loaded = load_recipe(recipe, output)
    if check:
        print(f"{recipe} is right: {', '.join(step.name for step in loaded.steps)}")
        return
    if executor is not None:
        from data_prep.scale_out import SlurmOptions, run_on_datatrove

        slurm = SlurmOptions(partition, time, memory_gb, qos)
        run_on_datatrove(recipe, loaded, executor, tasks, _count(workers), slurm, overwrite)
        return
    report = run_recipe(loaded, RunAs(_count(workers), overwrite))
    print("\n".join(summary_lines(report)))


def _count(workers: int | None) -> int:
    return available_cpus() if workers is None else workers


def _augment(text: str | None) -> Augment | None:
    if text is None:
        return None
    from data_prep.clean.augment import Augment
    from data_prep.recipe.problems import build
    from megascale.config.problems import ConfigError
    from megascale.config.yaml_text import parse_yaml

    value, problems = parse_yaml(text, "--augment")
    augment, found = build(Augment, value, "--augment")
    if problems or found:
        raise ConfigError([*problems, *found], "--augment")
    return augment


def _tell(output: Path, result: StepResult) -> None:
    from data_prep.recipe.run import step_lines

    if result.already_done:
        print(f"already done: {output} was made of this input with these options")
    for line in step_lines(result.report):
        print(line)
    counts: dict[str, Any] = result.report["counts"]
    print(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
