"""Byte counting of kept shares: nothing may cost more than its share, everything counted."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.profile.costs import (
    LEAST,
    LEAST_ROOM,
    OVER,
    RESERVE,
    SLOT_BYTES,
    DynamicLayout,
    Worth,
    dynamic_layout,
    index_item_bytes,
    static_tokens,
    token_floor,
)

KEEPS = st.builds(KeepRule, sinks=st.integers(0, 8), recent=st.integers(0, 32))
DYNAMIC = st.one_of(
    st.builds(
        lambda index, chunk: Strategy(HeadType.DYNAMIC, index=index, chunk=chunk),
        st.sampled_from(["mean", "minmax"]),
        st.sampled_from([1, 2, 8, 16, 64]),
    ),
    st.sampled_from([16, 32, 64]).map(
        lambda bits: Strategy(HeadType.DYNAMIC, index="projected", bits=bits)
    ),
)
RATIOS = st.floats(0.001, 1.0)
TOKENS = st.integers(0, 5000)
DIMS = st.sampled_from([32, 64, 128])
ITEMSIZES = st.sampled_from([2, 4])


def resident_bytes(layout: DynamicLayout, strategy: Strategy, dim: int, itemsize: int) -> int:
    """Device bytes, summed up item by item from the definitions of the indexes."""
    kept = layout.sinks + layout.recent + layout.hot * layout.chunk
    per_item = {
        "mean": dim * itemsize,
        "minmax": 2 * dim * itemsize,
        "projected": strategy.bits // 8,
    }
    index = layout.items * per_item[strategy.index]
    return kept * 2 * dim * itemsize + index + layout.hot * 4


@settings(max_examples=400)
@given(DYNAMIC, RATIOS, TOKENS, KEEPS, DIMS, ITEMSIZES)
def test_a_dynamic_head_never_costs_more_than_its_share(
    strategy: Strategy, ratio: float, tokens: int, keep: KeepRule, dim: int, itemsize: int
) -> None:
    layout = dynamic_layout(strategy, ratio, tokens, keep, dim, itemsize)
    assume(layout is not None)
    assert layout is not None
    dense = tokens * 2 * dim * itemsize
    used = resident_bytes(layout, strategy, dim, itemsize)
    assert used <= ratio * dense + 1e-6
    assert layout.resident_tokens == layout.sinks + layout.recent + layout.hot * layout.chunk
    assert layout.sinks + layout.recent + layout.items * layout.chunk == tokens
    assert layout.sinks == keep.sinks
    assert keep.recent <= layout.recent < keep.recent + strategy.chunk
    assert 1 <= layout.hot <= layout.items
    # One more hot chunk would not fit: nothing of the share is left unused.
    more = resident_bytes(
        DynamicLayout(layout.sinks, layout.recent, layout.items, layout.chunk, layout.hot + 1),
        strategy, dim, itemsize,
    )  # fmt: skip
    assert layout.hot == layout.items or more > ratio * dense - 1e-6


@given(DYNAMIC, RATIOS, RATIOS, TOKENS, KEEPS, DIMS, ITEMSIZES)
def test_more_share_never_means_fewer_hot_chunks(
    strategy: Strategy, a: float, b: float, tokens: int, keep: KeepRule, dim: int, itemsize: int
) -> None:
    low, high = sorted((a, b))
    less = dynamic_layout(strategy, low, tokens, keep, dim, itemsize)
    more = dynamic_layout(strategy, high, tokens, keep, dim, itemsize)
    if less is not None:
        assert more is not None
        assert more.hot >= less.hot
        assert (more.sinks, more.recent, more.items) == (less.sinks, less.recent, less.items)


def test_a_layout_by_hand() -> None:
    """100 tokens of width 32 in float16 (128 bytes each), chunks of 16 behind mean keys."""
    strategy = Strategy(HeadType.DYNAMIC, index="mean", chunk=16)
    keep = KeepRule(sinks=4, recent=8)
    # Region 88 tokens: 5 chunks, 8 tokens join the recent ones. 20 tokens stay: 2560 bytes; index
    # 5 * 64 = 320; a hot chunk costs 16 * 128 + 4 = 2052. Half of 12800 leaves 3520: one chunk.
    assert dynamic_layout(strategy, 0.5, 100, keep, 32, 2) == DynamicLayout(4, 16, 5, 16, 1)
    assert dynamic_layout(strategy, 0.38, 100, keep, 32, 2) is None
    assert dynamic_layout(strategy, 0.55, 100, keep, 32, 2) == DynamicLayout(4, 16, 5, 16, 2)


@pytest.mark.parametrize("tokens", [0, 5, 12, 27])
def test_a_prompt_without_a_whole_chunk_has_no_layout(tokens: int) -> None:
    strategy = Strategy(HeadType.DYNAMIC, index="mean", chunk=16)
    assert dynamic_layout(strategy, 1.0, tokens, KeepRule(), 64, 2) is None


def test_index_bytes_per_item() -> None:
    assert index_item_bytes(Strategy(HeadType.DYNAMIC, index="mean", chunk=16), 64, 2) == 128
    assert index_item_bytes(Strategy(HeadType.DYNAMIC, index="minmax", chunk=16), 64, 2) == 256
    for bits in (16, 32, 64):
        strategy = Strategy(HeadType.DYNAMIC, index="projected", bits=bits)
        assert index_item_bytes(strategy, 64, 2) == bits // 8
    assert SLOT_BYTES == 4


@given(RATIOS, RATIOS, TOKENS, KEEPS)
def test_static_tokens_stay_within_share_and_prompt(
    a: float, b: float, tokens: int, keep: KeepRule
) -> None:
    low, high = sorted((a, b))
    count = static_tokens(low, tokens, keep)
    least = min(tokens, keep.sinks + keep.recent)
    assert least <= count <= tokens
    assert count == least or count <= low * tokens + 1e-6
    assert count > low * tokens - 1
    assert count <= static_tokens(high, tokens, keep)
    assert static_tokens(1.0, tokens, keep) == tokens


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_an_exact_number_of_tokens_survives_the_division(wanted: int, tokens: int) -> None:
    """A ratio of k / n keeps k tokens, whatever floating point makes of it."""
    assume(wanted <= tokens)
    assert static_tokens(wanted / tokens, tokens, KeepRule(sinks=0, recent=0)) == wanted


def test_token_floor() -> None:
    assert token_floor(13, 1300) == pytest.approx(0.01)
    assert token_floor(13, 5) == 1.0
    assert token_floor(13, 1300) * 1300 >= 13


worths = st.builds(Worth, st.floats(1, 1e5), st.one_of(st.just(0.0), st.floats(-0.1, 0.9)))


@given(worths, st.floats(0, 1.2), st.integers(1, 300))
def test_room_is_counted(worth: Worth, part: float, every: int) -> None:
    held = part * worth.now
    room = worth.room(held, every)
    assert room <= every
    if room > LEAST_ROOM:
        assert all(held + n <= worth.limit(n) + 1e-6 for n in (1, room // 2, room))
    if room < every:
        assert held + room + 1 > worth.limit(room + 1) - 1e-6


@given(worths, st.floats(0, 1), st.integers(1, 300), st.integers(0, 300))
def test_memory_never_waits_for_the_budget(
    worth: Worth, part: float, every: int, tail: int
) -> None:
    held = part * worth.now
    spare = worth.spare(held, tail)
    assert spare >= 0
    if spare:
        assert held + tail + spare <= worth.limit(tail) + 1e-6


@given(st.floats(1, 1e5))
def test_the_allowance(now: float) -> None:
    """5% of a budget that is worth 128 tokens, and below that fewer than 8 tokens."""
    over = Worth(now).limit(0) - now
    assert over <= (OVER * now + 1e-6 if now >= 128 else 8)
    assert LEAST * OVER <= 8


@given(worths, st.integers(1, 300))
def test_a_later_compression_leaves_room(worth: Worth, every: int) -> None:
    target = worth.target(every)
    assert target >= (1 - RESERVE) * worth.now
    if target > (1 - RESERVE) * worth.now + 1e-6:
        assert worth.room(target, every) >= every - 1


def test_room_worked_by_hand() -> None:
    """160 tokens, a tenth of 1600 and more: 8 may be held over, 10 are left free."""
    worth = Worth(160.0, 0.1)
    assert worth.room(160.0, 128) == int(8 / 0.895)
    assert worth.target(128) == 150
    assert worth.room(150.0, 128) == int(18 / 0.895)
    assert worth.spare(150.0, 0) == 18
    assert Worth(15.0).room(15.0, 128) == 6
    assert Worth(15.0).room(40.0, 128) == LEAST_ROOM
    assert Worth(4000.0).target(128) == 4000 * 1.05 - 128
