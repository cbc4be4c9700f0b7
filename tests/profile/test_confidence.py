"""How sure a profile is: the measures by their definitions, and what rows by construction give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from hkvprof.errors import ProfileError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.policy.budget import INFEASIBLE
from hkvprof.policy.planning import plan_anew
from hkvprof.profile import classify, confidence
from hkvprof.profile.agreement import cohen_kappa, jaccard, same_share, spearman, wilson
from hkvprof.profile.conditions import Conditions
from hkvprof.profile.confidence_record import MEASURES, Comparison, Confidence
from hkvprof.profile.evidence import Decision, Evidence
from hkvprof.profile.merge import build_profile
from hkvprof.profile.probe import KAPPAS, RATIOS
from hkvprof.profile.rows import SampleRow
from tests.profiles import fingerprint

S, D = HeadType.STATIC, HeadType.DYNAMIC
GRID = HeadGrid(layers=3, query_heads=8, kv_heads=4, head_dim=64)
SHAPE = (GRID.layers, GRID.kv_heads)
CONDITIONS = Conditions(
    fingerprint=fingerprint(GRID),
    recipe="measured",
    strategies=(Strategy(S, pool=1), Strategy(D, index="mean", chunk=64)),
    keep=KeepRule(2, 4, 8),
    kappas=KAPPAS,
    ratios=RATIOS,
    replies="given",
    dtype="bfloat16",
    versions=(("hkvprof", "0"),),
)
DECISION = Decision(budget=0.3)
EVEN = np.arange(GRID.total).reshape(SHAPE) % 2 == 0
TYPES = np.where(EVEN, S, D).astype(np.uint8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many resamples as the least."""
    monkeypatch.setattr(confidence, "MOST_RESAMPLES", confidence.LEAST_RESAMPLES)


def make_row(
    number: int,
    task: str,
    types: NDArray[np.uint8],
    noise: float = 0.0,
    vision: int = 7,
    seed: int = 0,
) -> SampleRow:
    """A sample that loses a third with the strategy of the wanted type, and is as sparse as it."""
    random = np.random.RandomState(1000 * seed + number)
    level = np.linspace(1.0, 1.3, GRID.total).reshape(SHAPE)
    factor = np.stack([np.where(types == S, 1.0, 9.0), np.where(types == D, 1.0, 9.0)])
    spread = np.exp(noise * random.randn(3, 2, *SHAPE, 1))
    losses = (level * factor)[None, ..., None] * spread * (1 - np.array(RATIOS)) ** 16
    sparsity = np.where(types == S, 0.97, 0.8).repeat(GRID.group, axis=1)
    sparsity = np.clip(sparsity + 0.1 * noise * random.randn(len(KAPPAS), *sparsity.shape), 0, 1)
    return SampleRow(
        id=f"s{number:03}",
        task=task,
        tokens=2000 + number,
        sparsity=np.broadcast_to(sparsity, (len(KAPPAS), *sparsity.shape[-2:])).astype(np.float32),
        losses=losses.astype(np.float32),
        vision_tokens=vision,
    )


def make_rows(counts: dict[str, int], noise: float = 0.0, seed: int = 0) -> list[SampleRow]:
    """Samples of several tasks that all want TYPES, but for noise."""
    tasks = [task for task, count in counts.items() for _ in range(count)]
    return [make_row(i, task, TYPES, noise, seed=seed) for i, task in enumerate(tasks)]


def evidence_of(rows: Sequence[SampleRow], recipe: str = "measured") -> Evidence:
    return Evidence.of(replace(CONDITIONS, recipe=recipe), rows, DECISION)


def assess(rows: Sequence[SampleRow], recipe: str = "measured") -> Confidence:
    evidence = evidence_of(rows, recipe)
    return confidence.assess(evidence, evidence.plan(evidence.everything))


def values(found: Comparison) -> dict[str, float]:
    return {name: interval.value for name, interval in found.figures.items()}


ONE = dict.fromkeys(MEASURES, 1.0)

# -- measures -------------------------------------------------------------------------------------


def test_wilson_intervals_are_those_of_scipy() -> None:
    for total in (1, 2, 3, 10, 61, 263):
        for count in range(total + 1):
            expected = stats.binomtest(count, total).proportion_ci(method="wilson")
            assert wilson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


