"""What layers write down as they work, so that a receipt outlives the cache it speaks of.

Plain numbers that the host knows; only counts of fetched items stay on the device until a receipt
is made. `measure_storage` comes to the same bytes by walking tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch

from hkvprof.profile.costs import END_BYTES
from hkvprof.runtime.kernels.interface import QuantisedRows
from hkvprof.runtime.storage import DynamicHead, RaggedStorage

POSITIONS = -1
"""In place of a layer's number: positions of tokens that all layers share (runtime.positions)."""


@dataclass
class Meter:
    """Resident bytes of a conversation's layers now and at their highest."""

    bytes: dict[int, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0

    def set(self, layer: int, count: int) -> None:
        """Layer number `layer` holds `count` bytes now."""
        self.total += count - self.bytes.get(layer, 0)
        self.bytes[layer] = count
        self.peak = max(self.peak, self.total)

    def clear(self) -> None:
        """Forget all layers, the highest count included."""
        self.bytes.clear()
        self.total = self.peak = 0


@dataclass
class HeadAccount:
    """One (batch row, KV head) of a layer. Bytes count K/V, index, slot map and slack.

    Read from the host were `bytes_moved` by decoding steps, of which none read more than
    `most_bytes`, nor can read more than `limit_bytes`; and `pass_bytes` by passes of several
    tokens.
    """

    row: int
    head: int
    strategy: str
    tokens_seen: int
    tokens_resident: int
    resident_bytes: int
    host_bytes: int = 0
    chunks_requested: int = 0
    chunks_fetched: int = 0
    bytes_moved: int = 0
    most_bytes: int = 0
    limit_bytes: int = 0
    pass_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of requested chunks that were hot already; None for heads that fetch nothing."""
        if not self.chunks_requested:
            return None
        return 1 - self.chunks_fetched / self.chunks_requested


class Fetches:
    """What a layer's dynamic heads read from the host, as the kernels count it.

    `counts` are three tensors [heads] on the device: items fetched, keys read to compare
    candidates, which are half an item, and the most items fetched in one step. Looking at them
    makes the host wait, so that it is done when a receipt is made. A step reads `key_bytes` beside
    items.
    """

    def __init__(
        self,
        counts: Sequence[torch.Tensor],
        heads: Sequence[HeadAccount],
        item_bytes: Sequence[int],
        key_bytes: Sequence[int],
    ) -> None:
        self.counts = tuple(counts)
        self._heads, self._item_bytes = tuple(heads), tuple(item_bytes)
        self._key_bytes = tuple(key_bytes)
        self._known = [(0, 0, 0)] * len(heads)

    def settle(self) -> None:
        """Enter into the heads' accounts what was fetched since the last time."""
        if self.counts[0].is_cuda:
            torch.cuda.synchronize(self.counts[0].device)  # a prefetch counts aside
        now = list(zip(*(counts.tolist() for counts in self.counts), strict=True))
        for head, size, keys, count, known in zip(
            self._heads, self._item_bytes, self._key_bytes, now, self._known, strict=True
        ):
            head.chunks_fetched += count[0] - known[0]
            head.bytes_moved += (count[0] - known[0]) * size + (count[1] - known[1]) * size // 2
            if count[1] or count[2]:
                head.most_bytes = max(head.most_bytes, keys + count[2] * size)
        self._known = now


class LayerState(StrEnum):
    """What became of a layer; receipts hold the value."""

    EMPTY = "empty"
    """No token came."""
    PENDING = "pending"
    """Tokens came, and attention has not passed through hkvprof yet."""
    DENSE = "dense"
    """All is kept; the account says why."""
    COMPRESSED = "compressed"


@dataclass
class LayerAccount:
    """A layer's state, tokens and bytes; `reason` says why a layer or some of its rows are dense.

    `tail` tokens came since the heads were last accounted for (every head keeps them whole until
    the next compression). `budget_bytes` is what the budget is worth, an equal part of it for every
    layer (rows that stay dense: all they have), and `excess` says why more may be held than that
    and its allowance. `query_bytes` are queries kept for the next compression, no part of
    `resident_bytes`. `parked_bytes` are dense keys and values that wait on the host between the
    chunks of a prefill. Seconds are wall clock and measured on the CPU only; `retrieval` is
    scoring, selecting and fetching.
    """

    layer: int
    state: LayerState = LayerState.EMPTY
    reason: str = ""
    device: str = ""
    dense_bytes: int = 0
    resident_bytes: int = 0
    budget_bytes: float = 0.0
    excess: str = ""
    query_bytes: int = 0
    parked_bytes: int = 0
    compressions: int = 0
    tail: int = 0
    compression_seconds: float = 0.0
    retrieval_seconds: float = 0.0
    steps: int = 0
    heads: list[HeadAccount] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fetches: Fetches | None = None
        """Not a field: no part of receipts."""

    def settle(self) -> None:
        """Enter what the kernels counted."""
        if self.fetches is not None:
            self.fetches.settle()

    @property
    def host_bytes(self) -> int:
        """Bytes on the host: items of dynamic heads, and parked keys and values."""
        return self.parked_bytes + sum(head.host_bytes for head in self.heads)

    def snapshot(self) -> LayerAccount:
        """A copy whose heads count the tail and what was fetched so far."""
        self.settle()
        heads = [
            replace(
                head,
                tokens_seen=head.tokens_seen + self.tail,
                tokens_resident=head.tokens_resident + self.tail,
            )
            for head in self.heads
        ]
        return replace(self, heads=heads, tail=0)


def open_heads(account: LayerAccount, names: Sequence[str], kv_heads: int) -> None:
    """A new account for every segment; what was counted over earlier steps goes on."""
    account.settle()
    account.fetches = None
    old = account.heads
    account.heads = [
        HeadAccount(segment // kv_heads, segment % kv_heads, name, 0, 0, 0)
        for segment, name in enumerate(names)
    ]
    for now, before in zip(account.heads, old, strict=False):
        now.chunks_requested = before.chunks_requested
        now.chunks_fetched = before.chunks_fetched
        now.bytes_moved, now.most_bytes = before.bytes_moved, before.most_bytes
        now.pass_bytes = before.pass_bytes
    account.compressions += 1


def take_heads(account: LayerAccount, segments: Sequence[int], kv_heads: int) -> None:
    """The accounts of rows that were reordered, dropped or repeated."""
    account.settle()
    account.fetches = None
    old = account.heads
    account.heads = [
        HeadAccount(**{**vars(old[before]), "row": segment // kv_heads})
        for segment, before in enumerate(segments)
    ]


def measure(
    account: LayerAccount,
    storage: RaggedStorage,
    dynamic: Mapping[int, DynamicHead],
    starts: Sequence[int],
    seen: int,
    quantised: QuantisedRows | None = None,
) -> None:
    """Every head's tokens and bytes; `starts` of the batch rows, `seen` is the logical length."""
    total = 0
    counted: set[int] = set()  # rows of a beam share index and host items
    for segment, head in enumerate(account.heads):
        state = dynamic.get(segment)
        head.tokens_resident = storage.lengths[segment]
        head.tokens_seen = seen - starts[head.row]
        head.resident_bytes = storage.capacities[segment] * storage.token_bytes + END_BYTES
        if quantised is not None:
            head.tokens_resident += quantised.count(segment)
            head.resident_bytes += quantised.nbytes(segment)
        if state is not None:
            first = id(state.host) not in counted
            counted.add(id(state.host))
            head.resident_bytes += state.slot_bytes + (state.index_bytes if first else 0)
            head.host_bytes = state.host.nbytes if first else 0
            head.limit_bytes = state.most_read_bytes
        total += head.resident_bytes
    account.tail = account.parked_bytes = 0
    account.dense_bytes = storage.segments * seen * storage.token_bytes
    account.resident_bytes = total


def measure_storage(cache: Any) -> tuple[int, int]:
    """(resident, host) bytes by walking every tensor that the cache's layers reach, but for queries
    (`measure_queries`).

    Independent of the accounts: storages are found through attributes and containers and counted
    once each. Tensors of objects with `on_host` are host bytes; lengths kept as integers do not
    count.
    """
    sizes = _measure(cache)
    return sizes["resident"], sizes["host"]


def measure_queries(cache: Any) -> int:
    """Bytes of the queries that a cache keeps for its next compression, by walking its tensors."""
    return _measure(cache)["queries"]


def _measure(cache: Any) -> dict[str, int]:
    sizes: dict[str, dict[int, int]] = {"resident": {}, "host": {}, "queries": {}}
    for layer in cache.layers:
        for tensor, place in _tensors(layer, "resident", set()):
            storage = tensor.untyped_storage()
            sizes[place][storage.data_ptr()] = storage.nbytes()
    return {place: sum(one.values()) for place, one in sizes.items()}


def _tensors(value: Any, place: str, seen: set[int]) -> Iterator[tuple[torch.Tensor, str]]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value, place
        return
    place = "host" if getattr(value, "on_host", False) else place
    if isinstance(value, (list, tuple)):
        children: list[Any] = list(value)
    elif isinstance(value, dict):
        children = list(value.values())
    elif type(value).__module__.startswith("hkvprof.") and hasattr(value, "__dict__"):
        skip = getattr(value, "shared_attributes", ())
        aside = getattr(value, "query_attributes", ())
        for name in aside:
            yield from _tensors(getattr(value, name), "queries", seen)
        children = [child for name, child in vars(value).items() if name not in (*skip, *aside)]
    else:
        return
    for child in children:
        yield from _tensors(child, place, seen)
