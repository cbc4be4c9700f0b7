"""Means, paired differences and intervals: by hand, by loops, by scipy, and by their properties."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import UsageError
from hkvprof.evaluate.records import FULL, OURS, Answer
from hkvprof.evaluate.statistics import (
    RESAMPLES,
    BootstrapInterval,
    Duel,
    MethodSummary,
    Question,
    bootstrap,
    duels,
    ranking,
    summarise,
)

PUBLIC = {"snapkv", "quest"}


def answer(sample: str, method: str = FULL, score: float | None = 1.0, **other: Any) -> Answer:
    """An answer to the one question of a sample; budget 0.1 but for the full cache."""
    known: dict[str, Any] = {
        "task": "ocr", "regime": "inside", "turn": 0, "budget": "" if method == FULL else "0.1",
        "text": "", "expected": "", "metric": "anls", "kl": 0.0, "agreement": 1.0, "nll": 1.0,
        "steps": 8, "prompt_tokens": 100, "resident_bytes": 100, "storage_bytes": 100,
        "host_bytes": 0, "dense_bytes": 100, "compress_seconds": 0.0, "hit_rate": None,
    }  # fmt: skip
    return Answer(sample=sample, method=method, score=score, **(known | other))


def two_samples() -> list[Answer]:
    """The full cache and hkvprof on two samples; the second one has two questions."""
    return [
        answer("a", score=1.0, nll=1.0),
        answer("b", score=0.5, nll=2.0),
        answer("b", score=1.0, nll=3.0, turn=1, task="later", metric="words"),
        answer("a", OURS, 0.5, kl=0.1, agreement=0.5, nll=1.5, resident_bytes=10, storage_bytes=12,
               host_bytes=90, compress_seconds=1.0, hit_rate=0.5),
        answer("b", OURS, 0.5, kl=0.2, agreement=1.0, nll=2.0, resident_bytes=20, storage_bytes=12,
               dense_bytes=300, host_bytes=30, compress_seconds=3.0),
        answer("b", OURS, 0.0, kl=0.6, agreement=0.0, nll=4.0, turn=1, task="later",
               metric="words", resident_bytes=20, storage_bytes=12, dense_bytes=300, host_bytes=30,
               compress_seconds=5.0, hit_rate=1.0),
    ]  # fmt: skip


def only(answers: list[Answer], method: str = OURS) -> MethodSummary:
    """The one summary of a method."""
    (found,) = (summary for summary in summarise(answers) if summary.method == method)
    return found


def interval(value: float, low: float, high: float, samples: int) -> BootstrapInterval:
    """An interval to compare with, up to rounding."""
    return BootstrapInterval(*(pytest.approx(v, abs=1e-12) for v in (value, low, high)), samples)


def test_a_summary_by_hand() -> None:
    """Three resamples of two samples, (a, a), (a, b) and (b, b), set the bounds."""
    found = only(two_samples())
    assert (found.regime, found.budget, found.answers, found.scored) == ("inside", "0.1", 3, 3)
    assert found.score == pytest.approx(1 / 3)
    assert {task: cell.score for task, cell in found.tasks.items()} == {"ocr": 0.5, "later": 0.0}
    assert (found.tasks["ocr"].answers, found.tasks["later"].metrics) == (2, ("words",))
    assert found.score_share == pytest.approx(1 / 2.5)
    assert found.difference == interval(-0.5, -0.5, -0.5, 2)
    assert (found.worst_task, found.worst_ratio) == ("later", 0.0)
    assert found.kl == interval(0.3, 0.1, 0.4, 2)
    assert found.agreement == pytest.approx(0.5)
    assert found.nll == pytest.approx(2.5)
    assert found.nll_difference == pytest.approx(0.5)
    assert found.share == pytest.approx(50 / 700)
    assert found.storage_share == pytest.approx(36 / 700)
    assert found.host_bytes == pytest.approx(50)
    assert found.compress_seconds == pytest.approx(3)
    assert found.hit_rate == pytest.approx(0.75)


def test_the_full_cache_differs_by_nothing_from_itself() -> None:
    found = only(two_samples(), FULL)
    assert found.difference == BootstrapInterval(0.0, 0.0, 0.0, 2)
    assert (found.score_share, found.worst_ratio, found.nll_difference) == (1.0, 1.0, 0.0)
    assert (found.share, found.hit_rate) == (1.0, None)


def test_summaries_stand_in_the_order_of_first_appearance() -> None:
    answers = [answer("a", "quest"), answer("a", regime="after"), answer("a"), answer("b", "quest"),
               answer("a", "quest", budget="0.2")]  # fmt: skip
    keys = [(s.regime, s.method, s.budget) for s in summarise(answers)]
    assert keys == [("inside", "quest", "0.1"), ("after", FULL, ""), ("inside", FULL, ""),
                    ("inside", "quest", "0.2")]  # fmt: skip


def test_regimes_are_compared_with_their_own_full_cache() -> None:
    answers = [answer("a", score=1.0), answer("a", score=0.5, regime="after"),
               answer("a", OURS, 0.5), answer("a", OURS, 0.5, regime="after")]  # fmt: skip
    found = [s.difference.value for s in summarise(answers) if s.method == OURS and s.difference]
    assert found == [-0.5, 0.0]


def test_only_common_questions_are_compared() -> None:
    """The full cache's easy question, which ours did not answer, does not count against ours."""
    answers = [answer("a", score=0.5, nll=1.0), answer("b", score=1.0), answer("c", score=None),
               answer("a", OURS, 0.5, nll=3.0), answer("c", OURS, 1.0, nll=1.0)]  # fmt: skip
    found = only(answers)
    assert (found.score, found.scored, found.score_share) == (0.75, 2, 1.0)
    assert found.difference == BootstrapInterval(0.0, 0.0, 0.0, 1)
    assert found.nll_difference == 1.0


