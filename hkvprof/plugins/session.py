"""A model with a profile applied, and the account of what a harness asked of it. No harness."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hkvprof.errors import BudgetError, CompressionError, UsageError
from hkvprof.models.load import load_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.budgets import Budget
from hkvprof.profile.record import Profile, load_profile
from hkvprof.runtime.handle import Handle, apply, without_weights
from hkvprof.runtime.options import REMOVED
from hkvprof.runtime.receipt import Receipt

MIN_TOKENS = 64
"""Shorter prompts stay dense in evaluations; `hkvprof.runtime.apply` has a default for speed."""

REQUIRED = ("pretrained", "profile")
LOADING = ("dtype", "device", "device_map")
RUNTIME = (
    "budget",
    "min_tokens",
    "compress_every",
    "host_dtype",
    "smoothing",
)
_WHOLE = ("min_tokens", "compress_every")


@dataclass(frozen=True)
class Arguments:
    """`--model_args`, sorted by who takes them.

    `loading` is for `hkvprof.load_model`, `runtime` for `hkvprof.runtime.apply`, `harness` for the
    harness's own model class.
    """

    pretrained: str
    profile: Any
    loading: dict[str, Any]
    runtime: dict[str, Any]
    harness: dict[str, Any]
    batch_size: int

    @classmethod
    def read(cls, given: Mapping[str, Any], harness: Collection[str] = ()) -> Arguments:
        """Sort what a harness passes on; None counts as not given.

        `harness` names what the harness's model class takes. Raises UsageError naming arguments
        that are unknown, missing or of the wrong kind.
        """
        given = {name: value for name, value in given.items() if value is not None}
        _refuse_unknown(given, (*REQUIRED, "batch_size", *RUNTIME, *LOADING, *harness))
        missing = [name for name in REQUIRED if name not in given]
        if missing:
            raise UsageError(
                f"--model hkvprof needs {' and '.join(missing)}: expected --model_args "
                "pretrained=<alias, hub id, folder or GGUF file>,profile=<file>,budget=0.1"
            )
        runtime = _taken(given, RUNTIME)
        for name in _WHOLE:
            if name in runtime and type(runtime[name]) is not int:
                raise UsageError(f"{name} must be a whole number, found {runtime[name]!r}")
        return cls(
            pretrained=str(given["pretrained"]),
            profile=given["profile"],
            loading=_taken(given, LOADING),
            runtime={"min_tokens": MIN_TOKENS, **runtime},
            harness=_taken(given, harness),
            batch_size=_batch_size(given.get("batch_size", 1)),
        )


def refuse_processes() -> None:
    """Raise UsageError under a launcher of several processes."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise UsageError(
            f"--model hkvprof runs in one process, found WORLD_SIZE={count}: start it without "
            "accelerate or torchrun; device_map=auto spreads a model over several devices"
        )


def _taken(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            hint = f". {REMOVED[name]}" if name in REMOVED else hint
            raise UsageError(
                f"--model hkvprof knows no argument {name!r}: expected {', '.join(known)}.{hint}"
            )


def _batch_size(value: Any) -> int:
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UsageError(
        f"batch_size must be a number of at least 1, found {value!r}: automatic sizes are measured "
        "on dense passes, which say nothing about compressed ones"
    )


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
        """Requests answered, on whichever cache."""
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


_LOG = logging.getLogger(__name__)


class Session:
    """A loaded model (`model`) that compresses all it generates, and the account of its requests.

    `counts` are the requests of all calls so far, `latest` those of the latest call.
    """

    def __init__(self, arguments: Arguments) -> None:
        """Load and hook the model. Raises HkvError as load_model, load_profile and apply do."""
        refuse_processes()
        given = arguments.profile
        self.profile = given if isinstance(given, Profile) else load_profile(str(given))
        self.budget = Budget.parse(arguments.runtime.get("budget", self.profile.default_budget))
        self.min_tokens = int(arguments.runtime["min_tokens"])
        self.model: Any
        self.processor: ChatProcessor
        without_weights(arguments.pretrained, self.profile)
        self.model, self.processor = load_model(arguments.pretrained, **arguments.loading)
        self.handle: Handle = apply(self.model, self.profile, **arguments.runtime)
        self.counts = Counts()
        self.latest = Counts()

    @property
    def full(self) -> bool:
        """Whether the budget is the whole cache, so that nothing is compressed on purpose."""
        return self.budget.share is not None and self.budget.share >= 1

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Account for one call of a harness.

        At its end CompressionError is raised if the budget is below 1 and none of its requests was
        compressed. A BudgetError tells about `min_tokens`.
        """
        self.latest = Counts()
        try:
            yield
        except BudgetError as error:
            raise BudgetError(
                f"{error}; or set min_tokens in --model_args (now {self.min_tokens}): shorter "
                "prompts stay dense and are counted as such"
            ) from error
        self.counts.merge(self.latest)
        if self.full:
            return
        self.latest.require(name)
        _LOG.log(
            logging.WARNING if self.latest.dense else logging.INFO, "%s: %s", name, self.latest
        )

    def foresee(self, lengths: Iterable[int]) -> None:
        """Raise BudgetError now if one of these prompts is too short for the budget.

        Long prompts run first, so that it would come at the end of a run otherwise.
        """
        due = [tokens for tokens in lengths if tokens >= self.min_tokens]
        if due and not self.full:
            self.profile.allocation(self.budget, min(due), self.model.dtype.itemsize)

    def count(self, receipt: Receipt, requests: int) -> None:
        """Note the requests that one cache served."""
        self.latest.add(receipt, requests)

    def close(self) -> None:
        """Give the model back as it was and forget it; the counts stay."""
        self.handle.detach()
        del self.model, self.handle

    def to_json(self) -> dict[str, Any]:
        """What belongs into a results file."""
        return {
            "budget": str(self.budget),
            "min_tokens": self.min_tokens,
            **self.counts.to_json(),
        }
