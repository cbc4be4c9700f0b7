"""A request whose reply is told beforehand, and what comes of it. Knows nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ReplyScript:
    """A prompt on which `forced` tokens follow, and then `more` of the engine's own, greedy.

    Log-probabilities of all tokens, before forced token number `heard` and everything after it,
    go into the .npy file at `path` where one is given: float32 [rows, vocabulary].
    """

    prompt: list[int]
    forced: list[int]
    more: int = 1
    heard: int = 0
    path: str = ""


@dataclass(frozen=True)
class Spoken:
    """What followed a script's prompt, and the request's receipt (`scheduler.receipt`; empty in
    plain vLLM)."""

    tokens: list[int]
    receipt: dict[str, Any]
    compaction_seconds: float
