"""Met or not met, by the worst row; and the text that says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hkvprof.bench.compare import check_targets
from hkvprof.bench.records import BenchResult, Context, PrefillTime
from hkvprof.bench.table import render
from tests.bench.figures import LINKS, MS, context, result
from tests.bench.results import make_result


def verdicts(*contexts: Context, **changes: object) -> dict[str, tuple[str, str]]:
    """By the first word(s) of what was wanted."""
    targets = check_targets(result(*contexts, **changes))
    keys = ("attention", "ceiling", "stock graph", "stock eager", "static", "exposed", "prefill",
            "share")  # fmt: skip
    return {key: (target.verdict, target.found) for key, target in zip(keys, targets, strict=True)}


def test_all_by_hand() -> None:
    found = verdicts(context(batch=1), context(batch=8))
    assert found["attention"] == (
        "not met", "50.0%, static only, 0.10, graph at 32,768 x 1 (the worst of 2)"
    )  # fmt: skip
    # 20 / 13 of 20 / 11
    assert found["ceiling"] == ("not met", "84.6%, profile, 0.10, graph at 32,768 x 8")
    assert found["stock graph"] == ("met", "3.08x, profile, 0.10, graph at 32,768 x 1")
    assert found["stock eager"] == ("not met", "1.33x, profile, 0.10 at 32,768 x 1")
    assert found["static"] == ("met", "1.040x at 32,768 x 1 (the worst of 2)")
    assert found["exposed"][0] == "met"
    assert found["exposed"][1].startswith("4.0%")
    assert found["prefill"] == ("met", "1.00% at 32,768 tokens, batch 1")
    assert found["share"][0] == "met"


def test_the_worst_row_decides() -> None:
    slow = context(batch=32, times={**MS, "profile, 0.10, graph": 14.0})
    found = verdicts(context(batch=8), slow)
    assert found["static"] == ("not met", "1.120x at 32,768 x 32 (the worst of 2)")
    assert found["exposed"] == (
        "not met",
        "10.9%, profile, 0.10, graph at 32,768 x 32 (the worst of 2)",
    )
    rows = [replace(row, held_share=0.1021) if row.method == "static only, 0.10, graph" else row
             for row in context().rows]  # fmt: skip
    large = Context(32768, 8, "filled by hand", tuple(rows))
    assert verdicts(large)["share"][0] == "not met"


def test_what_was_not_measured_is_not_met() -> None:
    found = verdicts(
        context(tokens=8192, batch=1, times={"static only, 0.10, graph": 1.0}), prefill=()
    )
    kinds = {key: verdict for key, (verdict, _) in found.items() if key != "share"}
    assert set(kinds.values()) == {"not measured"}
    slow = verdicts(context(), links=replace(LINKS, from_host=25.0))
    assert slow["static"] == ("does not apply", "the host link gives 25.0 GB/s")
    late = verdicts(context(), prefill=(PrefillTime(32768, "profile, 0.10", 2.0, 1.96),))
    assert late["prefill"] == ("not met", "2.00% at 32,768 tokens, batch 1")


def test_the_text_holds_every_row_and_reason() -> None:
    made = result(context(), wanted=((32768, 8), (131072, 32)))
    text = render(made)
    for row in made.contexts[0].rows:
        assert row.method in text
    assert "not run: whole, 0.9999, graph: made up" in text
    assert "Not on a GPU" not in text
    elsewhere = replace(made, regime=replace(made.regime, device="cpu (x86_64)"))
    assert render(elsewhere).startswith("Not on a GPU: times mean nothing here")
    assert "not run yet: 131,072 x 32" in text
    assert "copy 1,000 GB/s on the card" in text
    memory, time = [line for line in text.splitlines() if line.startswith("profile, 0.10, graph  ")]
    assert memory.split()[3:] == ["953.67", "953.67", "10.0%", "4,768.37"]
    assert time.split()[3:] == [
        "13.000", "50.000", "3.08x", "1.54x", "84.6%", "84.6%", "2.000", "50.0%", "90.0%",
        "4,882.8", "4.0%",
    ]  # fmt: skip
    assert all(
        len(line) < 200 or line.startswith(("ms/token:", "bytes are", "qwen"))
        for line in text.splitlines()
    )


@pytest.mark.parametrize("tokens", [8192, 32768])
def test_a_table_of_no_rows_is_no_error(tokens: int) -> None:
    assert "made up" in render(result(context(tokens, times={})))


def test_a_result_comes_back_from_json_as_it_was() -> None:
    for made in (result(context()), make_result()):
        assert BenchResult.from_json(json.loads(json.dumps(made.to_json()))) == made
