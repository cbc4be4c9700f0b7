"""Held-out text of several kinds, whose true continuation is judged beside the model's own.

A model's greedy continuation is what it is surest of, and what a compressed cache finds easiest;
what really follows is harder. Prose is of the held-out topics of `longtext`; code, JSON, tables and
other languages are frozen (`tools/make_texts.py`). Nothing is calibrated on them.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from hkvprof.errors import UsageError
from hkvprof.evaluate.longtext import GOLDEN, JOINT, CountTokens, count_words, paragraphs
from hkvprof.samples.read import Sample

TEXTS = Path(__file__).parent / "data" / "texts.json.gz"
KINDS = ("prose", "code", "json", "multilingual", "table")
INSTRUCTION = "Continue the text above word for word from where it stops."
_PROBE = 6000
"""Characters by which it is estimated how many make a token."""
_MARGIN = 1.3
"""By how much parts of a document may differ in characters per token."""
_MOST_PER_TOKEN = 8
"""Characters of a token, on average over a text, at most."""
_FOLLOWING = 1000
"""Characters of continuation that a sample has: more than anybody forces tokens."""


@cache
def documents(kind: str) -> tuple[str, ...]:
    """The texts of one kind. Raises UsageError for an unknown one."""
    if kind not in KINDS:
        raise UsageError(f"expected a kind of text among {', '.join(KINDS)}; found {kind!r}")
    if kind == "prose":
        return (JOINT.join(paragraphs("heldout")),)
    with gzip.open(TEXTS, "rt", encoding="utf-8") as file:
        return tuple(json.load(file)[kind])


def make_text(
    kind: str, index: int, tokens: int, count_tokens: CountTokens = count_words
) -> tuple[Sample, str]:
    """A sample that asks to continue a text, and what really follows; the same for the same
    arguments.

    The context begins at a line, ends between words and counts with the instruction at most
    `tokens` tokens: within 3%, or about what the document holds where that is less. Starts are
    evenly spread from index to index, and languages take turns.
    """
    texts = documents(kind)
    text = texts[index % len(texts)]
    probe = text[:_PROBE]
    each = len(probe) / count_tokens(probe)
    last = len(text) - _FOLLOWING
    room = min(tokens - count_tokens(JOINT + INSTRUCTION), int(last / _MARGIN / each))
    start = _line(
        text, round((GOLDEN * (index // len(texts))) % 1.0 * (last - _MARGIN * room * each))
    )
    end = min(last, _fit(text, start, room, count_tokens))
    parts = [
        {"type": "text", "text": text[start:end], "modality": "context"},
        {"type": "text", "text": INSTRUCTION},
    ]
    task = f"text_{kind}"
    sample = Sample(f"heldout-{task}-{index:06d}", task, ({"role": "user", "content": parts},))
    return sample, text[end : end + _FOLLOWING]


def _line(text: str, at: int) -> int:
    """The first beginning of a line from a character on."""
    return 0 if at <= 0 else text.find("\n", at) + 1


def _fit(text: str, start: int, room: int, count_tokens: CountTokens) -> int:
    """The last end of a word up to which the text counts no more than `room` tokens."""
    low, high = start + 1, min(len(text), start + _MOST_PER_TOKEN * room)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count_tokens(text[start:middle]) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    while low > start + 1 and low < len(text) and not text[low].isspace():
        low -= 1
    return low
