"""How many requests of a run were really compressed; none at all is an error. No harness."""

from __future__ import annotations

from dataclasses import dataclass, field

from hkvprof.errors import CompressionError
from hkvprof.runtime.receipt import Receipt

_SHOWN = 3
"""Reasons that an error names."""


def compressed_rows(receipt: Receipt) -> list[bool]:
    """For every batch row of a cache: does some head hold less than it has seen? Empty if dense."""
    layers = [layer for layer in receipt.layers if layer.state == "compressed"]
    heads = [head for layer in layers for head in layer.heads]
    fewer = {head.row for head in heads if head.tokens_resident < head.tokens_seen}
    return [row in fewer for row in range(1 + max((head.row for head in heads), default=-1))]


@dataclass
class Counts:
    """Requests answered on a compressed cache, and on a dense one with the reasons for it."""

    compressed: int = 0
    dense: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Requests answered."""
        return self.compressed + self.dense

    def add(self, receipt: Receipt, requests: int) -> None:
        """Count the `requests` of one cache; beams of a request are adjacent rows."""
        rows = compressed_rows(receipt)
        beams = len(rows) // requests
        count = sum(any(rows[i * beams : (i + 1) * beams]) for i in range(requests))
        self.compressed += count
        self.dense += requests - count
        if count < requests:
            found = {layer.reason for layer in receipt.layers if layer.reason}
            self._remember(sorted(found) or ["the budget holds the whole row"])

    def merge(self, other: Counts) -> None:
        """Add another account to this one."""
        self.compressed += other.compressed
        self.dense += other.dense
        self._remember(other.reasons)

    def require(self, call: str) -> None:
        """Raise CompressionError if there were requests and none of them was compressed."""
        if self.total and not self.compressed:
            raise CompressionError(
                f"expected compressed caches, found none in all {self.total} {call} requests "
                f"({'; '.join(self.reasons[:_SHOWN])}): their results are those of the full cache. "
                "Use tasks with longer prompts, or a lower min_tokens or budget in --model_args; "
                "budget=1.0 measures the full cache on purpose"
            )

    def to_json(self) -> dict[str, int]:
        """Compressed and dense requests."""
        return {"compressed": self.compressed, "dense": self.dense}

    def __str__(self) -> str:
        text = f"{self.compressed} of {self.total} requests ran on a compressed cache"
        return text + (f" (dense: {'; '.join(self.reasons[:_SHOWN])})" if self.dense else "")

    def _remember(self, reasons: list[str]) -> None:
        self.reasons += [reason for reason in reasons if reason not in self.reasons]
