"""The receipt: what was kept, where, and what it cost; plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hkvprof.profile.domain import DomainCheck
from hkvprof.runtime.accounts import HeadAccount, LayerAccount, LayerState
from hkvprof.runtime.shown import html_table, mib

ONE_MEMORY = ("", "cpu", "mps")
"""Kinds of devices whose memory is the host's; "" before anything was seen."""


@dataclass(frozen=True, repr=False)
class Receipt:
    """A request's account. `dense_bytes` is what an uncompressed cache of the covered layers holds.

    `resident_bytes` are K/V, indexes, slot maps and slack, which the budget is about; it is worth
    `budget_bytes` at this length. `query_bytes` are beside them: the last queries, kept for the
    next compression. `peak_bytes` is the most K/V that was resident at once, during prefill too.
    `shared_bytes` are tables of heads (of indexes, of expected queries) held once per model: no
    part of any request. `same_memory` says that device and host are one memory for this model, so
    that only `resident_bytes + host_bytes` (`total_bytes`) is what a request really takes.
    `kernels` names what computes decoding steps.
    Of a decoding step's reads from the host (all rows) `bytes_per_step` is the mean and
    `most_bytes` the worst, in the sum of every head's own worst; none can read more than
    `limit_bytes`, which keeps within the budget of reads. What passes of several tokens read,
    `pass_bytes`, has no limit. `domain` is what the monitor found; None on requests that it did not
    look at. `profile` is where the profile came from: `hf:owner/name@commit/file`, a file's name,
    or empty if it was made here.
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
    profile: str = ""

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
        return sum(layer.state is LayerState.COMPRESSED for layer in self.layers)

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
    def bytes_per_step(self) -> float:
        """Mean bytes that a decoding step reads from the host."""
        return self.bytes_moved / self.steps if self.steps else 0.0

    @property
    def most_bytes(self) -> int:
        """Bytes that no decoding step so far read more of."""
        return sum(head.most_bytes for head in self._heads())

    @property
    def limit_bytes(self) -> int:
        """Bytes that no decoding step can read more of."""
        return sum(head.limit_bytes for head in self._heads())

    @property
    def pass_bytes(self) -> int:
        """Bytes read from the host by passes of several tokens."""
        return sum(head.pass_bytes for head in self._heads())

    @property
    def read_share(self) -> float:
        """`bytes_per_step` over dense bytes."""
        return self.bytes_per_step / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def limit_share(self) -> float:
        """`limit_bytes` over dense bytes."""
        return self.limit_bytes / self.dense_bytes if self.dense_bytes else 0.0

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
            f"{mib(self.resident_bytes)} resident of {mib(self.dense_bytes)} dense "
            f"({self.resident_share:.1%}), {mib(self.host_bytes)} on the host"
        )
        if self.same_memory:
            together = mib(self.total_bytes)
            text += f" (device and host are the same memory here: {together} together)"
        if self.over_bytes:
            text += (
                f", {mib(self.over_bytes)} ({self.over_tokens:.1f} tokens a head) over the budget"
            )
            text += f" because {self.excess}" if self.excess else ""
        if self.query_bytes:
            text += f", {mib(self.query_bytes)} of queries for the next compression"
        if self.limit_bytes:
            text += (
                f", a step reads {self.read_share:.2%} of dense bytes from there and at most "
                f"{self.limit_share:.2%}"
            )
        text += f", {self.compressed_layers} of {len(self.layers)} layers compressed"
        reasons = sorted({layer.reason for layer in self.layers if layer.reason})
        text += f"; dense because {'; '.join(reasons)}" if reasons else ""
        tables = f"; tables, once per model: {mib(self.shared_bytes)}"
        return text + (tables if self.shared_bytes else "")

    def __repr__(self) -> str:
        return f"<Receipt: {self}>"

    def _repr_html_(self) -> str:
        """A table in a notebook."""
        rows = {
            "resident": f"{mib(self.resident_bytes)} ({self.resident_share:.1%} of dense)",
            "budget": mib(self.budget_bytes),
            "dense": mib(self.dense_bytes),
            "on the host": mib(self.host_bytes),
            "a step reads": f"{self.read_share:.2%} of dense bytes, at most {self.limit_share:.2%}",
            "steps": self.steps,
            "layers compressed": f"{self.compressed_layers} of {len(self.layers)}",
            "tables": f"{mib(self.shared_bytes)}, once per model",
            "kernels": self.kernels,
            "profile": self.profile or "made in this process",
        }
        return html_table("Receipt", rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, what is derived included."""
        return {
            **{k: v for k, v in asdict(self).items() if k != "layers"},
            "resident_share": self.resident_share,
            "over_bytes": self.over_bytes,
            "over_tokens": self.over_tokens,
            "excess": self.excess,
            "total_bytes": self.total_bytes,
            "hit_rate": self.hit_rate,
            "bytes_moved": self.bytes_moved,
            "bytes_per_step": self.bytes_per_step,
            "most_bytes": self.most_bytes,
            "limit_bytes": self.limit_bytes,
            "pass_bytes": self.pass_bytes,
            "read_share": self.read_share,
            "limit_share": self.limit_share,
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