@given(st.integers(1, 500), st.data())
def test_wilson_intervals_hold_the_share_and_mirror(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = wilson(count, total)
    assert 0 <= low <= count / total <= high <= 1
    assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low))


def test_kappa_and_jaccard_worked_out_by_hand() -> None:
    first, second = np.array([S, S, D, D]), np.array([S, D, D, D])
    assert same_share(first, second) == 0.75
    assert cohen_kappa(first, second) == pytest.approx(0.5)  # (3/4 - 1/2) / (1 - 1/2)
    assert jaccard(first, second) == 0.5
    assert cohen_kappa(first, 1 - first) == -1
    assert jaccard(first, 1 - first) == 0
    # Cohen 1960, table 1, cut to two categories: 25 + 15 of 50 equal; 0.5 and 0.6 "yes".
    yes = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [20, 5, 10, 15], axis=0)
    assert cohen_kappa(yes[:, 0], yes[:, 1]) == pytest.approx(0.4)


PAIRS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2)
)


@given(PAIRS)
def test_kappa_and_jaccard_by_counting(pair: tuple[list[int], list[int]]) -> None:
    first, second = map(np.array, pair)
    table = [[sum((a, b) == (i, j) for a, b in zip(*pair, strict=True)) for j in (0, 1)]
             for i in (0, 1)]  # fmt: skip
    n = len(first)
    rows, columns = [sum(row) for row in table], [sum(row[j] for row in table) for j in (0, 1)]
    expected = sum(rows[i] * columns[i] for i in (0, 1)) / n**2
    if expected < 1:
        observed = (table[0][0] + table[1][1]) / n
        assert cohen_kappa(first, second) == pytest.approx((observed - expected) / (1 - expected))
    else:
        assert cohen_kappa(first, second) == 1
    sets = [{i for i, kind in enumerate(kinds) if kind == S} for kinds in pair]
    union = sets[0] | sets[1]
    assert jaccard(first, second) == (len(sets[0] & sets[1]) / len(union) if union else 1)
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa(second, first))


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(-5, 5), min_size=n, max_size=n)] * 2)
    )
)
def test_spearman_is_that_of_scipy(pair: tuple[list[int], list[int]]) -> None:
    first, second = map(np.array, pair)
    assume(len(set(pair[0])) > 1)
    assume(len(set(pair[1])) > 1)
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0], abs=1e-12)


def test_spearman_without_spread_is_defined() -> None:
    flat, rising = np.full(4, 2.0), np.arange(4.0)
    assert spearman(flat, flat + 1) == 1
    assert spearman(flat, rising) == spearman(rising, flat) == 0
    assert spearman(rising[:1], rising[:1]) == 1


# -- evidence -------------------------------------------------------------------------------------


def some_fit_not(seed: int) -> list[SampleRow]:
    random = np.random.RandomState(seed)
    rows = make_rows({"a": 3, "b": 4}, noise=0.5)
    for row in rows:
        row.losses[:, 1][:, random.rand(*SHAPE, len(RATIOS)) < 0.4] = INFEASIBLE
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_counts_weigh_as_repeated_rows_do(seed: int) -> None:
    """Against means written down plainly; of everything, to the bit."""
    rows = some_fit_not(seed)
    evidence = evidence_of(rows, "paper")
    for counts in (evidence.everything, np.array([2, 0, 1, 3, 0, 0, 1])):
        repeated = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        losses = np.stack([row.losses for row in repeated]).astype(np.float64)
        fits = losses[:, :1] < INFEASIBLE
        number = fits.sum(axis=0)
        mean = np.where(fits, losses, 0).sum(axis=0) / np.maximum(number, 1)
        mean = np.where(number * 2 > len(repeated), mean, float(INFEASIBLE))
        curves = evidence.curves(counts)
        found = np.array([curves.output, curves.square, curves.reply])
        assert (found >= INFEASIBLE).any()
        np.testing.assert_allclose(found, mean, rtol=1e-12)
        assert np.array_equal(found, mean) or counts.max() > 1
        sparsity = np.stack([row.sparsity[2] for row in repeated]).astype(np.float64)
        expected = [sparsity.mean(axis=0), sparsity.std(axis=0)]
        np.testing.assert_allclose(evidence.moments(counts), expected, rtol=1e-5)


