"""Generation settings of lmms-eval tasks as arguments of `generate()`. No torch, no harness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hkvprof.errors import CompressionError, UsageError
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
        """Requests that were answered, compressed or not."""
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
        """The numbers of compressed and of dense requests as a JSON-ready dict."""
        return {"compressed": self.compressed, "dense": self.dense}

    def __str__(self) -> str:
        text = f"{self.compressed} of {self.total} requests ran on a compressed cache"
        return text + (f" (dense: {'; '.join(self.reasons[:_SHOWN])})" if self.dense else "")

    def _remember(self, reasons: list[str]) -> None:
        self.reasons += [reason for reason in reasons if reason not in self.reasons]


MAX_NEW_TOKENS = 4096
"""Where a task does not say; the harness's own transformers models use the same."""

_KNOWN = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
    "until",
    "image_aspect_ratio",
)


@dataclass(frozen=True)
class Generation:
    """Arguments for `generate()`, and the texts at which a reply ends."""

    options: dict[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Generation:
        """From a task's `generation_kwargs`; None counts as not given.

        Temperature 0 is greedy; above 0 it samples unless `do_sample` is false. Raises UsageError
        naming settings that cannot be kept.
        """
        given = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(_KNOWN))
        if unknown:
            raise UsageError(
                f"the task sets {', '.join(unknown)} in generation_kwargs, which --model hkvprof "
                f"does not support: expected {', '.join(_KNOWN)}"
            )
        if given.get("image_aspect_ratio", "original") != "original":
            raise UsageError(
                f"the task asks for image_aspect_ratio={given['image_aspect_ratio']!r}: expected "
                "'original' (images go through the model's own processor)"
            )
        options: dict[str, Any] = {
            "max_new_tokens": int(given.get("max_new_tokens", MAX_NEW_TOKENS)),
            **_sampling(given),
        }
        if given.get("num_beams", 1) != 1:
            options["num_beams"] = int(given["num_beams"])
        if "repetition_penalty" in given:
            options["repetition_penalty"] = float(given["repetition_penalty"])
        until = given.get("until", ())
        texts = (until,) if isinstance(until, str) else tuple(until)
        return cls(options, tuple(text for text in texts if text))

    def cut(self, reply: str) -> str:
        """The reply up to the first of the texts that end it."""
        return reply[: min((at for at in map(reply.find, self.until) if at >= 0), default=None)]


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    temperature = float(given.get("temperature", 0))
    cold = temperature == 0 and "temperature" in given
    if cold or not given.get("do_sample", temperature > 0):
        return {"do_sample": False}
    named = {name: given[name] for name in ("top_p", "top_k") if name in given}
    warmth = {"temperature": temperature} if temperature else {}
    return {"do_sample": True, **warmth, **named}
