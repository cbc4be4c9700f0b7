"""The tables tell the figures of the summaries, in order, and fit a terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from hkvprof.evaluate.records import FULL, OURS, Answer
from hkvprof.evaluate.statistics import BootstrapInterval, Duel, MethodSummary, TaskScore, summarise
from hkvprof.report.comparison import (
    NOTES,
    comparison_table,
    duel_lines,
    next_steps,
    order,
    task_table,
)
from tests.evaluate.test_statistics import answer


def summary(method: str = OURS, budget: str = "0.10", **other: Any) -> MethodSummary:
    known: dict[str, Any] = {
        "regime": "inside", "answers": 8, "scored": 8, "score": 0.5,
        "tasks": {"ocr": TaskScore(0.5, 8, ("anls",))}, "score_share": 0.625,
        "difference": BootstrapInterval(-0.3, -0.4, 0.05, 4), "worst_task": "ocr",
        "worst_ratio": 0.625,
        "kl": BootstrapInterval(0.0123, 0.01, 0.015, 4), "agreement": 0.875, "nll": 1.0,
        "nll_difference": 0.25, "share": 0.0975, "storage_share": 0.1, "host_bytes": 3 * 2.0**20,
        "compress_seconds": 0.456, "hit_rate": None, "read_share": 0.0042, "limit_share": 0.0051,
        "all_kept": 0.75,
        "true_kl": BootstrapInterval(0.09, 0.08, 0.1, 4), "true_nll_difference": 0.5,
    }  # fmt: skip
    return MethodSummary(method=method, budget=budget, **(known | other))


def full(**other: Any) -> MethodSummary:
    known = {"score": 0.8, "share": 1.0, "compress_seconds": 0.0}
    return summary(FULL, "", **(known | other))


def text(page: RenderableType, width: int = 200) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True).print(page)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_every_figure_of_a_row() -> None:
    title, heading, first, blank, row, end, *notes = text(comparison_table([full(), summary()]))
    assert title == "inside: question in the compressed prompt (8 questions, 4 samples)"
    assert " ".join(heading.split()) == (
        "method budget share by tensors host MiB reads at most score d score all kept worst task "
        "KL true KL KL, 95% d NLL true d NLL agree s hit rate"
    )
    assert first.split() == [FULL, "-", "100.0%", "10.0%", "3.0", "-", "-", "80.0%", *"---",
                             "0.012", *"-----", "0.00", "-"]  # fmt: skip
    assert blank == end == ""
    assert " ".join(row.split()) == (
        "hkvprof 0.10 9.8% 10.0% 3.0 0.42% 0.51% 50.0% -30.0 [-40.0, +5.0] 75.0% 62% ocr 0.012 "
        "0.09 [0.01, 0.015] +0.25 +0.5 87.5% 0.46 -"
    )
    assert notes == list(NOTES)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_narrow_terminals_lose_no_column_and_no_figure(width: int) -> None:
    rows = [full()]
    for budget in ("0.20", "4096", "2GiB"):
        rows.append(summary(OURS, budget, difference=BootstrapInterval(-0.999, -1.0, -0.987, 4)))
        rows.append(
            summary("a_public_baseline_with_a_long_name", budget, worst_task="some_very_long_task",
                    answers=7, nll_difference=-1.23e-5, kl=BootstrapInterval(1.23e-5, 0.0, 1.0, 4))
        )  # fmt: skip
    page, whole = (text(comparison_table(rows), width=wide) for wide in (width, 400))
    assert max(map(len, page)) <= width
    assert set(" ".join(page).split()) == set(" ".join(whole).split())
    assert sum(line.startswith("method") for line in page) > 1
    assert sum(line.startswith("method") for line in whole) == 1


def test_budgets_descend_then_ours_then_by_score() -> None:
    rows = [summary("b", "0.05", score=0.9), summary("a", "10%", score=0.2), summary(OURS, "0.05"),
            summary("b", "10%", score=0.3), summary(OURS, "10%", score=0.1), summary(OURS, "1"),
            full(), summary("c", "2MiB"), summary("c", "512", score=None),
            summary("a", "512", score=0.0)]  # fmt: skip
    assert [(row.method, row.budget) for row in order(rows)] == [
        (OURS, "1"), (FULL, ""), (OURS, "10%"), ("b", "10%"), ("a", "10%"), (OURS, "0.05"),
        ("b", "0.05"), ("c", "2MiB"), ("a", "512"), ("c", "512"),
    ]  # fmt: skip


def test_regimes_have_their_own_tables() -> None:
    rows = [full(), full(regime="after", score=0.7), summary(), summary(regime="after", score=0.6)]
    page = text(comparison_table(rows))
    starts = [n for n, line in enumerate(page) if line.startswith(("inside:", "after:"))]
    assert len(starts) == 2
    assert "context compressed first, question after it" in page[starts[1]]
    assert [line.split()[7] for line in page if line.startswith(OURS)] == ["50.0%", "60.0%"]


def test_methods_that_answered_less_say_so() -> None:
    page = text(comparison_table([full(), summary(answers=5), summary("snapkv")]))
    assert any(line.startswith("hkvprof (n=5) ") for line in page)
    assert any(line.startswith("snapkv  ") for line in page)


def test_what_is_missing_is_a_dash() -> None:
    bare = summary(
        score=None, difference=None, worst_ratio=None, worst_task="", nll_difference=None,
        true_kl=None,
    )  # fmt: skip
    row = next(line for line in text(comparison_table([full(), bare])) if OURS in line)
    assert row.split().count("-") == 6


def answers() -> list[Answer]:
    return [
        answer("a", score=1.0), answer("b", score=0.5),
        answer("a", OURS, 0.5, budget="0.20"), answer("b", OURS, 0.5, budget="0.20"),
        answer("a", OURS, 0.0, budget="0.10"), answer("b", OURS, 0.5, budget="0.10"),
        answer("a", "snapkv", 0.25, budget="0.10"),
    ]  # fmt: skip


def test_scores_by_task_of_full_and_ours() -> None:
    title, heading, row, total, end = text(task_table(summarise(answers())))
    assert (title, end) == ("inside: question in the compressed prompt", "")
    assert heading.split() == ["full", "cache", "0.20", "0.10"]
    assert row.split("  ")[0] == "ocr (n=2)"
    assert row.split()[2:] == ["75%", "50%", "25%"]
    assert total.split() == ["all", "questions", "75.0%", "50.0%", "25.0%"]


def test_metrics_are_named_where_they_differ() -> None:
    extra = [answer("c", task="caption", metric="rouge_l"),
             answer("d", task="caption", metric="words", score=0.0)]  # fmt: skip
    page = text(task_table(summarise([*answers(), *extra])))
    rows = {line.split("  ")[0]: line.split("  ")[-1] for line in page}
    assert rows["ocr (anls, n=2)"].strip() == "25%"
    assert rows["caption (rouge_l, words, n=2)"].strip() == "-"


def test_strangers_names_are_no_markup_and_no_control_characters() -> None:
    odd = [replace(a, task="\x1b[2J[bold]x[/bold]") for a in answers()]
    page = "\n".join(text(task_table(summarise(odd))))
    assert "?[2J[bold]x[/bold] (n=2)" in page
    assert "\x1b" not in "\n".join(text(comparison_table(summarise(odd))))


SCORE = Duel("inside", "0.10", "score", "snapkv", 120, 0.85, 0.8,
             BootstrapInterval(0.05, -0.01, 0.11, 60), None)  # fmt: skip
KL = Duel("after", "4096", "kl", "quest", 80, 0.01, 0.03,
          BootstrapInterval(0.02, 0.015, 0.025, 40),
          BootstrapInterval(3.0, 2.5, 3.75, 40))  # fmt: skip


def test_duels_are_sentences() -> None:
    score, kl = duel_lines([SCORE, KL])
    assert score == (
        "inside, budget 0.10, score: hkvprof 85.0%, snapkv (the best public baseline) 80.0% on the "
        "120 questions of 60 samples that both answered; ours less theirs +5.0 [-1.0, +11.0] "
        "points; the interval includes zero"
    )
    assert kl == (
        "after, budget 4096, KL to the full cache: hkvprof 0.01, quest (the best public baseline) "
        "0.03 on the 80 questions of 40 samples that both answered; theirs less ours +0.02 "
        "[+0.015, +0.025] nats, theirs over ours 3 [2.5, 3.8]; the interval excludes zero"
    )


@pytest.mark.parametrize("duel", [SCORE, KL])
def test_one_sample_has_no_interval_to_speak_of(duel: Duel) -> None:
    (line,) = duel_lines([replace(duel, difference=BootstrapInterval(0.5, 0.5, 0.5, 1))])
    assert line.endswith("; one sample, so no interval")


def test_next_steps_name_model_and_profile() -> None:
    lines = next_steps("org/model", "p.safetensors")
    assert '    model, processor = hkvprof.load_model("org/model")' in lines
    assert any('apply(model, "p.safetensors", budget=0.10)' in line for line in lines)