def test_without_scores_there_are_none() -> None:
    found = only([answer("a", score=None), answer("a", OURS, None, kl=0.5)])
    assert (found.score, found.score_share, found.difference, found.worst_ratio) == (None,) * 4
    assert (found.scored, found.tasks, found.worst_task) == (0, {}, "")
    assert found.kl.value == 0.5


def test_the_worst_task_is_one_the_full_cache_can_do() -> None:
    answers = []
    for task, full, ours in (("x", 0.0, 0.0), ("y", 1.0, 0.5), ("z", 0.5, 0.25), ("w", 1.0, 1.0)):
        answers += [answer("a", score=full, task=task), answer("a", OURS, ours, task=task)]
    found = only(answers)
    assert (found.worst_task, found.worst_ratio) == ("y", 0.5)


def test_a_regime_without_the_full_cache_is_refused() -> None:
    answers = [*two_samples(), answer("a", OURS, regime="after")]
    for function in (summarise, lambda given: duels(given, PUBLIC)):
        with pytest.raises(UsageError, match="'after' has no answers of the method 'full'"):
            function(answers)
    assert summarise([]) == []


def test_two_answers_to_one_question_are_refused() -> None:
    answers = two_samples()
    with pytest.raises(UsageError, match=r"hkvprof 0\.1 answers .* twice in regime 'inside'"):
        summarise([*answers, answers[-1]])


def figures(groups: list[list[float]]) -> dict[Question, float]:
    """Figures of the questions of one sample after the other."""
    return {(f"s{n:03}", "t", turn): value
            for n, group in enumerate(groups) for turn, value in enumerate(group)}  # fmt: skip


def test_the_interval_is_that_of_a_loop_over_whole_samples() -> None:
    draw = random.Random(3)
    groups = [[draw.gauss(n % 3, 1) for _ in range(1 + n % 4)] for n in range(17)]
    generator = np.random.default_rng(5)
    means = []
    for _ in range(RESAMPLES):
        times = generator.multinomial(17, [1 / 17] * 17)
        drawn = [v for group, n in zip(groups, times, strict=True) for v in group * n]
        means.append(sum(drawn) / len(drawn))
    pooled = [value for group in groups for value in group]
    low, high = np.percentile(means, [2.5, 97.5])
    found = bootstrap(figures(groups), seed=5)
    assert found == interval(sum(pooled) / len(pooled), low, high, 17)


def test_without_groups_the_interval_is_scipys() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    found = bootstrap(figures([[value] for value in values]))
    other = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    )
    assert found is not None
    width = other.confidence_interval.high - other.confidence_interval.low
    assert found.low == pytest.approx(other.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=0.04 * width)


def test_questions_about_one_context_are_no_further_evidence() -> None:
    values = np.random.default_rng(0).normal(size=30).tolist()
    once, thrice = (bootstrap(figures([[v] * n for v in values])) for n in (1, 3))
    apart = bootstrap(figures([[v] for v in values * 3]))
    assert once is not None
    assert apart is not None
    assert thrice == interval(once.value, once.low, once.high, 30)
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / math.sqrt(3), rel=0.1)


def test_degenerate_data_has_degenerate_intervals() -> None:
    assert bootstrap({}) is None
    assert bootstrap(figures([[1.0, 2.0]])) == BootstrapInterval(1.5, 1.5, 1.5, 1)
    assert bootstrap(figures([[0.1]] * 7)) == interval(0.1, 0.1, 0.1, 7)
    for odd in (math.nan, math.inf):
        found = bootstrap(figures([[1.0], [odd], [-odd]]))
        assert found is not None
        assert found.samples == 3
        assert all(map(math.isnan, (found.value, found.low, found.high)))
        assert not found.excludes_zero


