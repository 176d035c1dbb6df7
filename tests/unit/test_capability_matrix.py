"""The table of docs/layouts.md is what the rules say."""

from __future__ import annotations

from pathlib import Path

from megascale.cli.config import all_checks
from megascale.engine.matrix import capability_matrix

DOCS = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"


def test_the_docs_have_the_table_of_the_rules() -> None:
    table = capability_matrix(all_checks())
    shown = DOCS.read_text().split("<!-- matrix -->\n")[1].split("<!-- /matrix -->")[0]
    assert shown.strip() == table.strip(), "run `megascale config matrix` and paste its output"
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert all(" yes |" in row or " no [" in row for row in rows)
    for number in range(1, table.count("\n") + 1):
        assert (f"no [{number}]" in table) == (f"\n{number}. " in table)
