"""Bytes and rounds of every launch of a decoding step, by arithmetic.

Bytes are those that programs ask for: what several programs or passes read is counted each time,
though caches answer most of it. tests/bench/test_account.py counts them in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TABLE = 256
"""Entries of a code's lookup table."""


@dataclass(frozen=True)
class HeadStep:
    """One dynamic head's step, in items of one token: `items` on the host, `hot` of them resident,
    `picked` compared by their own keys, `missed` fetched. `group` query heads of width `dim`,
    `itemsize` bytes per number, `codes` bytes of index per item and its projection's `channels`;
    `hot_bytes` a hot token's key and value as they are kept."""

    items: int
    hot: int
    picked: int
    missed: int
    group: int
    dim: int
    itemsize: int
    codes: int
    channels: int
    hot_bytes: int

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's key."""
        return self.dim * self.itemsize

    @property
    def cold(self) -> int:
        """Candidates whose keys lie on the host."""
        return max(0, self.picked - self.hot)

    @property
    def blocks(self) -> int:
        """Programs that list the best items."""
        return -(-self.items // 2048)

    @property
    def far(self) -> int:
        """Blocks of candidates on the host, each of which lists all of them."""
        return -(-self.cold // 64)

    @property
    def host_bytes(self) -> int:
        """Over the host link: keys of cold candidates, keys and values of what is fetched."""
        return self.cold * self.key_bytes + 2 * self.missed * self.key_bytes


def _coded(s: HeadStep) -> int:
    gathers = s.items * s.group * s.codes * 4
    return s.items * s.codes + gathers + s.items * s.group * 4


def _table(s: HeadStep) -> int:
    tables = s.dim * s.channels * 4 + TABLE * s.channels * 4
    return s.codes * s.group * s.key_bytes + tables + s.group * s.codes * TABLE * 4


def _exact(s: HeadStep) -> int:
    hot, listed = s.hot * s.hot_bytes // 2, s.picked * 8
    return s.items * 4 + hot + listed + s.picked * s.group * 4


def _select(s: HeadStep) -> int:
    return 6 * s.items * 5 + s.hot * 9 + s.missed * 8


DEVICE: dict[str, Callable[[HeadStep], int]] = {
    "table_kernel": _table,
    "coded_kernel": _coded,
    "share_kernel": lambda s: (s.items + s.picked) * (s.group + 1) * 4 + s.picked * 4,
    "raise_kernel": lambda s: s.hot * 12,
    "pick_kernel": lambda s: 6 * s.items * 4 + s.picked * 4,
    "exact_kernel": _exact,
    "due_kernel": lambda s: s.items * 9,
    "hold_kernel": lambda s: s.hot * 5,
    "select_kernel": _select,
    "gather_kernel": lambda s: s.missed * (s.hot_bytes + 12),
    "gather_rows_kernel": lambda s: s.missed * (s.hot_bytes + 12),
}
"""Device bytes of a head in the launches of a kernel in one step."""
DEVICE |= {
    "best_kernel": lambda s: s.items * (s.group * 4 + 1) + s.blocks * s.cold * 8,
    "candidate_kernel": lambda s: (
        s.hot * s.hot_bytes // 2 + s.far * s.blocks * s.cold * 8 + s.picked * s.group * 4
    ),
    "choose_kernel": lambda s: s.picked * (s.group + 1) * 4 + s.missed * 8,
}
LISTING: dict[str, Callable[[HeadStep], float]] = {
    "pick_kernel": lambda s: s.items / 4096,
    "select_kernel": lambda s: s.items / 4096 / 3,
    "best_kernel": lambda _: 1,
    "choose_kernel": lambda _: 1,
}
"""Kernels whose programs issue much: how often a program passes through its listing. Two thirds of
select_kernel's run only where a step may not fetch all that it wants."""
BITS = {"best_kernel": 61, "choose_kernel": 61}
"""How often their longest loops run."""
BLOCKS: dict[str, Callable[[HeadStep], int]] = {"best_kernel": lambda s: s.blocks}
"""Programs per head; elsewhere one."""
