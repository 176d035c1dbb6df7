"""Tokenising, reading and indexing against Hugging Face datasets and Megatron-LM, per CPU-second.

    python -m tools.bench.data --input english.jsonl --tokenizer gpt2     tokenising
    python -m tools.bench.data --only packing
    python -m tools.bench.data --only reading --json docs/benchmarks

Each way is a process of its own, rounds are interleaved, the median is printed. CPU seconds are
user + system time of a process and its children; MB are of UTF-8 text. `hf` is datasets.map with
tokenizers' batches and a memory map written at the end. `megatron` is the loop of Megatron-LM's
tools/preprocess_data.py (one worker of a pool, json.loads, one encode a document) around the real
IndexedDatasetBuilder of megatron-core: that script itself is not on PyPI. The text is a jsonl file
with the key "text"; without --tokenizer one of 8,192 ids is trained on it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_prep.encoders import Backend, make_encoder
from megascale.data.corpus import TokenCorpus
from megascale.data.gpt_dataset import GPTDataset
from megascale.data.packing import Packing, Packs
from megascale.data.token_file import DTYPE_CODES, MAGIC, TokenFile
from megascale.data.tokenizer import load_tokenizer
from tools.bench.job import Table, print_table, write_table

_WAYS = ("ours", "hf", "megatron", "raw")
_BATCH = 512
TOKENISING = ("CPU-s", "MB per CPU-s", "once started", "ours is", "ours once started")
READING = ("tokens", "opening, ms", "opening and indexing, CPU-s")


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, help="a jsonl file")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=_WAYS, default=list(_WAYS))
    parser.add_argument("--repeat", type=int, default=1, help="read the input so many times over")
    parser.add_argument("--only", choices=["tokenising", "memory", "reading", "packing"])
    parser.add_argument("--json", type=Path, help="write data_*.json into this folder, too")
    parser.add_argument("--child", choices=_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _WAYS_TO_RUN[arguments.child](arguments)
        return
    with tempfile.TemporaryDirectory(prefix="megascale-bench-") as folder:
        if arguments.only in (None, "reading"):
            bench_reading(Path(folder), arguments.rounds, arguments.json)
        if arguments.only in (None, "packing"):
            bench_packing(Path(folder), arguments.rounds)
        if arguments.only not in ("reading", "packing"):
            if arguments.input is None:
                parser.error("tokenising needs --input")
            arguments.tokenizer = arguments.tokenizer or _train(arguments.input, Path(folder))
            arguments.input = _repeated(arguments.input, arguments.repeat, Path(folder))
        if arguments.only in (None, "tokenising"):
            bench_tokenising(arguments, Path(folder))
        if arguments.only in (None, "memory"):
            bench_memory(arguments, Path(folder))


# ---- tokenising ------------------------------------------------------------------------------


def bench_tokenising(arguments: argparse.Namespace, folder: Path) -> None:
    """Whole processes, and the same without what they need for a single document."""
    megabytes = sum(len(text.encode()) for text in _texts(arguments.input)) / 1e6
    tiny = folder / "tiny.jsonl"
    with open(arguments.input, "rb") as stream:
        tiny.write_bytes(stream.readline())
    used: dict[str, list[float]] = {way: [] for way in arguments.ways}
    start: dict[str, list[float]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        for way in arguments.ways:
            start[way].append(_child(arguments, tiny, way, folder / way))
            used[way].append(_child(arguments, arguments.input, way, folder / way))
            seen = f"{used[way][-1]:.2f} CPU-s, {start[way][-1]:.2f} of them to start"
            print(f"round {number + 1}, {way}: {seen}", file=sys.stderr, flush=True)
    whole = {way: statistics.median(used[way]) for way in arguments.ways}
    steady = {way: whole[way] - statistics.median(start[way]) for way in arguments.ways}
    rows = [
        (
            way,
            [
                f"{whole[way]:.2f} ({min(used[way]):.2f} to {max(used[way]):.2f})",
                f"{megabytes / whole[way]:.2f}",
                f"{megabytes / steady[way]:.2f}",
                f"{whole[way] / whole['ours']:.2f}x",
                f"{steady[way] / steady['ours']:.2f}x",
            ],
        )
        for way in arguments.ways
    ]
    ids = [np.fromfile(path, np.uint16) for path in sorted(folder.glob("*/*.bin"))]
    same = all(np.array_equal(ids[0], other) for other in ids[1:])
    note = (
        f"{megabytes:.1f} MB of text, back end {arguments.backend}; the ids of {len(ids)} ways are "
        f"{'identical' if same else 'DIFFERENT'}. Of whole processes, and without what they need "
        f"for one document (once started); medians of {arguments.rounds} rounds."
    )
    _tell("Tokenising", note, TOKENISING, rows, arguments.json, {"used": used, "start": start})


def _tell(
    title: str, note: str, columns: Sequence[str], rows: Table, folder: Path | None, raw: Any
) -> None:
    """Print a table, and write it into `folder` as data_TITLE.json."""
    print(note)
    print_table(columns, rows)
    if folder is not None:
        name = title.lower().replace(" ", "_")
        write_table(folder / f"data_{name}.json", title, note, columns, rows, raw)


def _child(arguments: argparse.Namespace, text: Path, way: str, output: Path) -> float:
    """CPU seconds of one way, as a process with all it starts; for raw: of the encoding alone."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "tools.bench.data", "--child", way, "--output", str(output)]
    command += ["--input", str(text), "--tokenizer", str(arguments.tokenizer)]
    command += ["--backend", arguments.backend]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if way == "raw":
        return float(done.stdout.split()[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _texts(path: Path) -> Iterator[str]:
    with open(path, "rb") as stream:
        for line in stream:
            yield orjson.loads(line)["text"]


def _ours(arguments: argparse.Namespace) -> None:
    from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize

    options = TokenizeOptions(shard_bytes=1 << 40)  # one file, to be compared with the others'
    run = RunOptions(1, Backend(arguments.backend))
    tokenize([str(arguments.input)], arguments.output, arguments.tokenizer, options, run)


def _hf(arguments: argparse.Namespace) -> None:
    import datasets
    from tokenizers import Tokenizer

    arguments.output.mkdir()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    eod = load_tokenizer(arguments.tokenizer).eod_id

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        ids = [[*one.ids, eod] for one in encoded]
        return {"ids": ids, "length": [len(one) for one in ids]}

    loaded = datasets.load_dataset(
        "json",
        data_files=str(arguments.input),
        split="train",
        cache_dir=str(arguments.output / "cache"),
    )
    mapped = loaded.map(encode, batched=True, remove_columns=loaded.column_names)
    total = int(np.sum(mapped["length"], dtype=np.int64))
    written = np.memmap(arguments.output / "hf.bin", np.uint16, mode="w+", shape=(total,))
    at = 0
    for batch in mapped.with_format("numpy").iter(1024):
        ids = np.concatenate(batch["ids"])
        written[at : at + len(ids)] = ids
        at += len(ids)
    written.flush()


class _MegatronEncoder:
    """What a worker of preprocess_data does with a line."""

    def __init__(self, path: str, eod: int) -> None:
        self.path, self.eod = path, eod
        self.tokenizer: Any = None

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """(ids, lengths of sentences, characters of the line)."""
        if self.tokenizer is None:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(self.path)
        data = json.loads(line)
        ids = list(self.tokenizer.encode(data["text"], add_special_tokens=False).ids)
        ids.append(self.eod)
        return ids, [len(ids)], len(line)


def _megatron(arguments: argparse.Namespace) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    arguments.output.mkdir()
    tokenizer = load_tokenizer(arguments.tokenizer)
    encoder = _MegatronEncoder(str(arguments.tokenizer / "tokenizer.json"), tokenizer.eod_id)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(arguments.output / "m.bin"), dtype=dtype)
    with open(arguments.input, encoding="utf-8") as lines, multiprocessing.Pool(1) as pool:
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(str(arguments.output / "m.idx"))


def _raw(arguments: argparse.Namespace) -> None:
    """CPU seconds of the back end alone, on texts in memory, in batches as a worker has them."""
    encoder = make_encoder(load_tokenizer(arguments.tokenizer), Backend(arguments.backend))
    texts = list(_texts(arguments.input))
    before = time.process_time()
    for begin in range(0, len(texts), _BATCH):
        encoder.encode(texts[begin : begin + _BATCH])
    print(time.process_time() - before)


_WAYS_TO_RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "ours": _ours,
    "hf": _hf,
    "megatron": _megatron,
    "raw": _raw,
}