def test_rounding_does_not_put_the_mean_outside() -> None:
    """Sums of a constant over one to three questions round differently."""
    found = bootstrap(figures([[0.45] * questions for questions in (1, 3, 2, 3)]))
    assert found is not None
    assert found.low <= found.value <= found.high


def test_ratios_of_sums() -> None:
    over, under = figures([[2.0], [6.0]]), figures([[1.0], [2.0]])
    assert bootstrap(over, under) == interval(8 / 3, 2.0, 3.0, 2)
    assert bootstrap(over, figures([[1.0], [0.0]])) is None


def test_seeds_draw_anew_and_repeat_themselves() -> None:
    data = figures([[math.sin(n)] for n in range(40)])
    assert bootstrap(data, seed=1) == bootstrap(data, seed=1)
    first, second = bootstrap(data, seed=1), bootstrap(data, seed=2)
    assert first is not None
    assert second is not None
    assert first.value == second.value
    assert first.low != second.low


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.1, 0.3, True), (-0.3, -0.1, True), (-0.1, 0.3, False), (0.0, 0.3, False)],
)
def test_intervals_that_exclude_zero(low: float, high: float, excludes: bool) -> None:
    assert BootstrapInterval((low + high) / 2, low, high, 9).excludes_zero is excludes


def contest() -> list[Answer]:
    """snapkv scores best, quest has the least KL, random is no peer; ours beats all in KL."""
    answers = []
    for n in range(12):
        right = float(n % 2)
        answers += [
            answer(f"s{n}", score=1.0),
            answer(f"s{n}", OURS, 0.75, kl=0.1 + 0.01 * right),
            answer(f"s{n}", "snapkv", right, kl=0.4 + 0.04 * right),
            answer(f"s{n}", "quest", 0.25, kl=0.2 + 0.02 * right),
            answer(f"s{n}", "random", 1.0, kl=0.0),
        ]
    return answers


def test_duels_by_hand() -> None:
    score, kl = duels(contest(), PUBLIC)
    assert (score.regime, score.budget, score.by, score.rival) == (
        "inside",
        "0.1",
        "score",
        "snapkv",
    )
    assert (score.questions, score.ours, score.theirs, score.ratio) == (12, 0.75, 0.5, None)
    assert score.difference.value == pytest.approx(0.25)
    assert not score.difference.excludes_zero
    assert (kl.by, kl.rival, kl.questions) == ("kl", "quest", 12)
    assert (kl.ours, kl.theirs) == (pytest.approx(0.105), pytest.approx(0.21))
    assert kl.difference.value == pytest.approx(0.105)
    assert kl.difference.excludes_zero
    assert kl.ratio == interval(2.0, 2.0, 2.0, 12)


def test_a_lost_duel_is_negative() -> None:
    answers = [replace(a, score=0.0, kl=1.0) if a.method == OURS else a for a in contest()]
    score, kl = duels(answers, PUBLIC)
    assert score.difference.value == pytest.approx(-0.5)
    assert score.difference.high < 0
    assert kl.difference.value == pytest.approx(-0.79)
    assert kl.ratio is not None
    assert kl.ratio.value == pytest.approx(0.21)


def test_duels_are_fought_on_common_questions() -> None:
    """Where snapkv answered, ours is right too: that it left out its hard ones gives no credit."""
    answers = [
        replace(a, score=float(a.sample in ("s1", "s3"))) if a.method == OURS else a
        for a in contest()
        if a.method not in ("snapkv", "quest") or a.sample in ("s1", "s3", "s4")
    ]
    score, _ = duels(answers, PUBLIC)
    assert (score.questions, score.ours, score.theirs) == (3, pytest.approx(2 / 3), score.ours)
    assert score.difference == BootstrapInterval(0.0, 0.0, 0.0, 3)


def test_duels_by_regime_and_budget() -> None:
    answers = contest()
    answers += [replace(a, regime="after") for a in answers]
    answers += [replace(a, budget="0.2") for a in answers if a.method not in (FULL, "quest")]
    found = duels(answers, PUBLIC)
    assert [(d.regime, d.budget, d.by, d.rival) for d in found] == [
        (regime, budget, by, rival)
        for budget in ("0.1", "0.2") for regime in ("inside", "after")
        for by, rival in (("score", "snapkv"), ("kl", "snapkv" if budget == "0.2" else "quest"))
    ]  # fmt: skip
    assert duels(answers, set()) == []


