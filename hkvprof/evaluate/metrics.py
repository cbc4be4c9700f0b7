"""How an answer is scored against the correct ones: every metric lies in [0, 1]."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from hkvprof.lazy import require_extra

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
    return require_extra("rouge_score.rouge_scorer", "metrics").RougeScorer(["rougeL"])


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


def check_installed(metrics: Collection[Metric]) -> None:
    """Refuse before the model runs what would fail at its first answer.

    Raises UsageError where the package of a metric is missing.
    """
    if ROUGE_L in metrics:
        _rouge_scorer()


LETTERS = string.ascii_uppercase
"""Labels of options; with more options than letters there are none, and texts alone count."""

_OPEN, _CLOSE = r"[\s(\[*\"'`]*", r"[\s)\]*\"'`.:,]*"
_ALONE = re.compile(rf"{_OPEN}([A-Za-z]){_CLOSE}")
_LEAD = re.compile(rf"{_OPEN}([A-Z])\s*(?:[.:)\]*]|\n)")
_CUE = re.compile(r"\banswer\b(?:\s+(?:is|must be|should be|would be))?\s*:?([^\n.;]*)", re.I)
_SINGLE = re.compile(r"(?<![\w'-])([A-Z])(?![\w'-])")
_ARTICLE = re.compile(r"\s+(?!(?:is|or|and|because|since|but|would|seems|looks|as)\b)[a-z]")
_LIST = re.compile(r"\s*[.)\]]?\s*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+)?[(\[]?([A-Z])\b")


def multiple_choice(options: Sequence[str]) -> Metric:
    """1 where the answer chooses the right option, which the reference names by its letter.

    With more than 26 options, the reference is the option's text.
    """
    return Metric("multiple_choice", partial(_chooses, tuple(options)))


def _chooses(options: tuple[str, ...], answer: str, reference: str) -> float:
    labels = list(LETTERS[: len(options)]) if len(options) <= len(LETTERS) else list(options)
    return choose(answer, options) == labels.index(reference)


def choose(answer: str, options: Sequence[str]) -> int | None:
    """The number of the option that the answer chooses, None where it is none or several.

    In this order: the answer is a letter, or an option's text; it says what "the answer" is; it
    begins with a letter and a mark (`B.`); it names an option by text, by a letter, or by both.
    """
    letters = LETTERS[: len(options)] if len(options) <= len(LETTERS) else ""
    given = _bare(answer)
    exact = {i for i, option in enumerate(options) if given and given == _bare(option)}
    if alone := _letter(_ALONE.fullmatch(answer), letters):
        return letters.index(alone)
    if exact:
        return _only(exact)
    cued = [_cued(match[1], letters, options) for match in _CUE.finditer(answer)]
    if any(cued):
        return _only(set().union(*cued))
    lead = _LEAD.match(answer)
    if lead and _letter(lead, letters):
        return _led(answer, lead, letters, options)
    texts, rest = _named(answer, options)
    return _only(texts | _letters(rest, letters))


def _cued(text: str, letters: str, options: Sequence[str]) -> set[int]:
    """Options by letter, otherwise by text, in what is said to be the answer."""
    texts, rest = _named(text, options)
    return _letters(rest, letters) or texts


def _led(answer: str, lead: re.Match[str], letters: str, options: Sequence[str]) -> int | None:
    """The option whose letter begins the answer; none if it lists another or tells its text."""
    chosen = letters.index(lead[1])
    listed = _LIST.match(answer, lead.end(1))
    other = _letter(listed, letters)
    rest = fold(answer[lead.end() :]).strip("*)] ").rstrip(".")
    told = {i for i, option in enumerate(options) if rest and rest == _bare(option)}
    if (other and other != lead[1]) or (told and chosen not in told):
        return None
    return chosen


def _letters(text: str, letters: str) -> set[int]:
    """Options whose letter stands alone in the text; the article "A" and "I" do not count."""
    if alone := _letter(_ALONE.fullmatch(text), letters):
        return {letters.index(alone)}
    return {
        letters.index(match[1])
        for match in _SINGLE.finditer(text)
        if match[1] in letters and not (match[1] in "AI" and _ARTICLE.match(text, match.end()))
    }


def _letter(match: re.Match[str] | None, letters: str) -> str:
    """The option's letter that was matched, or nothing."""
    letter = match[1].upper() if match else ""
    return letter if letter in letters else ""


def _named(answer: str, options: Sequence[str]) -> tuple[set[int], str]:
    """Options whose words occur in the answer, the longest first, and the answer without them."""
    given = f" {words(answer)} "
    rest = answer
    found: set[int] = set()
    for number in sorted(range(len(options)), key=lambda i: -len(words(options[i]))):
        wanted = words(options[number])
        if wanted and f" {wanted} " in given:
            found.add(number)
            given = given.replace(f" {wanted} ", " | ")
            pattern = r"\W+".join(map(re.escape, wanted.split()))
            rest = re.sub(rf"\b{pattern}\b", "|", rest, flags=re.I)
    return found, rest


def _bare(text: str) -> str:
    return fold(text).rstrip(".")


def _only(found: set[int]) -> int | None:
    return next(iter(found)) if len(found) == 1 else None
