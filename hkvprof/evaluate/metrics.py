"""How an answer is scored against the correct ones: every metric lies in [0, 1]."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

ANLS_THRESHOLD = 0.5
"""Distances from here on count as wrong (arXiv 1905.13648, section 4)."""


@dataclass(frozen=True)
class Metric:
    """A named score in [0, 1]; `compare` takes the answer and one reference."""

    name: str
    compare: Callable[[str, str], float]

    def __call__(self, answer: str, references: tuple[str, ...]) -> float:
        """The score against the best of the correct answers, of which there is at least one."""
        assert references, f"{self.name}: no reference"
        score = max(float(self.compare(answer, reference)) for reference in references)
        assert 0 <= score <= 1, f"{self.name}: {score}"
        return score


def fold(text: str) -> str:
    """Without differences of case and of white space."""
    return " ".join(text.casefold().split())


def words(text: str) -> str:
    """Words and numbers, folded, with single spaces between them; no punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def holds_words(text: str, part: str) -> bool:
    """Whether the words of `part` follow each other in `text`; never for a part without words."""
    wanted = words(part)
    return bool(wanted) and f" {wanted} " in f" {words(text)} "


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of single characters."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _exact(answer: str, reference: str) -> float:
    return "".join(answer.split()) == "".join(reference.split())


def _substring(answer: str, reference: str) -> float:
    return bool(fold(reference)) and fold(reference) in fold(answer)


def _formula(answer: str, reference: str) -> float:
    wanted = "".join(reference.split())
    return bool(wanted) and wanted in "".join(answer.split())


def _anls(answer: str, reference: str) -> float:
    given, wanted = fold(answer), fold(reference)
    longest = max(len(given), len(wanted), 1)
    if abs(len(given) - len(wanted)) >= ANLS_THRESHOLD * longest:
        return 0.0  # at least so many insertions
    distance = edit_distance(given, wanted) / longest
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def _rouge_l(answer: str, reference: str) -> float:
    if not re.search("[a-z0-9]", reference.lower()):
        return _exact(answer, reference)  # rouge-score knows no other letters
    return _rouge_scorer().score(reference, answer)["rougeL"].fmeasure


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _positions(answer: str, reference: str) -> float:
    wanted = json.loads(reference)
    given = _first_list(answer)
    return sum(g == w for g, w in zip(given, wanted, strict=False)) / len(wanted)


def _first_list(answer: str) -> list[Any]:
    """The first flat JSON list in an answer; empty if there is none."""
    for found in re.findall(r"\[[^\[\]]*\]", answer):
        try:
            return json.loads(found)
        except ValueError:
            continue
    return []


EXACT_MATCH = Metric("exact_match", _exact)
"""Equal apart from white space."""

SUBSTRING = Metric("substring", _substring)
"""The reference occurs in the answer, apart from case and white space."""

FORMULA = Metric("formula", _formula)
"""The reference occurs in the answer apart from white space; case matters, as in LaTeX."""

WORDS = Metric("words", holds_words)
"""The reference's words follow each other in the answer, apart from case and punctuation."""

ROUGE_L = Metric("rouge_l", _rouge_l)
"""F1 of the longest common subsequence of words (Lin 2004), by rouge-score, without stemming."""

ANLS = Metric("anls", _anls)
"""Normalised Levenshtein similarity, 0 below one half (ST-VQA, arXiv 1905.13648)."""

POSITIONS = Metric("positions", _positions)
"""Share of a JSON list's elements that the first list in the answer has at the same place: the
soft accuracy of MM-NIAH's counting tasks (arXiv 2406.07230, section 3)."""
