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
from hkvprof.profile.blocks import MIN_TOKENS, MOST_GROUPS, SLACK, BlockPlan, Blocks, plan_blocks
from hkvprof.profile.costs import quantised_bytes
from hkvprof.profile.grouping import LoneHeads
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
    itemsize=st.sampled_from([2, 4]),
)  # fmt: skip
def test_a_plan_keeps_within_its_budget_in_whole_blocks(
    grid: HeadGrid, seed: int, share: float, size: int, tokens: int, itemsize: int
) -> None:
    plan = plan_blocks(random_profile(grid, seed), share, size, itemsize)
    each = np.bincount(plan.group.reshape(-1))
    assert len(each) == plan.groups <= MOST_GROUPS
    assert (each == grid.total // plan.groups).all()
    for (layer, head), number in np.ndenumerate(plan.strategy):
        strategy = plan.strategies[number]
        assert strategy.head_type is HeadType.STATIC
        assert strategy.resident_bits == plan.bits[plan.group[layer, head]]
    made = plan.at(tokens)
    for group, dropped in enumerate(made.dropped):
        assert 0 <= dropped <= tokens // size
        assert_held_in_equal_bytes(plan, made, group, tokens - dropped * size)
    if made.dense_reason:
        assert not any(made.dropped)
        assert made.share == 1
    else:
        assert made.kept_bytes <= share * made.dense_bytes + 1
        assert min(made.kept_tokens) >= plan.keep.floor_tokens
        # What rounding leaves over is less than one block of one group, or nobody can use it.
        room, token = share * made.dense_bytes - made.kept_bytes, grid.token_bytes(itemsize)
        full = all(kept == tokens for kept in made.kept_tokens)
        assert full or room < size * token / plan.groups + token


def assert_held_in_equal_bytes(plan: BlockPlan, made: Blocks, group: int, slots: int) -> None:
    """A group's tokens, counted in bytes with scales and mean, fill its slots but for what pages
    leave over at their ends; it holds no more blocks than its tokens need."""
    kept, bits, size = made.kept_tokens[group], made.bits[group], plan.block_size
    if bits == EXACT_BITS:
        assert kept == slots
        return
    dim, itemsize = plan.grid.head_dim, plan.itemsize
    slot, row = 2 * dim * itemsize, quantised_bytes(bits, dim)
    ends = plan.keep.sinks + plan.keep.recent
    taken = (1 + ends) * slot + (kept - ends) * row
    assert taken <= slots * slot
    unused = (slots // size + 2) * row
    if kept < made.tokens:
        assert taken + unused > slots * slot
    elif slots > size:
        assert taken + unused + size * slot > slots * slot or slots <= size + plan.keep.floor_tokens


def test_what_is_kept_is_what_the_heads_of_the_groups_hold() -> None:
    grid = HeadGrid(4, 8, 4, 32)
    made = (plan := plan_blocks(random_profile(grid, 3), 0.2, 16)).at(3000)
    by_head = 3000 - 16 * np.array(made.dropped)[plan.group]
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
    for other in ({"score": "calibrated"}, {"text_prior": 0.5}):
        strategies = (profile.strategies[0], replace(profile.strategies[1], **other))
        menu = with_menu(profile, *strategies)
        plan = plan_blocks(menu, 0.2, 32)
        assert set(plan.strategy.reshape(-1).tolist()) <= {0, 2}
        none = with_menu(profile, *[strategies[1]] * 3)
        with pytest.raises(BudgetError, match="scored by the window"):
            plan_blocks(none, 0.2, 32)
    plan = plan_blocks(random_profile(HeadGrid(3, 4, 2, 32), 10), 0.3, 32)
    assert (plan.strategy == 1).any()


def test_every_group_has_the_bits_in_which_it_loses_least() -> None:
    """4 bits lose next to nothing in the first half of the heads, and everything in the second."""
    profile = random_profile(HeadGrid(4, 4, 2, 32), 2)
    loss = profile.loss.copy()
    loss[:, 2, :2] = loss[:, 0, :2] / 1000
    loss[:, 2, 2:] = loss[:, 0, 2:] * 1000
    heads = LoneHeads.of(replace(profile, loss=loss), 0.1)
    for size in (1, 2, 4):
        made = heads.cut(size)
        for group in range(8 // size):
            layers = made.group == group
            kinds = {profile.strategies[n].resident_bits for n in made.strategy[layers].tolist()}
            assert len(kinds) == 1
            if layers[:2].any() != layers[2:].any():
                assert kinds == {4 if layers[:2].any() else EXACT_BITS}
    one = LoneHeads.of(replace(profile, loss=np.where(loss > -1, loss[:, :1], loss)), 0.1)
    assert (one.cut(4).strategy == 0).all(), "of equals the more exact"


def test_fewer_bits_lose_less_where_they_are_good() -> None:
    """As measured: at a tenth of the bytes 4 bits hold three times as many tokens."""
    profile = random_profile(HeadGrid(4, 4, 2, 64), 2)
    loss = profile.loss.copy()
    loss[:, 2] = loss[:, 0] / 10
    few = plan_blocks(replace(profile, loss=loss), 0.1, 32).at(2048)
    whole = plan_blocks(with_menu(profile, *[profile.strategies[0]] * 3), 0.1, 32).at(2048)
    assert set(few.bits) == {4}
    assert few.kept_bytes <= 0.1 * few.dense_bytes
    assert few.expected_loss < whole.expected_loss
    assert sum(few.kept_tokens) / len(few.bits) > 3 * sum(whole.kept_tokens) / len(whole.bits)


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
