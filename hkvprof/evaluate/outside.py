"""An engine in a process of its own that is asked the questions of a comparison.

A prompt is compressed when it ends. What follows it, a question of its own or a reply that is
forced, is fed as an engine feeds its own replies: token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from hkvprof.profile.budgets import Allocation


class ForcedReply(Protocol):
    """What an engine would have said to a reply that was forced on it, and what its prompt took."""

    @property
    def log_probs(self) -> Float[Tensor, "rows vocabulary"]:
        """Distributions before the first of the forced tokens and after each, float32."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the prompt keeps by the engine's plan."""

    @property
    def storage_bytes(self) -> int:
        """Bytes of the prompt in the blocks that the engine really holds."""

    @property
    def compress_seconds(self) -> float:
        """Seconds that the end of the prompt took."""


class OutsideEngine(Protocol):
    """An engine with a profile, at one budget. Prompts and replies are token numbers."""

    def allocation(self, tokens: int) -> Allocation:
        """What it keeps of a prompt of so many tokens, as strategies and ratios of heads."""

    def force(
        self, prompt: Sequence[int], lead: Sequence[int], forced: Sequence[int]
    ) -> ForcedReply:
        """Force `lead` and then `forced` on a prompt. Raises UsageError where it ends instead."""

    def answer(self, prompt: Sequence[int], lead: Sequence[int], limit: int) -> list[int]:
        """Its own greedy reply of `limit` tokens to a prompt on which `lead` is forced."""


def until(ends: frozenset[int], tokens: Sequence[int]) -> list[int]:
    """Tokens before the first that ends a turn."""
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:place])


def divergence(
    theirs: Float[Tensor, "rows vocabulary"], ours: Float[Tensor, "rows vocabulary"]
) -> float:
    """Mean KL(theirs || ours) in nats of distributions, as log-probabilities."""
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())
