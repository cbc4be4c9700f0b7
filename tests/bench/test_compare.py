"""Ratios by hand, and which methods fit together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.bench.machine import CacheSpace, gather_groups, needs
from hkvprof.bench.methods import Kind, Method, filled_methods
from hkvprof.bench.run import LAYERS_AT_WORK
from tests.bench.figures import context

ALL = filled_methods(("0.20", "0.10", "0.05"))


def space(dense: int, segments: int, layers: int, free: int, host: int | None) -> CacheSpace:
    return CacheSpace(32768, dense, segments, LAYERS_AT_WORK * dense // layers, free, host)


def test_ratios_by_hand() -> None:
    made = context()
    hybrid = made.row("profile, 0.10, graph")
    assert hybrid is not None
    assert hybrid.held_share == pytest.approx(0.10)
    assert hybrid.speedup_over_dense == pytest.approx(40 / 13)
    assert hybrid.speedup_over_best == pytest.approx(20 / 13)
    assert hybrid.ceiling == pytest.approx(20 / 11)  # (10 + 10) / (10 + 1) GB
    assert hybrid.ceiling_share == pytest.approx((20 / 13) / (20 / 11))
    assert hybrid.bandwidth_share == pytest.approx(0.5)  # 1 GB in 2 ms of 1000 GB/s
    assert hybrid.bound_share == pytest.approx(11 / 13)  # 11 GB at 1000 GB/s are 11 ms
    assert hybrid.link_ms == pytest.approx(0.1)  # 5 MB at 50 GB/s
    assert hybrid.exposed_share == pytest.approx(0.04)  # 12.48 ms without the link
    stock = made.row("dense")
    assert stock is not None
    assert (stock.speedup_over_dense, stock.speedup_over_best) == (1.0, 0.5)
    assert stock.ceiling == 1.0
    assert stock.exposed_share is None
    control = made.row("profile, 0.10, graph, items on the device")
    assert control is not None
    assert control.exposed_share is control.held_share is None


def test_without_a_dense_cache_there_is_no_speed_up_but_a_bound() -> None:
    made = context(times={"static only, 0.10, graph": 12.5})
    static = made.row("static only, 0.10, graph")
    assert static is not None
    assert static.speedup_over_dense is static.speedup_over_best is static.ceiling_share is None
    assert static.ceiling == pytest.approx(20 / 11)
    assert static.bound_share == pytest.approx(11 / 12.5)
    assert len(made.rows) == len(ALL)


def test_every_method_has_a_name_of_its_own() -> None:
    names = [method.name for method in ALL]
    assert len(set(names)) == len(names) == 20
    assert "dynamic only, 0.10, graph, items on the device" in names


def test_what_fits_nowhere_says_what_it_needs() -> None:
    dense = 240_000_000_000
    layer = dense // 28
    groups, reasons = gather_groups(
        ALL, space(dense, 28 * 4 * 32, 28, 100_000_000_000 + 4 * layer, 100_000_000_000)
    )
    ran = {method.name for group in groups for method in group}
    assert {name for name in ran if "static" in name} == {
        "static only, 0.20, graph", "static only, 0.10, graph", "static only, 0.05, graph",
        "static only, 0.10",
    }  # fmt: skip
    assert len(ran) == 4
    stock = reasons[Method(Kind.DENSE)]
    assert stock == "needs 240.0 GB on the device, 100.0 GB can be had"
    assert reasons[Method(Kind.DYNAMIC, "0.10", graph=True)] == (
        "needs 240.5 GB of pinned host memory, 100.0 GB can be had"  # 3,584 blocks of 64 MiB
    )


def test_pinned_blocks_are_powers_of_two() -> None:
    dynamic, static = (Method(kind, "0.10", graph=True) for kind in (Kind.DYNAMIC, Kind.STATIC))
    segments = 28 * 4

    def pinned(method: Method, block: int) -> int:
        return needs(method, space(segments * block, segments, 28, 0, 0))[1]

    assert pinned(dynamic, 2**24) == segments * 2**24
    assert pinned(dynamic, 2**24 + 1) == segments * 2**25
    assert pinned(static, 2**24) == 0


def test_without_a_device_of_its_own_items_take_the_same_memory() -> None:
    dynamic, here = Method(Kind.DYNAMIC, "0.10"), space(4 * 2**20, 4, 2, 0, None)
    assert needs(dynamic, here) == (int(0.102 * 4 * 2**20) + 4 * 2**20, 0)
    assert needs(Method(Kind.STATIC, "0.10"), here) == (int(0.102 * 4 * 2**20), 0)


@given(st.integers(1, 10**12), st.integers(1, 64), st.integers(0, 10**12), st.integers(0, 10**13))
def test_no_set_is_larger_than_the_memory(dense: int, layers: int, free: int, host: int) -> None:
    here = space(dense, 4 * layers, layers, free, host)
    groups, reasons = gather_groups(ALL, here)
    assert [m for m in ALL if m not in reasons] == [m for group in groups for m in group]
    for group in groups:
        assert group
        device = sum(needs(method, here)[0] for method in group)
        assert device + LAYERS_AT_WORK * dense // layers <= free
        assert max(needs(method, here)[1] for method in group) <= host