def test_the_whole_is_the_profile() -> None:
    rows = make_rows({"a": 4, "b": 4}, noise=0.7)
    for recipe in ("measured", "paper"):
        conditions = replace(CONDITIONS, recipe=recipe)
        profile = build_profile(conditions, rows, None, DECISION)
        evidence = evidence_of(rows, recipe)
        plan = evidence.plan(evidence.everything)
        assert np.array_equal(plan.types, profile.head_types)
        assert np.array_equal(plan.chosen.ratio, profile.budget)
        mean, std = evidence.moments(evidence.everything)
        assert np.array_equal(mean, profile.sparsity_mean[2])
        assert np.array_equal(std, profile.sparsity_std[2])
        recorded = profile.provenance["confidence"]
        assert recorded == assess(rows, recipe).to_json()


# -- heads ----------------------------------------------------------------------------------------


def test_single_samples_are_planned_with_the_scales_of_the_whole() -> None:
    rows = make_rows({"a": 5, "b": 4}, noise=1.0)
    evidence = evidence_of(rows)
    whole = evidence.plan(evidence.everything)
    ratios = evidence.ratios
    same = np.zeros(SHAPE)
    for row in rows:
        alone = classify.Curves(*row.losses.astype(np.float64))
        loss = classify.planning_loss(alone, ratios, classify.loss_scales(whole.curves, ratios))
        chosen = plan_anew(evidence.menu, loss, ratios, DECISION.budget)
        same += chosen.strategy == whole.chosen.strategy  # strategy 0 is static, 1 dynamic
    found = assess(rows)
    np.testing.assert_allclose(found.agree, same / len(rows), atol=1e-4)
    assert 0 < found.flip_rate < 1
    assert found.flip_rate == pytest.approx(1 - np.mean(found.agree), abs=1e-4)
    for layer, head in np.ndindex(*SHAPE):
        ends = wilson(int(same[layer, head]), len(rows))
        assert (found.low[layer][head], found.high[layer][head]) == pytest.approx(ends, abs=1e-4)


def test_paper_samples_are_judged_by_theta_alone() -> None:
    rows = make_rows({"a": 6}, noise=1.0)
    evidence = evidence_of(rows, "paper")
    whole = evidence.plan(evidence.everything)
    static = np.stack([row.sparsity[2] >= DECISION.theta for row in rows])
    static = static.reshape(len(rows), *SHAPE, GRID.group).all(axis=-1)
    expected = (static == (whole.types == S)).mean(axis=0)
    np.testing.assert_allclose(assess(rows, "paper").agree, expected, atol=1e-4)


def test_the_least_sure_heads_come_first() -> None:
    agree = ((1.0, 0.5), (0.25, 1.0), (0.5, 0.75))
    found = Confidence(4, "", agree, agree, agree)
    assert found.least_sure(3) == [(1, 0), (0, 1), (2, 0)]
    assert found.least_sure(9)[-1] == (2, 1)
    assert found.flips[1] == (0.75, 0.0)


# -- profiles of different samples ----------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_identical_samples_agree_wholly(recipe: str) -> None:
    rows = make_rows({"a": 4, "b": 3, "c": 2})
    rows = [replace(row, vision_tokens=i % 2) for i, row in enumerate(rows)]
    found = assess(rows, recipe)
    assert np.array_equal(found.agree, np.ones(SHAPE))
    assert found.flip_rate == 0
    assert found.least_sure(5) == []
    for comparison in (found.halves, found.tasks, found.kinds):
        assert values(comparison) == ONE
        assert all(f.low == f.high == 1 for f in comparison.figures.values())
    assert found.by_task == dict.fromkeys("abc", ONE)


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_tasks_that_disagree_are_reported(recipe: str) -> None:
    """Types turned round in the second half of the heads, for one task of three."""
    turned = TYPES.copy()
    turned[1:] = np.where(turned[1:] == S, D, S)
    rows = [
        make_row(i, "odd" if i >= 8 else "ab"[i % 2], turned if i >= 8 else TYPES, noise=0.02)
        for i in range(12)
    ]
    found = assess(rows, recipe)
    assert found.worst_task == "odd"
    assert found.by_task["odd"]["types"] == pytest.approx(1 / 3, abs=1e-4)
    assert found.by_task["odd"]["kappa"] == pytest.approx(-1 / 3, abs=1e-4)
    assert found.by_task["odd"]["jaccard"] == pytest.approx(2 / 10, abs=1e-4)
    assert values(found.halves)["types"] > values(found.tasks)["types"]
    np.testing.assert_allclose(np.array(found.agree)[0], 1)
    # 8 of 12 samples want TYPES; in a paper profile the spread makes those heads dynamic.
    assert set(np.array(found.agree)[1:].ravel()) <= {0.6667, 0.3333}


