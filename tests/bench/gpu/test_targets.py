"""Met or not met, by the worst row; and the text that says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hkvprof.bench.gpu.cells import compare
from hkvprof.bench.gpu.records import Cell, Prefill
from hkvprof.bench.gpu.table import render
from hkvprof.bench.gpu.targets import check_targets
from tests.bench.gpu.figures import LINKS, MS, cell, result


def verdicts(*cells: Cell, **changes: object) -> dict[str, tuple[str, str]]:
    """By the first word(s) of what was wanted."""
    targets = check_targets(result(*cells, **changes))
    keys = ("attention", "ceiling", "stock graph", "stock eager", "static", "exposed", "prefill",
            "share")  # fmt: skip
    return {key: (target.verdict, target.found) for key, target in zip(keys, targets, strict=True)}


def test_all_by_hand() -> None:
    found = verdicts(cell(batch=1), cell(batch=8))
    assert found["attention"] == (
        "not met", "50.0%, static 0.10, graph at 32,768 x 1 (the worst of 2)"
    )  # fmt: skip
    # 20 / 13 of 20 / 11
    assert found["ceiling"] == ("not met", "84.6%, hybrid 0.10, graph at 32,768 x 8")
    assert found["stock graph"] == ("met", "3.08x, hybrid 0.10, graph at 32,768 x 1")
    assert found["stock eager"] == ("not met", "1.33x, hybrid 0.10, eager at 32,768 x 1")
    assert found["static"] == ("met", "1.040x at 32,768 x 1 (the worst of 2)")
    assert found["exposed"][0] == "met"
    assert found["exposed"][1].startswith("4.0%")
    assert found["prefill"] == ("met", "1.00% at 32,768 tokens, batch 1")
    assert found["share"][0] == "met"


def test_the_worst_row_decides() -> None:
    slow = cell(batch=32, times={**MS, "hybrid 0.10, graph": 14.0})
    found = verdicts(cell(batch=8), slow)
    assert found["static"] == ("not met", "1.120x at 32,768 x 32 (the worst of 2)")
    assert found["exposed"] == (
        "not met",
        "10.9%, hybrid 0.10, graph at 32,768 x 32 (the worst of 2)",
    )
    large = [replace(row, held_bytes=1_021_000_000) if row.method == "static 0.10, graph" else row
             for row in cell().rows]  # fmt: skip
    made = result(cell())
    rows = compare(large, 10_000_000_000, made.regime, LINKS)
    assert verdicts(Cell(32768, 8, rows))["share"][0] == "not met"


def test_what_was_not_measured_is_not_met() -> None:
    found = verdicts(cell(context=8192, batch=1, times={"static 0.10, graph": 1.0}), prefill=())
    kinds = {key: verdict for key, (verdict, _) in found.items() if key != "share"}
    assert set(kinds.values()) == {"not measured"}
    slow = verdicts(cell(), links=replace(LINKS, from_host=25.0))
    assert slow["static"] == ("does not apply", "the host link gives 25.0 GB/s")
    late = verdicts(cell(), prefill=(Prefill(32768, "hybrid 0.10", 2.0, 1.96),))
    assert late["prefill"] == ("not met", "2.00% at 32,768 tokens, batch 1")


def test_the_text_holds_every_row_and_reason() -> None:
    made = result(cell(), wanted=((32768, 8), (131072, 32)))
    text = render(made)
    for row in made.cells[0].rows:
        assert row.method in text
    assert "not run: whole, graph: made up" in text
    assert "Not on a GPU" not in text
    elsewhere = replace(made, regime=replace(made.regime, device="CPU (x86_64)"))
    assert render(elsewhere).startswith("Not on a GPU: times mean nothing here")
    assert "not run yet: 131,072 x 32" in text
    assert "copy 1,000 GB/s on the card" in text
    line = next(line for line in text.splitlines() if line.startswith("hybrid 0.10, graph  "))
    assert line.split()[3:] == [
        "954", "10.0%", "4,768", "13.00", "50.00", "3.08", "1.54", "85%", "85%", "2.000", "50%",
        "90%", "4,883", "4.0%",
    ]  # fmt: skip
    assert all(len(line) < 200 or line.startswith(("held:", "qwen")) for line in text.splitlines())


@pytest.mark.parametrize("context", [8192, 32768])
def test_a_table_of_no_rows_is_no_error(context: int) -> None:
    assert "made up" in render(result(cell(context, times={})))
