"""The receipt: what was kept, where, and what it cost; plain numbers, no tensors.

Layers write their account as they work, so that a receipt outlives the cache it speaks of; only
counts of fetched items stay on the device until a receipt is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hkvprof.profile.domain import DomainCheck

ONE_MEMORY = ("", "cpu", "mps")
"""Kinds of devices whose memory is the host's; "" before anything was seen."""


@dataclass
class Meter:
    """Resident K/V bytes of a conversation's layers now and at their highest."""

    bytes: dict[int, int] = field(default_factory=dict)
    total: int = 0
    peak: int = 0

    def set(self, layer: int, count: int) -> None:
        """Layer number `layer` holds `count` bytes now."""
        self.total += count - self.bytes.get(layer, 0)
        self.bytes[layer] = count
        self.peak = max(self.peak, self.total)

    def clear(self) -> None:
        """Start anew."""
        self.bytes.clear()
        self.total = self.peak = 0


@dataclass
class HeadAccount:
    """One (batch row, KV head) of a layer. Bytes count K/V, index, slot map and slack."""

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

    @property
    def hit_rate(self) -> float | None:
        """Share of requested chunks that were hot already; None for heads that fetch nothing."""
        if not self.chunks_requested:
            return None
        return 1 - self.chunks_fetched / self.chunks_requested


class Fetches:
    """Items that a layer's dynamic heads fetched, as the kernels count them.

    `counts` [heads] lies on the device: reading it makes the host wait, so that it is read when a
    receipt is made.
    """

    def __init__(
        self, counts: torch.Tensor, heads: Sequence[HeadAccount], item_bytes: Sequence[int]
    ) -> None:
        self.counts = counts
        self._heads, self._item_bytes = tuple(heads), tuple(item_bytes)
        self._known = [0] * len(heads)

    def settle(self) -> None:
        """Enter into the heads' accounts what was fetched since the last time."""
        if self.counts.is_cuda:
            torch.cuda.synchronize(self.counts.device)  # a prefetch counts aside
        now = self.counts.tolist()
        for head, size, count, known in zip(
            self._heads, self._item_bytes, now, self._known, strict=True
        ):
            head.chunks_fetched += count - known
            head.bytes_moved += (count - known) * size
        self._known = now


@dataclass
class LayerAccount:
    """A layer's state: `empty`, `pending`, `dense` (and why) or `compressed`.

    `tail` tokens came since the heads were last accounted for (every head keeps them whole until
    the next compression). `budget_bytes` is what the budget is worth, an equal part of it for every
    layer (rows that stay dense: all they have), and `excess` says why more may be held than that
    and its allowance. `query_bytes` are queries kept for the next compression, no part of
    `resident_bytes`. `parked_bytes` are dense keys and values that wait on the host between the
    chunks of a prefill. Seconds are wall clock and measured on the CPU only; `retrieval` is
    scoring, selecting and fetching.
    """

    layer: int
    state: str = "empty"
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


