"""Calibration and evaluation samples: the record, and the readers of what users have on disk.

The format is documented in docs/sample-format.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkvprof.errors import SampleError, UsageError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """A later question about the same context, with the expected reply."""

    question: str
    reply: str


@dataclass(frozen=True)
class Sample:
    """One prompt in the chat format of transformers.

    `messages` hold content parts: `{"type": "text", "text": ...}` (optionally with
    `"modality": "context"` for long text that plays the part of vision tokens) and
    `{"type": "image", "path": ...}` or, in memory, `{"type": "image", "image": PIL.Image}`.
    `reply` is the expected answer; without it the model's own greedy answer is used.
    """

    id: str
    task: str
    messages: tuple[Message, ...]
    reply: str | None = None
    followups: tuple[Turn, ...] = field(default=())
