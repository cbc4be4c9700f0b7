"""What a server counts, as Prometheus reads it (text exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hkvprof.runtime.receipt import Receipt
    from hkvprof.serve.request import Ended

OUTCOMES = ("answered", "cancelled", "refused", "failed")
_HELP = {
    "prompt_tokens": "Tokens of prompts.",
    "new_tokens": "Tokens of replies.",
    "resident_bytes": "Bytes of keys and values kept on the device, summed over requests.",
    "host_bytes": "Bytes in host memory, summed over requests.",
    "dense_bytes": "Bytes of dense keys and values, summed over requests.",
    "chunks_requested": "Chunks of dynamic heads that decoding steps asked for.",
    "chunks_fetched": "Those of them that were fetched from host memory.",
    "bytes_moved": "Bytes fetched from host memory.",
    "monitored": "Requests that were compared with the calibration.",
    "out_of_domain": "Those of them that are not like the calibration.",
}


class Metrics:
    """Counters of one server; any thread may count and read."""

    def __init__(self) -> None:
        self.waiting = 0
        self._requests: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._latest: Receipt | None = None
        self._lock = threading.Lock()

    def count(self, outcome: str) -> None:
        """One more request that ended so, without a receipt."""
        assert outcome in OUTCOMES, outcome
        with self._lock:
            self._requests[outcome] += 1

    def account(self, outcome: str, ended: Ended) -> None:
        """One more request that generated."""
        self.count(outcome)
        with self._lock:
            self._sums["prompt_tokens"] += ended.prompt_tokens
            self._sums["new_tokens"] += ended.new_tokens
            if ended.receipt is not None:
                self._latest = ended.receipt
                self._sums.update(_of_receipt(ended.receipt))

    def text(self) -> str:
        """All of them, a metric after another."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests by how they ended.")
        for outcome in OUTCOMES:
            yield f'hkvprof_requests_total{{outcome="{outcome}"}} {self._requests[outcome]}'
        for name, told in _HELP.items():
            yield from _head(f"{name}_total", "counter", told)
            yield f"hkvprof_{name}_total {self._sums[name]}"
        yield from _head("waiting", "gauge", "Requests that run or wait.")
        yield f"hkvprof_waiting {self.waiting}"
        asked, fetched = self._sums["chunks_requested"], self._sums["chunks_fetched"]
        yield from _head("hit_rate", "gauge", "Share of requested chunks that were hot.")
        yield f"hkvprof_hit_rate {1 - fetched / asked if asked else 'NaN'}"
        for name in ("resident_bytes", "host_bytes", "dense_bytes"):
            yield from _head(f"latest_{name}", "gauge", f"The latest request's {name}.")
            yield f"hkvprof_latest_{name} {getattr(self._latest, name, 0)}"


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP hkvprof_{name} {told}"
    yield f"# TYPE hkvprof_{name} {kind}"


def _of_receipt(receipt: Receipt) -> dict[str, int]:
    heads = [head for layer in receipt.layers for head in layer.heads]
    domain = receipt.domain
    return {
        "resident_bytes": receipt.resident_bytes,
        "host_bytes": receipt.host_bytes,
        "dense_bytes": receipt.dense_bytes,
        "chunks_requested": sum(head.chunks_requested for head in heads),
        "chunks_fetched": sum(head.chunks_fetched for head in heads),
        "bytes_moved": receipt.bytes_moved,
        "monitored": int(domain is not None),
        "out_of_domain": int(domain is not None and domain.out_of_domain),
    }