@dataclass(frozen=True)
class Receipt:
    """A request's account. `dense_bytes` is what an uncompressed cache of the covered layers holds.

    `resident_bytes` are K/V, indexes, slot maps and slack, which the budget is about; it is worth
    `budget_bytes` at this length. `query_bytes` are beside them: the last queries, kept for the
    next compression. `peak_bytes` is the most K/V that was resident at once, during prefill too.
    `shared_bytes` are index tables held once per model: no part of any request. `same_memory` says
    that device and host are one memory for this model, so that only `resident_bytes + host_bytes`
    (`total_bytes`) is what a request really takes. `kernels` names what computes decoding steps.
    `domain` is what the monitor found; None on requests that it did not look at.
    """

    resident_bytes: int
    budget_bytes: int
    query_bytes: int
    host_bytes: int
    dense_bytes: int
    peak_bytes: int
    shared_bytes: int
    same_memory: bool
    kernels: str
    layers: tuple[LayerAccount, ...]
    domain: DomainCheck | None = None

    @property
    def total_bytes(self) -> int:
        """Resident and host bytes together."""
        return self.resident_bytes + self.host_bytes

    @property
    def resident_share(self) -> float:
        """Resident bytes over dense bytes: the all-in share."""
        return self.resident_bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def over_bytes(self) -> int:
        """What is resident beyond the budget: tokens that came since the last compression."""
        return max(0, self.resident_bytes - self.budget_bytes)

    @property
    def over_tokens(self) -> float:
        """The same in tokens per head."""
        tokens = sum(head.tokens_seen for head in self._heads())
        return self.over_bytes / self.dense_bytes * tokens / self._segments if tokens else 0.0

    @property
    def excess(self) -> str:
        """Why more may be held than the budget and its allowance; else an empty text."""
        return "; ".join(sorted({layer.excess for layer in self.layers if layer.excess}))

    @property
    def compressed_layers(self) -> int:
        """Number of layers that hold ragged, compressed storage."""
        return sum(layer.state == "compressed" for layer in self.layers)

    @property
    def hit_rate(self) -> float | None:
        """Share of requested chunks that were hot already, over all dynamic heads."""
        requested = sum(head.chunks_requested for head in self._heads())
        if not requested:
            return None
        return 1 - sum(head.chunks_fetched for head in self._heads()) / requested

    @property
    def bytes_moved(self) -> int:
        """Bytes fetched from the host while decoding."""
        return sum(head.bytes_moved for head in self._heads())

    @property
    def steps(self) -> int:
        """Decoding steps on compressed storage."""
        return max((layer.steps for layer in self.layers), default=0)

    @property
    def compression_seconds(self) -> float:
        """Wall clock of all compressions; measured on the CPU only, else 0."""
        return sum(layer.compression_seconds for layer in self.layers)

    @property
    def retrieval_seconds(self) -> float:
        """Wall clock of scoring, selecting and fetching; measured on the CPU only, else 0."""
        return sum(layer.retrieval_seconds for layer in self.layers)

    def _heads(self) -> Iterator[HeadAccount]:
        return (head for layer in self.layers for head in layer.heads)

    @property
    def _segments(self) -> int:
        return sum(len(layer.heads) for layer in self.layers)

    def __str__(self) -> str:
        text = (
            f"{_mib(self.resident_bytes)} resident of {_mib(self.dense_bytes)} dense "
            f"({self.resident_share:.1%}), {_mib(self.host_bytes)} on the host"
        )
        if self.same_memory:
            together = _mib(self.total_bytes)
            text += f" (device and host are the same memory here: {together} together)"
        if self.over_bytes:
            text += (
                f", {_mib(self.over_bytes)} ({self.over_tokens:.1f} tokens a head) over the budget"
            )
            text += f" because {self.excess}" if self.excess else ""
        if self.query_bytes:
            text += f", {_mib(self.query_bytes)} of queries for the next compression"
        text += f", {self.compressed_layers} of {len(self.layers)} layers compressed"
        reasons = sorted({layer.reason for layer in self.layers if layer.reason})
        text += f"; dense because {'; '.join(reasons)}" if reasons else ""
        tables = f"; index tables, once per model: {_mib(self.shared_bytes)}"
        return text + (tables if self.shared_bytes else "")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            **{k: v for k, v in asdict(self).items() if k != "layers"},
            "resident_share": self.resident_share,
            "over_bytes": self.over_bytes,
            "over_tokens": self.over_tokens,
            "excess": self.excess,
            "total_bytes": self.total_bytes,
            "hit_rate": self.hit_rate,
            "bytes_moved": self.bytes_moved,
            "steps": self.steps,
            "compression_seconds": self.compression_seconds,
            "retrieval_seconds": self.retrieval_seconds,
            "layers": [
                {**asdict(layer), "heads": [self._head(head) for head in layer.heads]}
                for layer in self.layers
            ],
        }

    @staticmethod
    def _head(head: HeadAccount) -> dict[str, Any]:
        return {**asdict(head), "hit_rate": head.hit_rate}


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


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
    found: dict[str, dict[int, int]] = {"resident": {}, "host": {}, "queries": {}}
    for layer in cache.layers:
        for tensor, place in _tensors(layer, "resident", set()):
            storage = tensor.untyped_storage()
            found[place][storage.data_ptr()] = storage.nbytes()
    return {place: sum(sizes.values()) for place, sizes in found.items()}


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
