"""How far a row may grow: the closed form is what counting token by token gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hkvprof.profile.costs import LEAST, LEAST_ROOM, OVER, RESERVE, Worth

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


def test_worked_by_hand() -> None:
    """160 tokens, a tenth of 1600 and more: 8 may be held over, 10 are left free."""
    worth = Worth(160.0, 0.1)
    assert worth.room(160.0, 128) == int(8 / 0.895)
    assert worth.target(128) == 150
    assert worth.room(150.0, 128) == int(18 / 0.895)
    assert worth.spare(150.0, 0) == 18
    assert Worth(15.0).room(15.0, 128) == 6
    assert Worth(15.0).room(40.0, 128) == LEAST_ROOM
    assert Worth(4000.0).target(128) == 4000 * 1.05 - 128