def bench_memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Largest memory of a worker, on the input and on ten times as much."""
    rows, raw = [], {}
    for times in (1, 10):
        text = folder / "text.jsonl"
        with open(text, "wb") as stream:
            for _ in range(times):
                stream.write(arguments.input.read_bytes())
        output = folder / f"memory_{times}"
        command = [sys.executable, "-m", "data_prep", "tokenize", "--input", str(text)]
        command += ["--output", str(output), "--tokenizer", str(arguments.tokenizer)]
        command += ["--workers", "2", "--shard-size", "8MB", "--backend", arguments.backend]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads((output / "report.json").read_text())
        peak = max(worker["peak_rss_bytes"] for worker in report["workers"])
        raw[text.stat().st_size] = peak
        rows.append((f"{text.stat().st_size / 1e6:.1f} MB", [f"{peak / 1e6:.1f}"]))
        shutil.rmtree(output)
    note = f"Back end {arguments.backend}; the larger of 2 workers."
    _tell("Memory of tokenising", note, ("peak MB",), rows, arguments.json, raw)


def _repeated(text: Path, times: int, folder: Path) -> Path:
    if times == 1:
        return text
    with open(folder / "repeated.jsonl", "wb") as stream:
        for _ in range(times):
            stream.write(text.read_bytes())
    return folder / "repeated.jsonl"


def _train(text: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "data_prep", "train-tokenizer", "--vocab-size", "8192"]
    command += ["--input", str(text), "--output", str(folder / "tokenizer")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "tokenizer"


# ---- reading ---------------------------------------------------------------------------------


def bench_reading(folder: Path, rounds: int, json_folder: Path | None) -> None:
    """Random samples of a warm file, and opening and indexing files of up to 10 M documents."""
    ids = np.random.default_rng(0).integers(0, 50_000, 50_000_000).astype(np.uint16)
    _write_pair(folder / "warm", np.full(50_000, 1000), ids)
    corpus = TokenCorpus.open(folder / "warm")
    dataset = GPTDataset(corpus, (0, corpus.num_tokens), 1024, seed=0)
    raw: dict[str, list[float]] = {"rates": [_samples_per_second(dataset) for _ in range(rounds)]}
    rows = []
    for documents in (10_000, 1_000_000, 10_000_000):
        _write_pair(folder / "large", np.full(documents, 1100), None)
        opening = [_timed(lambda: TokenFile(folder / "large")) for _ in range(rounds)]
        indexing = [_timed(lambda: _index(folder / "large")) for _ in range(rounds)]
        raw |= {f"opening {documents}": opening, f"indexing {documents}": indexing}
        cells = [
            f"{documents * 1100:,}",
            f"{statistics.median(opening) * 1e3:.3f}",
            f"{statistics.median(indexing):.3f}",
        ]
        rows.append((f"{documents:,} documents", cells))
    note = (
        f"Random samples of 1,024 tokens of a warm file: {statistics.median(raw['rates']):,.0f} "
        f"per CPU-second; medians of {rounds} rounds."
    )
    _tell("Reading a dataset", note, READING, rows, json_folder, raw)


def bench_packing(folder: Path, rounds: int) -> None:
    """The index of packed samples, of 10 M documents with lengths as those of web pages spread."""
    chance = np.random.default_rng(0)
    lengths = np.maximum(chance.lognormal(np.log(600), 1.1, 10_000_000).astype(np.int64), 1)
    _write_pair(folder / "packed", lengths, None)
    corpus = TokenCorpus.open(folder / "packed")
    whole = (0, corpus.num_tokens)
    kinds: list[tuple[Packing, int]] = [
        ("one_document", 1024),
        ("best_fit", 1024),
        ("best_fit", 8192),
    ]
    for packing, seq_length in kinds:
        times = []
        for _ in range(rounds):
            before = time.process_time()
            packs = Packs(corpus, whole, seq_length, packing)
            times.append(time.process_time() - before)
        print(
            f"{packing} of {len(lengths):,} documents at {seq_length}: "
            f"{statistics.median(times):.2f} CPU-s ({min(times):.2f}-{max(times):.2f}), "
            f"{packs.report.padding:.2%} padding"
        )


def _index(prefix: Path) -> None:
    """All that a run needs before its first sample: document starts, split, order of samples."""
    corpus = TokenCorpus.open(prefix)
    train, _ = corpus.split([0.98, 0.02])
    GPTDataset(corpus, train, 1024, seed=0, isolate_documents=True).batch(np.arange(8))


def _samples_per_second(dataset: GPTDataset) -> float:
    batches = [np.arange(begin, begin + _BATCH) for begin in range(0, 200 * _BATCH, _BATCH)]
    for indices in batches[:20]:
        dataset.batch(indices)
    before = time.process_time()
    for indices in batches:
        dataset.batch(indices)
    return len(batches) * _BATCH / (time.process_time() - before)


def _timed(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def _write_pair(prefix: Path, lengths: np.ndarray, ids: np.ndarray | None) -> None:
    """A .bin/.idx pair of one sequence a document; without ids the .bin is a hole of zeros."""
    code = next(code for code, dtype in DTYPE_CODES.items() if dtype is np.uint16)
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        stream.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write((ends - lengths * 2).astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        if ids is None:
            stream.truncate(int(ends[-1]))
        else:
            stream.write(ids.tobytes())


if __name__ == "__main__":
    main()
