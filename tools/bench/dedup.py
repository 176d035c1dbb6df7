"""Speed of near-deduplication, in MB of text per CPU-second, against signatures by rensa.

    python -m tools.bench.dedup --megabytes 60 --folder /dev/shm/dedup

The corpus is made of pieces of the Python standard library, 3 kB each, every word of a round beyond
the first altered with probability 0.3, and a fifth of the documents again with 1 % of their words
altered. Rounds are interleaved; the median of each is printed. CPU seconds are user + system time
of the process.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from data_prep.dedup.signatures import DedupOptions, Signer
from data_prep.dedup.step import DedupRun, dedup
from data_prep.records import Document, ShardWriter, read_documents, shard_paths
from data_prep.sources import find_inputs

_PIECE = 3000
_SHARD_BYTES = 16_000_000
_NEAR = DedupOptions(exact=False)


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/megascale-dedup"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    source = arguments.folder / "source"
    source.mkdir(parents=True)
    size, planted = make_corpus(source, arguments.megabytes * 1_000_000)
    works = _works(source, arguments.folder / "out")
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            shutil.rmtree(arguments.folder / "out", ignore_errors=True)
            times[name].append(_cpu_seconds(work))
    for name, seconds in times.items():
        rates = sorted(size / 1e6 / second for second in seconds)
        middle = statistics.median(rates)
        print(f"{name:34} {middle:7.1f} MB per CPU-second ({rates[0]:.1f} to {rates[-1]:.1f})")
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)
    report = dedup(source, arguments.folder / "out", _NEAR, DedupRun(self_test=True)).report
    removed = report["counts"]["documents"] - report["counts"]["kept"]
    print(f"{report['counts']['documents']} documents, {planted} planted, {removed} removed")
    print(f"self-test {report['search']['self_test']}")
    shutil.rmtree(arguments.folder, ignore_errors=True)


def make_corpus(folder: Path, size: int) -> tuple[int, int]:
    """Write shards of about `size` bytes of text; returns their bytes and the planted documents."""
    chance = random.Random(0)
    pieces = _pieces()
    written = planted = number = shard = 0
    while written < size:
        with ShardWriter(folder / f"shard_{shard:05d}.jsonl.zst") as writer:
            while writer.text_bytes < _SHARD_BYTES and written + writer.text_bytes < size:
                text = pieces[number % len(pieces)]
                if number >= len(pieces):
                    text = _altered(text, 0.3, chance)
                writer.write(Document(text, str(number), "bench"))
                if number % 5 == 0:
                    text = _altered(text, 0.01, chance)
                    writer.write(Document(text, f"{number}#copy", "bench"))
                    planted += 1
                number += 1
        written += writer.text_bytes
        shard += 1
    return written, planted


def _pieces() -> list[str]:
    found = []
    for file in find_inputs(["python-stdlib"]):
        text = file.text
        if file.kind != "inline":
            with file.open() as stream:
                text = stream.read().decode("utf-8", "replace")
        found += [text[at : at + _PIECE] for at in range(0, len(text) - _PIECE, _PIECE)]
    return found


def _altered(text: str, rate: float, chance: random.Random) -> str:
    words = text.split(" ")
    for at in range(len(words)):
        if chance.random() < rate:
            words[at] = f"w{chance.randrange(1_000_000)}"
    return " ".join(words)


def _works(source: Path, out: Path) -> dict[str, Callable[[], None]]:
    def whole() -> None:
        dedup(source, out, _NEAR, DedupRun(self_test=False))

    def signatures() -> None:
        for path in shard_paths(source):
            Signer(_NEAR).sign(document for _, document in read_documents(path))

    def exact() -> None:
        dedup(source, out, DedupOptions(near=None), DedupRun(self_test=False))

    works = {
        "near: read, sign, search, write": whole,
        "near: read and sign only": signatures,
        "exact: read, sign, search, write": exact,
    }
    try:
        from rensa import RMinHash
    except ImportError:
        return works

    def theirs() -> None:
        for path in shard_paths(source):
            for _, document in read_documents(path):
                words = document.text.lower().split()
                sketch = RMinHash(num_perm=128, seed=1)
                sketch.update([" ".join(words[at : at + 5]) for at in range(len(words) - 4)])
                sketch.digest()

    return {**works, "rensa: read and sign only": theirs}


def _cpu_seconds(work: Callable[[], None]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
