"""MileBench's own scores: ROUGE-L, options, needles.

They are what github.com/MileBench/MileBench, evaluate.py, computes (commit 9583e1f), odd corners
included: published figures stem from it. ROUGE-L is that of the package `rouge` 1.0.1, which counts
distinct words.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import partial

from hkvprof.evaluate.metrics import Metric

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
"""Full stops that are taken out: a flag of `re` stands where the count goes."""
_SILENT = ".^$*|"
"""An option with one of these is not recognised by its text (it is compared with its escapes)."""
_TINY = 1e-8


def normalised(text: str) -> str:
    """Text without most punctuation, in lower case.

    A mark goes if it touches a space anywhere in the text, or if a comma stands between digits
    there; otherwise each of them becomes a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = bool(_DIGIT_COMMA_DIGIT.search(text))
    bare = text
    for mark in _MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if touches or joined else " ")
    return _FULL_STOP.sub("", bare, count=_MOST_STOPS).strip("'").strip('"').strip().lower()


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence over sentences, counted in distinct words."""
    said, wanted = _sentences(normalised(answer)), _sentences(normalised(reference))
    if not said or not wanted:
        return 0.0
    common: set[str] = set()
    for sentence in wanted:
        for part in said:
            common |= set(_common(sentence, part))
    recall, precision = (len(common) / len({w for s in side for w in s}) for side in (wanted, said))
    return 2 * precision * recall / (precision + recall + _TINY)


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence, which a full stop ends; a blank sentence has one empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence: from the end, and where two are equally long, past a word of
    `second` first."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, left in enumerate(first, start=1):
        for j, right in enumerate(second, start=1):
            same = table[i - 1][j - 1] + 1
            table[i][j] = same if left == right else max(table[i - 1][j], table[i][j - 1])
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def chosen(answer: str, options: Sequence[str]) -> str:
    """The option that an answer chooses, by its label.

    In this order: C for nothing; a label with its option's text, an option's text (leftmost first,
    spaces aside), a label alone; at last all letters of the answer that are labels, in a row.
    """
    answer, texts = normalised(answer), [normalised(option) for option in options]
    labels = [label(number) for number in range(len(options))]
    if not answer:
        return "C"
    whole = [normalised(f"{key} {text}") for key, text in zip(labels, texts, strict=True)]
    if (at := _leftmost(answer, whole)) is not None:
        return whole[at][0].upper()
    dense = [normalised(text).replace(" ", "") for text in texts]
    at = _leftmost(answer.replace(" ", ""), dense)
    if at is not None and not set(dense[at]) & set(_SILENT):
        return labels[at]
    if len(answer) in (1, 2) and answer.upper() in labels:
        return answer.upper()
    return "".join(letter.upper() for letter in answer if letter.upper() in labels)


def label(number: int) -> str:
    """A to Z, then AA to AZ, then BA on."""
    row, column = divmod(number, 26)
    prefix = ("", "A", "B")[min(row, 2)]
    return prefix + (string.ascii_uppercase[column] if row < 3 else chr(65 + number - 52))


def _leftmost(text: str, parts: Sequence[str]) -> int | None:
    """The number of the part that occurs first; of several at one place, the first listed."""
    places = [(at, n) for n, part in enumerate(parts) if (at := text.find(part)) >= 0]
    return min(places)[1] if places else None


def _needle(answer: str, reference: str) -> float:
    return normalised(reference) in normalised(answer).split()


def _contained(answer: str, reference: str) -> float:
    return normalised(reference) in normalised(answer)


def _is_chosen(options: tuple[str, ...], answer: str, reference: str) -> float:
    place = [normalised(option) for option in options].index(normalised(reference))
    return chosen(answer, options) == label(place)


ROUGE = Metric("milebench_rouge_l", rouge_l)
"""Of open-ended questions."""
NEEDLE = Metric("milebench_needle", _needle)
"""1 if the reference is a word of the answer."""
CONTAINED = Metric("milebench_contained", _contained)
"""1 if the reference occurs in the answer (MMCoQA)."""


def choice(options: Sequence[str]) -> Metric:
    """1 where the answer chooses the option that is the reference's text."""
    return Metric("milebench_choice", partial(_is_chosen, tuple(options)))
