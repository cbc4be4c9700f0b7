"""Rows of a comparison, and profiles planned with one type of strategies alone."""

from dataclasses import replace

import numpy as np
import pytest

from hkvprof.bench.methods import Kind, Method, check_budgets, methods, only, reason_not, variants
from hkvprof.errors import BudgetError, HkvError, ProfileError, UsageError
from hkvprof.heads import HeadType
from tests.profiles import make_profile, plain_profile

TOKENS = 4096


@pytest.mark.parametrize("head_type", list(HeadType))
@pytest.mark.parametrize("share", [0.15, 0.2, 0.5])
def test_plans_of_one_type_hold_no_other(head_type: HeadType, share: float) -> None:
    profile = make_profile()
    alone = only(profile, head_type)
    plan = alone.allocation(share, TOKENS)
    chosen = {profile.strategies[number].head_type for number in plan.strategy.flat}
    assert chosen == {head_type}
    assert float(plan.ratio.mean()) <= share + 1e-6
    assert set(alone.head_types.flat) == {head_type}
    assert alone.fingerprint == profile.fingerprint


def test_the_plan_with_all_types_is_at_least_as_good() -> None:
    profile = replace(make_profile(), static_margin=None)
    best = profile.allocation(0.2, TOKENS).expected_loss
    for head_type in HeadType:
        assert only(profile, head_type).allocation(0.2, TOKENS).expected_loss >= best


def test_a_type_that_is_not_in_the_menu_is_refused_by_name() -> None:
    plain = plain_profile(make_profile())
    static = replace(
        plain,
        strategies=plain.strategies[:2],
        strategy=np.minimum(plain.strategy, 1),
        loss=plain.loss[:, :2].copy(),
        output_error=plain.output_error[:, :2].copy(),
    )
    with pytest.raises(ProfileError, match=r"no dynamic strategy .its menu: static-pool31"):
        variants(static, ["dynamic"])
    assert list(variants(static)) == [Kind.STATIC, Kind.PROFILE]


@pytest.mark.parametrize("recipe", ["paper", "uniform"])
def test_fixed_types_show_the_profile_alone(recipe: str) -> None:
    profile = make_profile(recipe)
    assert variants(profile) == {Kind.PROFILE: profile}
    with pytest.raises(UsageError, match=f"the types of a {recipe} profile are fixed"):
        variants(profile, ["static"])


def test_variants_can_be_chosen() -> None:
    profile = make_profile()
    assert list(variants(profile)) == [Kind.STATIC, Kind.DYNAMIC, Kind.PROFILE]
    assert list(variants(profile, ["profile", "static"])) == [Kind.STATIC, Kind.PROFILE]
    with pytest.raises(UsageError, match="unknown method 'sparse'"):
        variants(profile, ["sparse"])


def test_rows_are_dense_first_and_then_by_budget() -> None:
    profile = make_profile()
    rows = methods({Kind.PROFILE: profile}, ["0.2", "4096"])
    assert [m.name for m in rows] == [
        "dense", "dense, preallocated", "profile, 0.2", "profile, 4096",
    ]  # fmt: skip
    assert len(methods({Kind.PROFILE: profile}, ["0.2"], preallocated=False)) == 2


@pytest.mark.parametrize(
    ("budgets", "words"),
    [(["1.0"], "compresses nothing"), (["0.1", "100%"], "compresses nothing"), (["1.5"], "1.5"),
     (["0.1", "10%"], "a budget twice"), ([], "no budget"), (["much"], "not understood")],
)  # fmt: skip
def test_bad_budgets(budgets: list[str], words: str) -> None:
    with pytest.raises(HkvError, match=words):
        check_budgets(budgets)


def test_reasons_not_to_run() -> None:
    profile = make_profile()
    assert reason_not(Method(Kind.DENSE), 8, 2, 1) == ""
    assert reason_not(Method(Kind.PROFILE, "0.1", profile), TOKENS, 2, 1) == ""
    assert "too small" in reason_not(Method(Kind.PROFILE, "0.1", profile), 64, 2, 1)
    assert "holds a prompt of 64" in reason_not(Method(Kind.PROFILE, "4096", profile), 64, 2, 1)
    with pytest.raises(BudgetError):
        profile.allocation("0.1", 64)
