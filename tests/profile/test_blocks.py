"""Plans for engines with blocks: within the budget, equal pages, a function of the length alone."""

from __future__ import annotations

import pickle
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import BudgetError
from hkvprof.heads import EXACT_BITS, HeadGrid, HeadType, Strategy
from hkvprof.profile.blocks import MIN_TOKENS, MOST_GROUPS, SLACK, BlockPlan, plan_blocks
from hkvprof.profile.record import Profile
from tests.engines.curves import random_profile

GRIDS = st.builds(
    lambda layers, kv, group: HeadGrid(layers, kv * group, kv, 32),
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 2),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    grid=GRIDS, seed=st.integers(0, 999), share=st.floats(0.05, 1.0),
    size=st.sampled_from([16, 32, 128]), tokens=st.integers(1, 20_000),
)  # fmt: skip
def test_a_plan_keeps_within_its_budget_in_whole_blocks(
    grid: HeadGrid, seed: int, share: float, size: int, tokens: int
) -> None:
    plan = plan_blocks(random_profile(grid, seed), share, size)
    each = np.bincount(plan.group.reshape(-1))
    assert len(each) == plan.groups <= MOST_GROUPS
    assert (each == grid.total // plan.groups).all()
    for number in np.unique(plan.strategy):
        strategy = plan.strategies[number]
        assert strategy.head_type is HeadType.STATIC
        assert strategy.resident_bits == EXACT_BITS
    made = plan.at(tokens)
    for dropped, kept in zip(made.dropped, made.kept_tokens, strict=True):
        assert 0 <= dropped <= tokens // size
        assert kept == tokens - dropped * size
    if made.dense_reason:
        assert not any(made.dropped)
        assert made.share == 1
    else:
        assert made.kept_bytes <= share * made.dense_bytes + 1
        assert min(made.kept_tokens) >= plan.keep.floor_tokens
        # What rounding leaves over is less than one block of one group.
        room = share * made.dense_bytes - made.kept_bytes
        assert room < size * grid.token_bytes(2) / plan.groups + grid.token_bytes(2)


def test_what_is_kept_is_what_the_heads_of_the_groups_hold() -> None:
    grid = HeadGrid(4, 8, 4, 32)
    made = (plan := plan_blocks(random_profile(grid, 3), 0.2, 16)).at(3000)
    by_head = np.array(made.kept_tokens)[plan.group]
    assert by_head.sum() * 2 * grid.head_dim * 2 == made.kept_bytes
    assert made.dense_bytes == 3000 * grid.token_bytes(2)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), share=st.floats(0.03, 1.0), tokens=st.integers(1, 5000))
def test_a_share_of_its_own_is_kept_within_by_the_same_groups(
    seed: int, share: float, tokens: int
) -> None:
    plan = plan_blocks(random_profile(HeadGrid(4, 4, 2, 32), seed), 0.2, 32)
    made = plan.at(tokens, share=share)
    assert len(made.dropped) == plan.groups
    assert made.dense_reason or made.kept_bytes <= share * made.dense_bytes + 1
    assert made.frees == any(made.dropped)
    assert plan.at(tokens, share=0.2) == plan.at(tokens)
    assert not plan.at(tokens, share=1.0).frees


def with_menu(profile: Profile, *first: Strategy) -> Profile:
    """With other first strategies, though it lacks the tensors that these may need."""
    made = copy(profile)
    object.__setattr__(made, "strategies", (*first, *profile.strategies[len(first) :]))
    return made


def test_strategies_that_the_engine_cannot_follow_are_never_chosen() -> None:
    profile = random_profile(HeadGrid(4, 4, 2, 32), 2)
    for other in ({"score": "calibrated"}, {"text_prior": 0.5}, {"resident_bits": 8}):
        strategies = (profile.strategies[0], replace(profile.strategies[1], **other))
        menu = with_menu(profile, *strategies)
        plan = plan_blocks(menu, 0.2, 32)
        assert (plan.strategy == 0).all()
        none = with_menu(profile, strategies[1], strategies[1])
        with pytest.raises(BudgetError, match="scored by the window"):
            plan_blocks(none, 0.2, 32)
    assert (plan_blocks(profile, 0.2, 32).strategy == 1).any()


def test_short_prompts_and_whole_budgets_stay_dense_with_a_reason() -> None:
    profile = random_profile(HeadGrid(2, 4, 2, 32), 1)
    assert "shorter than" in plan_blocks(profile, 0.2, 16).at(MIN_TOKENS - 1).dense_reason
    assert plan_blocks(profile, 1.0, 16).at(5000).dense_reason == "the budget is 1.0"
    assert plan_blocks(profile, 1.0, 16).groups == 1
    # 2% of 300 tokens are 6: not even sinks and recent tokens.
    assert "do not hold" in plan_blocks(profile, 0.02, 16).at(300).dense_reason


def test_groups_lose_little_more_than_the_finest_and_less_than_one_class() -> None:
    profile = random_profile(HeadGrid(6, 4, 4, 32), 5)
    plan = plan_blocks(profile, 0.1, 16)
    loss = {n: _loss_with(plan, profile.loss, n) for n in (1, plan.groups, 12)}
    assert loss[plan.groups] < loss[1]
    assert loss[plan.groups] <= (1 + 2 * SLACK) * loss[12]


def _loss_with(plan: BlockPlan, loss: np.ndarray, groups: int) -> float:
    """The loss at the longest length where as many groups are cut from the same order of heads."""
    own = np.take_along_axis(loss, plan.strategy[None, None, :, :, None], axis=1)[:, 0]
    flat = own.reshape(len(loss), plan.grid.total, -1)
    ratio = np.argsort(np.argsort(-flat[-1, :, 0], kind="stable"), kind="stable")
    number = plan.group.reshape(-1) if groups == plan.groups else ratio * groups // plan.grid.total
    curves = np.stack([flat[:, number == g].sum(axis=1) for g in range(groups)], axis=1)
    cut = replace(plan, group=number.reshape(plan.group.shape), curves=curves.astype(np.float32))
    return cut.at(2048).expected_loss


def test_plans_are_equal_by_content_also_after_travelling_to_another_process() -> None:
    profile = random_profile(HeadGrid(3, 4, 2, 32), 2)
    plan = plan_blocks(profile, 0.2, 16)
    travelled = pickle.loads(pickle.dumps(plan))
    assert travelled == plan
    assert hash(travelled) == hash(plan)
    assert travelled.at(4000) == plan.at(4000)
    assert plan_blocks(profile, 0.21, 16) != plan
    assert plan_blocks(profile, 0.2, 32) != plan


def test_what_the_engine_cannot_plan_is_refused() -> None:
    profile = random_profile(HeadGrid(2, 4, 2, 32), 1)
    with pytest.raises(BudgetError, match="must be a share"):
        plan_blocks(profile, "2GiB", 16)
    dynamic = replace(profile, strategies=profile.strategies[3:], loss=profile.loss[:, 3:].copy(),
                      output_error=profile.output_error[:, 3:].copy())  # fmt: skip
    with pytest.raises(BudgetError, match="static strategies"):
        plan_blocks(dynamic, 0.2, 16)
