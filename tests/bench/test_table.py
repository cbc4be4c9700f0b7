"""Tables tell the figures of the JSON, and say what did not run."""

import json
from typing import Any

from hkvprof.bench.table import MEMORY, TIME, missing, notes, tables
from tests.bench.results import make_result


def text(lines: list[str]) -> str:
    return "\n".join(lines)


def figures(page: str) -> dict[str, list[str]]:
    """Cells per method; a method's name is followed by two blanks or more."""
    rows = [line.split("  ", 1) for line in page.splitlines()[2:] if line.strip()]
    return {name: rest.split() for name, rest in rows}


def test_tables_hold_the_figures_of_the_json() -> None:
    result = make_result()
    data: dict[str, Any] = json.loads(json.dumps(result.to_json()))
    for context, stored in zip(result.contexts, data["contexts"], strict=True):
        for table, columns in zip(tables(context), (MEMORY, TIME), strict=True):
            page = text(table)
            assert f"{context.tokens:,} tokens" in page
            cells = figures(page)
            used = [c for c in columns if any(row[c.field] is not None for row in stored["rows"])]
            ran = [row for row in stored["rows"] if not row["reason"]]
            assert list(cells) == [row["method"] for row in ran]
            for row in ran:
                expected = ["-" if row[c.field] is None else c.write(row[c.field]) for c in used]
                assert cells[row["method"]] == expected


def test_columns_without_figures_are_left_out() -> None:
    memory, time = (text(table) for table in tables(make_result().contexts[0]))
    assert "resident MiB" in memory
    assert "peak" not in memory
    assert "hit rate" in time
    assert "retrieval" not in time


def test_order_of_steps_and_missing_methods_are_told() -> None:
    first, *_, last = make_result().contexts
    assert "interleaved" in text(tables(first)[1])
    assert "one method after the other (memory)" in text(tables(last)[1])
    assert missing(first) == [
        "not run: dynamic only, 0.1: too short",
        "not run: static only, 0.05: too small",
    ]


def test_tables_fit_a_terminal() -> None:
    for table in tables(make_result().contexts[0]):
        assert max(map(len, text(table).splitlines())) <= 100


def test_notes_name_the_regime_and_the_crossovers() -> None:
    regime, _, compression, *crossovers = notes(make_result())
    assert "batch 1, 64 forced tokens in 8 rounds, bfloat16 on cpu (some), 2 threads" in regime
    assert compression.startswith("compression s: prefill less the dense prefill")
    assert crossovers == [
        "crossover at budget 0.2: from 2,048 tokens on the profile is not slower, and saves "
        "3.00 MiB there",
        "crossover at budget 0.1: dense is faster at the longest context tried",
    ]