def test_a_rival_out_of_bounds_is_not_the_best_but_ours_is_not_hidden() -> None:
    odd = [replace(a, kl=math.nan) if a.method == "quest" else a for a in contest()]
    assert duels(odd, PUBLIC)[1].rival == "snapkv"
    odd = [replace(a, kl=math.inf) if a.method == OURS else a for a in contest()]
    lost = duels(odd, PUBLIC)[1]
    assert math.isnan(lost.difference.value)
    assert lost.to_json()["ours"] is None


def test_json_is_json() -> None:
    answers = [replace(a, kl=math.nan) if a.method == "quest" else a for a in contest()]
    records: list[MethodSummary | Duel] = [*summarise(answers), *duels(answers, PUBLIC)]
    for record in records:
        data = record.to_json()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
    by_name = {s.method: s.to_json() for s in summarise(answers)}
    assert by_name["quest"]["kl"] == {"value": None, "low": None, "high": None, "samples": 12}
    assert by_name["snapkv"]["tasks"] == {"ocr": {"score": 0.5, "answers": 12, "metrics": ["anls"]}}
    assert duels(answers, PUBLIC)[0].to_json()["excludes_zero"] is False


def test_public_baselines_are_ranked_by_score_then_kl() -> None:
    assert ranking(summarise(contest()), {*PUBLIC, "absent"}) == ["snapkv", "quest"]
    unscored = [replace(a, score=None) for a in contest()]
    assert ranking(summarise(unscored), PUBLIC) == ["quest", "snapkv"]


groups_of_figures = st.lists(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4), min_size=1, max_size=12
)


@given(groups_of_figures)
def test_the_interval_holds_its_mean_and_lies_within_the_data(groups: list[list[float]]) -> None:
    found = bootstrap(figures(groups))
    values = [value for group in groups for value in group]
    assert found is not None
    assert found.low <= found.value <= found.high
    assert min(values) - 1e-9 <= found.low
    assert found.high <= max(values) + 1e-9
    assert found.value == pytest.approx(math.fsum(values) / len(values), abs=1e-9)


@given(groups_of_figures, st.integers(-8, 8), st.integers(-4, 4))
def test_intervals_move_and_stretch_with_the_data(
    groups: list[list[float]], shift: int, power: int
) -> None:
    plain = bootstrap(figures(groups))
    moved = bootstrap(figures([[shift + 2.0**power * v for v in group] for group in groups]))
    assert plain is not None
    assert moved is not None
    for one, other in ((plain.low, moved.low), (plain.high, moved.high)):
        assert other == pytest.approx(shift + 2.0**power * one, abs=1e-6)


many_answers = st.lists(
    st.tuples(
        st.sampled_from([FULL, OURS, "snapkv", "quest"]), st.sampled_from("abcd"),
        st.integers(0, 2), st.sampled_from(["ocr", "count"]),
        st.none() | st.floats(0, 1), st.floats(0, 5),
    ),
    max_size=40, unique_by=lambda row: row[:4],
)  # fmt: skip


@settings(deadline=None)
@given(many_answers, st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_no_figure(
    rows: list[tuple[str, str, int, str, float | None, float]], shuffle: random.Random
) -> None:
    answers = [answer("z"), *(
        answer(sample, method, score, turn=turn, task=task, kl=kl)
        for method, sample, turn, task, score, kl in rows
    )]  # fmt: skip
    other = answers.copy()
    shuffle.shuffle(other)

    def key(record: MethodSummary | Duel) -> str:
        return record.method if isinstance(record, MethodSummary) else record.by

    assert sorted(summarise(answers), key=key) == sorted(summarise(other), key=key)
    assert sorted(duels(answers, PUBLIC), key=key) == sorted(duels(other, PUBLIC), key=key)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=10))
def test_differences_are_paired(rows: list[tuple[float, float]]) -> None:
    """However much questions differ in difficulty, a loss that is the same for all is certain."""
    answers = [answer(f"s{n}", score=0.5 + hard) for n, (hard, _) in enumerate(rows)]
    answers += [answer(f"s{n}", OURS, 0.25 + hard) for n, (hard, _) in enumerate(rows)]
    assert only(answers).difference == interval(-0.25, -0.25, -0.25, len(rows))
    answers += [answer(f"s{n}", "quest", noise) for n, (_, noise) in enumerate(rows)]
    gaps = [noise - hard - 0.5 for hard, noise in rows]
    found = only(answers, "quest").difference
    expected = bootstrap(figures([[gap] for gap in gaps]))
    assert found is not None
    assert expected is not None
    assert found == interval(expected.value, expected.low, expected.high, len(rows))
