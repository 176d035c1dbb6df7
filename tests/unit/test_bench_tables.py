"""The bench's tables are computed from its measurements, and land where the page wants them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import job, memory, report, scaling, startup

PAGE = f"# Title\n\nby hand\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


def test_a_table_goes_from_the_tool_to_the_page(tmp_path: Path) -> None:
    rows = [("ours", ["1.5", "2.25x"]), ("peer", ["3.0", ""])]
    path = tmp_path / "new folder" / "tool.json"
    job.write_table(path, "A measurement", "Two ranks.", ("s", "faster"), rows, {"all": [1]})
    found = json.loads(path.read_text())
    assert found["raw"] == {"all": [1]}
    page = report.render(PAGE, [found])
    assert page.startswith("# Title\n\nby hand\n")
    assert page.endswith(f"{report.END}\n\nafter\n")
    assert "old" not in page
    table = "|  | s | faster |\n|---|---|---|\n| ours | 1.5 | 2.25x |\n| peer | 3.0 |  |"
    assert table in page
    assert f"Two ranks. {found['machine']['cpu']}" in page
    assert found["machine"]["date"] in page
    assert report.render(page, [found]) == page


def test_columns_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    job.print_table(("wall s", "x"), [("a long name", ["1.0", "20.5x"]), ("b", ["10.0", ""])])
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines] == [
        ["wall", "s", "x"],
        ["a", "long", "name", "1.0", "20.5x"],
        ["b", "10.0"],
    ]


def test_parameters_of_a_job() -> None:
    from tools.bench.peers.plain_loop import GPT

    small = job.Job(num_layers=3, hidden_size=32, num_heads=2, vocab_size=101, seq_length=16)
    assert small.parameters == sum(p.numel() for p in GPT(small).parameters())


def test_memory_is_the_worst_rank_without_the_libraries() -> None:
    small = job.Job(num_layers=1, hidden_size=16, num_heads=2, vocab_size=100, seq_length=8)
    ranks = [
        {"live_bytes": 4 * small.parameters, "before_mb": 100, "start_mb": 130, "steady_mb": 140},
        {"live_bytes": 5 * small.parameters, "before_mb": 100, "start_mb": 124, "steady_mb": 120},
    ]
    found = memory._ratios(ranks, small)
    assert found == {"live": 5.0, "start": 24 / 20, "steady_mb": 40}
    assert memory._cells({**found, "load": 1.254}) == ["5.00", "1.20", "1.25", "40"]


def test_scaling_is_the_median_of_the_rounds_ratios() -> None:
    def one(step_s: float, share: float) -> dict[str, float]:
        return {"step_s": step_s, "share": share}

    rounds = [[one(4.0, 1.0), one(2.0, 0.9)], [one(6.0, 0.8), one(4.0, 0.7)]]
    rounds.append([one(5.0, 1.0), one(2.5, 1.0)])
    cells = ["5.00", "2.50", "2.00x", "1.00", "0.90", "2.00x", "3"]
    assert scaling._cells(rounds) == cells
    waited = [[one(4.0, 1.0), one(4.0, 0.5)]]
    assert scaling._cells(waited)[2:6] == ["1.00x", "1.00", "0.50", "2.00x"]


def test_a_start_is_the_median_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.os, "cpu_count", lambda: 2)
    cells = startup._cells([(4.0, 6.0), (5.0, 8.0), (9.0, 7.0)])
    assert cells == ["5.0 (4.0 to 9.0)", "7.0", "0.75", "3"]
