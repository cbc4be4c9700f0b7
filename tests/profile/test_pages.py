"""Pages of equal bytes: what they hold in any bits fits, and no more would."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hkvprof.heads import EXACT_BITS, KeepRule
from hkvprof.profile.costs import quantised_bytes
from hkvprof.profile.pages import PageFormat, exact_slots

FORMATS = st.builds(
    PageFormat, st.sampled_from([4, 8, EXACT_BITS]), st.sampled_from([16, 32, 128]),
    st.sampled_from([32, 64, 80, 128]), st.sampled_from([2, 4]),
)  # fmt: skip
KEEP = KeepRule()


@given(page=FORMATS, slots=st.integers(14, 3000), more=st.integers(1, 9000))
def test_tokens_fit_page_by_page_and_no_more_would(page: PageFormat, slots: int, more: int) -> None:
    prompt = slots + more
    kept = page.tokens(slots, prompt, KEEP)
    assert KEEP.floor_tokens <= kept <= prompt
    if page.is_exact:
        assert kept == slots
        return
    row, rows = quantised_bytes(page.bits, page.head_dim), kept - KEEP.sinks - KEEP.recent
    free = slots - exact_slots(KEEP)
    # By hand: rows go into the first pages, none across the end of one.
    room = 0
    while free > 0:
        room += min(free, page.size) * page.slot_bytes // row
        free -= page.size
    assert rows == min(room, prompt - 12)
    assert slots >= page.least_slots(KEEP)


@given(page=FORMATS, prompt=st.integers(30, 9000))
def test_enough_slots_are_enough_and_the_fewest(page: PageFormat, prompt: int) -> None:
    enough = page.enough(prompt, KEEP)
    if page.is_exact:
        assert enough == prompt
        return
    assert page.rows(enough, KEEP) >= prompt - KEEP.sinks - KEEP.recent
    assert page.rows(enough - 1, KEEP) < prompt - KEEP.sinks - KEEP.recent
    assert page.rows(page.least_slots(KEEP), KEEP) >= 1


def test_pages_of_fewer_bits_hold_two_and_four_times_as_many_tokens_less_scales() -> None:
    assert [PageFormat(bits, 32, 128, 2).rows_in(32) for bits in (8, 4)] == [63, 113]
