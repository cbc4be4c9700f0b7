"""Ragged storage against a list of tensors, under random sequences of operations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.runtime.storage import MIN_SLACK, SLACK_SHARE, RaggedStorage

DIM = 3


def segments(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, DIM, generator=generator) for n in lengths]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("drop"), st.integers(0, 5)),
        st.tuples(st.just("take"), st.integers(0, 1000)),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), operations, st.integers(0, 99))
def test_behaves_as_a_list_of_tensors(
    lengths: list[int], steps: list[tuple[str, int]], seed: int
) -> None:
    lengths = [n + 1 for n in lengths]
    keys, values = segments(lengths, seed), segments(lengths, seed + 1)
    storage = RaggedStorage(keys, values)
    generated = 0
    for name, number in steps:
        if name == "append":
            new = torch.randn(2, len(keys), number, DIM)
            storage.append(new[0], new[1], 1000)
            keys = [torch.cat([k, n]) for k, n in zip(keys, new[0], strict=True)]
            values = [torch.cat([v, n]) for v, n in zip(values, new[1], strict=True)]
            generated += number
        elif name == "drop":
            number = min(number, generated)
            storage.drop_last(number)
            keys = [k[: len(k) - number] for k in keys]
            values = [v[: len(v) - number] for v in values]
            generated -= number
        else:
            picked = [(number + 7 * i) % len(keys) for i in range(1 + number % 4)]
            storage = storage.take(picked)
            keys, values = [keys[i] for i in picked], [values[i] for i in picked]
        extents = storage.extents
        ends = [start + len(key) for start, key in zip(extents.starts, keys, strict=True)]
        assert extents.device_starts.tolist() == list(extents.starts)
        assert extents.device_ends.tolist() == ends
        assert extents.longest >= max(extents.lengths)
    for segment in range(storage.segments):
        assert torch.equal(storage.keys(segment), keys[segment])
        assert torch.equal(storage.values(segment), values[segment])


def test_slack_is_bounded_and_absent_before_growth() -> None:
    lengths = [500, 300, 700]
    storage = RaggedStorage(segments(lengths, 0), segments(lengths, 1))
    assert len(storage.key) == sum(lengths)
    for _ in range(200):
        new = torch.zeros(3, 1, DIM)
        storage.append(new, new, 1000)
        slack = len(storage.key) - sum(storage.lengths)
        assert slack <= 3 * max(MIN_SLACK, SLACK_SHARE * sum(storage.lengths) / 3)


def test_keys_and_values_may_differ_in_width() -> None:
    storage = RaggedStorage([torch.ones(4, 2)], [torch.ones(4, 5)])
    storage.append(torch.zeros(1, 3, 2), torch.zeros(1, 3, 5), 0)
    assert storage.keys(0).shape == (7, 2)
    assert storage.values(0).shape == (7, 5)