def test_two_tasks_that_want_the_opposite() -> None:
    rows = [
        make_row(i, "ab"[i % 2], TYPES if i % 2 else np.where(TYPES == S, D, S), noise=0.02)
        for i in range(8)
    ]
    found = assess(rows)
    assert values(found.tasks)["types"] == 0
    assert values(found.tasks)["kappa"] == -1
    assert found.tasks.repeats == 2
    assert values(found.halves)["types"] > 0  # halves see both tasks


def test_kinds_of_prompts_are_compared() -> None:
    opposite = np.where(TYPES == S, D, S).astype(np.uint8)
    rows = [
        make_row(i, "t", opposite if i < 4 else TYPES, noise=0.02, vision=0 if i < 4 else 9)
        for i in range(10)
    ]
    found = assess(rows)
    assert values(found.kinds)["types"] == 0
    assert found.kinds.resamples > 0
    for vision, says in ((0, "every prompt is text alone"), (3, "holds images or video")):
        only = [replace(row, vision_tokens=vision) for row in rows]
        assert says in assess(only).kinds.reason
    single = [replace(row, vision_tokens=int(i > 0)) for i, row in enumerate(rows)]
    assert "at least two of each" in assess(single).kinds.reason


@pytest.mark.parametrize("recipe", ["measured", "paper"])
@pytest.mark.parametrize("kind", [S, D])
def test_heads_all_of_one_type_give_defined_figures(recipe: str, kind: HeadType) -> None:
    types = np.full(SHAPE, kind, dtype=np.uint8)
    rows = [make_row(i, "ab"[i % 2], types, vision=i % 2) for i in range(6)]
    found = assess(rows, recipe)
    assert values(found.halves)["types"] == values(found.halves)["kappa"] == 1
    assert values(found.tasks)["jaccard"] == values(found.kinds)["jaccard"] == 1


def test_one_task_and_single_samples_are_not_compared() -> None:
    assert assess(make_rows({"a": 6})).tasks.reason == "all samples are of one task (a)"
    lonely = assess(make_rows({"a": 1, "b": 1, "c": 1, "d": 1}))
    assert "no task has two samples" in lonely.tasks.reason
    assert lonely.by_task == {}
    assert lonely.worst_task == ""
    assert lonely.halves.figures
    assert set(assess(make_rows({"a": 1, "b": 4, "c": 2})).by_task) == {"b", "c"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_samples_give_a_reason(count: int) -> None:
    found = assess(make_rows({"a": count}))
    assert found.reason == f"too few samples: {count}, expected at least 4"
    assert found.to_json() == {"samples": count, "reason": found.reason}
    assert Confidence.from_json(found.to_json(), SHAPE) == found
    assert found.flip_rate == 0


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    noise=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    recipe=st.sampled_from(["measured", "paper"]),
    data=st.data(),
)
def test_any_rows_in_any_order_give_one_sound_record(
    seed: int, counts: list[int], noise: float, recipe: str, data: st.DataObject
) -> None:
    rows = make_rows({f"t{i}": n for i, n in enumerate(counts)}, noise, seed)
    found = assess(rows, recipe)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Confidence.from_json(json.loads(text), SHAPE) == found
    for comparison in (found.halves, found.tasks, found.kinds):
        for interval in comparison.figures.values():
            assert interval.low <= interval.value <= interval.high
    shuffled = data.draw(st.permutations(rows))
    assert json.dumps(assess(shuffled, recipe).to_json()) == text


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_heads_may_stand_in_any_order(recipe: str) -> None:
    rows = make_rows({"a": 5, "b": 4}, noise=1.0)
    layers, heads = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
    queries = (heads[:, None] * GRID.group + np.arange(GRID.group)).ravel()
    moved = [
        replace(
            row,
            losses=row.losses[:, :, layers][:, :, :, heads],
            sparsity=row.sparsity[:, layers][:, :, queries],
        )
        for row in rows
    ]
    first, second = assess(rows, recipe), assess(moved, recipe)
    assert np.array_equal(np.array(first.agree)[layers][:, heads], second.agree)
    for ours, theirs in ((first.halves, second.halves), (first.tasks, second.tasks)):
        for name, figure in ours.figures.items():
            other = theirs.figures[name]
            expected = (figure.value, figure.low, figure.high)
            assert (other.value, other.low, other.high) == pytest.approx(expected, abs=2e-4)


