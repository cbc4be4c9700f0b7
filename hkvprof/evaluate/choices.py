"""Which option an answer in free text chooses. What is ambiguous chooses none."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import partial

from hkvprof.evaluate.metrics import Metric, fold, words

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
