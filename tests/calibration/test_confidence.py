"""How sure a profile is: what rows by construction give."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hkvprof.calibration import confidence
from hkvprof.calibration import decide as classify
from hkvprof.calibration.confidence import wilson
from hkvprof.heads import HeadGrid, HeadType
from hkvprof.profile.confidence import MEASURES, Confidence
from hkvprof.profile.planning import plan_anew
from tests.calibration.made_rows import (
    CONDITIONS,
    GRID,
    RECIPE,
    SHAPE,
    TYPES,
    D,
    S,
    assess,
    evidence_of,
    make_row,
    make_rows,
    values,
)
from tests.profiles import fingerprint

ONE = dict.fromkeys(MEASURES, 1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many resamples as the least."""
    monkeypatch.setattr(confidence, "MOST_RESAMPLES", confidence.LEAST_RESAMPLES)


# -- heads ----------------------------------------------------------------------------------------


def test_single_samples_are_planned_with_the_scales_of_the_whole() -> None:
    rows = make_rows({"a": 5, "b": 4}, noise=1.0)
    evidence = evidence_of(rows)
    whole = evidence.judge(evidence.everything)
    ratios = evidence.ratios
    same = np.zeros(SHAPE)
    for row in rows:
        alone = classify.Curves(*row.losses.astype(np.float64))
        loss = classify.planning_loss(alone, ratios, whole.scales)
        chosen = plan_anew(evidence.menu, loss, ratios, RECIPE.budget)
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
    whole = evidence.judge(evidence.everything)
    static = np.stack([row.sparsity[2] >= RECIPE.theta for row in rows])
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


def test_tasks_are_told_apart_by_their_whole_names() -> None:
    strata = confidence._strata(evidence_of(make_rows({"a": 2, "a\0": 3, "": 1})))
    assert [part.tolist() for part in strata] == [[5], [0, 1], [2, 3, 4]]


def test_large_models_get_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confidence, "MOST_RESAMPLES", 100)
    found = []
    for layers in (3, 28, 80):
        grid = HeadGrid(layers=layers, query_heads=8, kv_heads=8, head_dim=8)
        conditions = replace(CONDITIONS, fingerprint=fingerprint(grid))
        evidence = replace(evidence_of(make_rows({"a": 4})), conditions=conditions)
        found.append(confidence._affordable(evidence, 4))
    assert found == [100, 50, 20]