def test_more_samples_make_halves_agree_more() -> None:
    few, many = (assess(make_rows({"a": n, "b": n}, noise=1.5)) for n in (3, 30))
    assert values(many.halves)["types"] > values(few.halves)["types"]
    assert values(many.halves)["jaccard"] > values(few.halves)["jaccard"]


# -- resampling -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 99))
def test_halves_are_disjoint_and_even_in_every_task(counts: list[int], seed: int) -> None:
    ends = np.cumsum([0, *counts])
    strata = [np.arange(a, b) for a, b in pairwise(ends)]
    assume(ends[-1] > 1)
    first, second = confidence._halve(np.random.RandomState(seed), strata, int(ends[-1]))
    assert np.array_equal(first + second, np.ones(ends[-1]))
    assert abs(int(first.sum() - second.sum())) <= 1
    assert all(abs(int(first[s].sum() - second[s].sum())) <= 1 for s in strata)


def test_resamples_draw_whole_tasks_and_then_samples() -> None:
    strata = [np.arange(3), np.arange(3, 5), np.arange(5, 10)]
    drawn = list(
        confidence._resamples(
            np.random.RandomState(0), strata, 50, lambda tasks, parts: len(set(tasks.tolist())) > 1
        )
    )
    assert len(drawn) == 50
    for tasks, parts in drawn:
        assert len(set(tasks.tolist())) > 1
        for task, part in zip(tasks, parts, strict=True):
            assert len(part) == len(strata[task])
            assert set(part) <= set(strata[task])


def test_large_models_get_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confidence, "MOST_RESAMPLES", 100)
    found = []
    for layers in (3, 28, 80):
        grid = HeadGrid(layers=layers, query_heads=8, kv_heads=8, head_dim=8)
        conditions = replace(CONDITIONS, fingerprint=fingerprint(grid))
        evidence = replace(evidence_of(make_rows({"a": 4})), conditions=conditions)
        found.append(confidence._affordable(evidence, 4))
    assert found == [100, 50, 20]


# -- the record -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return assess(make_rows({"a": 3, "b": 3}, noise=1.0)).to_json()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), []), (("samples",), -1), (("samples",), True), (("heads",), None),
        (("heads", "agree"), [[1.0]]), (("heads", "low", 0), "x"), (("heads", "high", 0, 0), 1.5),
        (("heads", "high", 0, 0), float("nan")), (("halves",), None), (("halves", "kappa"), [1, 2]),
        (("halves", "kappa", 0), -2), (("halves", "types", 1), 2), (("halves", "repeats"), 1.5),
        (("halves", "types"), [0.5, 0.6, 0.7]), (("tasks", "resamples"), "many"),
        (("by_task",), []), (("by_task", "a"), 1), (("by_task", "a", "types"), "x"),
        (("kinds",), {"reason": 1}), (("kinds",), {"reason": ""}), (("reason",), None),
    ],
)  # fmt: skip
def test_records_that_are_not_sound_are_refused(
    record: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    assert Confidence.from_json(record, SHAPE).to_json() == record
    if path:
        damaged = json.loads(json.dumps(record))
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    else:
        damaged = value
    with pytest.raises(ProfileError, match=r"expected .* found .* again"):
        Confidence.from_json(damaged, SHAPE)


def test_a_record_of_another_grid_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="expected 3 lists of 5 numbers"):
        Confidence.from_json(record, (3, 5))
