"""Ragged storage against a list of tensors, under random sequences of operations; and host items,
exactly or within int8's error, however they grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.profile.costs import quantised_bytes
from hkvprof.runtime.storage import (
    MIN_SLACK,
    SLACK_SHARE,
    HostChunks,
    RaggedStorage,
)

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


CPU = torch.device("cpu")


def items_of(count: int, chunk: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(count, chunk, 8, generator=generator) * torch.linspace(0.1, 20, 8)
    return key, torch.randn(count, chunk, 8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    chunk=st.sampled_from([1, 4, 16]),
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    kind=st.sampled_from(["same", "int8"]),
)
def test_store_returns_what_was_stored_and_appended(
    chunk: int, counts: list[int], kind: str
) -> None:
    parts = [items_of(count, chunk, seed) for seed, count in enumerate(counts)]
    store = HostChunks.store(*parts[0], kind)
    for part in parts[1:]:
        store = store.append(*part)
    key, value = (torch.cat(of) for of in zip(*parts, strict=True))
    expected = torch.stack([key, value], dim=1)
    got = store.everything(CPU)
    assert store.items == len(key) == len(got)
    picked = torch.randperm(store.items)[:7]
    assert torch.equal(store.fetch(picked, CPU), got[picked])
    if kind == "same":
        assert torch.equal(got, expected)
        return
    # Half a step of a token's codes in every channel, after any rotation.
    mean = expected[: counts[0]].mean(dim=(0, 2), keepdim=True)
    spread = (expected - mean).norm(dim=-1)
    assert bool(((got - expected).norm(dim=-1) <= spread * 8**0.5 / 254 * 1.02 + 1e-5).all())
    first = HostChunks.store(*parts[0], kind)
    assert torch.equal(store.data[: counts[0]], first.data)


def test_int8_halves_the_bytes_of_bf16() -> None:
    key, value = items_of(2048, 1, 0)
    key, value = (x.repeat(1, 1, 8).bfloat16() for x in (key, value))
    whole, small = (HostChunks.store(key, value, kind) for kind in ("same", "int8"))
    assert whole.nbytes == 2 * 2 * key.numel()
    assert small.nbytes == 2048 * quantised_bytes(8, 64) + 2 * 64 * 2 <= 0.52 * whole.nbytes


def test_nan_is_stored_without_harm_to_others() -> None:
    key, value = items_of(200, 1, 0)
    clean = HostChunks.store(key, value, "int8").everything(CPU)
    key[150, 0, 3] = torch.nan
    got = HostChunks.store(key, value, "int8").everything(CPU)
    assert bool(got.isfinite().all())
    others = torch.arange(200) != 150
    torch.testing.assert_close(got[others], clean[others], atol=1.0, rtol=0)  # of 20, by the mean


def test_a_shared_store_is_copied_before_it_grows() -> None:
    key, value = items_of(20, 4, 0)
    store = HostChunks.store(key, value)
    more = store.append(key[:1], value[:1])
    assert more is not store  # it was full
    assert more.append(key[1:2], value[1:2]) is more
    more.shared = True
    other, another = more.append(key[2:3], value[2:3]), more.append(key[3:4], value[3:4])
    assert len({id(x.data) for x in (more, other, another)}) == 3
    assert torch.equal(other.everything(CPU)[-1, 0], key[2])
    assert torch.equal(another.everything(CPU)[-1, 0], key[3])


@pytest.mark.parametrize("kind", ["same", "int8"])
def test_refused_memory_names_its_size(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from hkvprof.errors import CompressionError

    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    key, value = items_of(1 << 14, 1, 0)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CompressionError, match=r"host memory for a dynamic head \([01]\.\d MiB\)"):
        HostChunks.store(key, value, kind)


@pytest.mark.parametrize("chunk", [1, 16])
def test_keys_and_values_of_an_item_are_neighbours(chunk: int) -> None:
    """One item is one stretch of memory, K before V, whether stored at once or appended."""
    key, value = items_of(20, chunk, 0)
    store = HostChunks.store(key[:12], value[:12]).append(key[12:], value[12:])
    flat = store.data.untyped_storage()
    assert store.data.is_contiguous()
    plain = torch.tensor([], dtype=torch.float32).set_(flat)
    width = 2 * chunk * 8
    for item in range(20):
        both = torch.cat([key[item].reshape(-1), value[item].reshape(-1)])
        assert torch.equal(plain[item * width : (item + 1) * width], both)
