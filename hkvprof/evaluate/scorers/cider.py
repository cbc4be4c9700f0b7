"""CIDEr-D of captions against several that people wrote (arXiv 1411.5726).

Equal to github.com/salaniz/pycocoevalcap (cider/cider_scorer.py), whose captions are cut into words
by Stanford's tokenizer (tokenizer/ptbtokenizer.py) before they are scored; `caption_words` does
that for plain English.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

LONGEST = 4
"""Words of the longest n-gram."""
_WIDTH = 6.0
"""Standard deviation of the penalty on differing lengths, in words."""
Gram = tuple[str, ...]

_ENDINGS = r"'(?:s|m|d|ll|re|ve)"
_JOINED = ("can|not", "gon|na", "wan|na", "got|ta", "gim|me", "lem|me")
_SPLIT = {pair.replace("|", ""): pair.split("|") for pair in _JOINED}
_ABBREVIATIONS = r"(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|u\.s|a\.m|p\.m|e\.g|i\.e)\."
_TOKEN = re.compile(
    rf"{_ABBREVIATIONS}(?=\s|$)|'n'|n't\b|{_ENDINGS}\b|[a-z]+(?=n't\b)|\d+(?:[.,:/]\d+)+|"
    r"[^\W_]+(?:[-&/@.][^\W_]+)*|\S"
)
_WORD = re.compile(r"\w")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
"""Brackets count as words: only their names in capitals are taken out, and these are not."""


def caption_words(caption: str) -> list[str]:
    """The words of a caption in lower case, contractions apart, without punctuation."""
    tokens = _TOKEN.findall(caption.lower().replace("’", "'"))
    named = [_BRACKETS.get(token, token) for token in tokens]
    kept = [token for token in named if _WORD.search(token) or token in "$%&#@+=*"]
    return [piece for token in kept for piece in _SPLIT.get(token, [token])]


@dataclass(frozen=True)
class _Weighted:
    """A sentence's n-grams weighted by how rare they are, with norms by n; `length` in bigrams."""

    weights: Mapping[Gram, float]
    norms: NDArray[np.float64]
    length: int


def cider(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The score of every caption, by id; what papers give is their mean.

    How rare an n-gram is, is counted over the references of these ids. Of one id alone all scores
    are 0: nothing is rare there.
    """
    wanted = {name: [_grams(caption_words(r)) for r in references[name]] for name in captions}
    occurs = Counter(gram for sentences in wanted.values() for gram in set().union(*sentences))
    total = math.log(max(len(wanted), 1))
    return {
        name: _score(
            _weigh(_grams(caption_words(caption)), occurs, total),
            [_weigh(grams, occurs, total) for grams in wanted[name]],
        )
        for name, caption in captions.items()
    }


def _grams(words: Sequence[str]) -> Counter[Gram]:
    return Counter(
        tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1)
    )


def _weigh(grams: Counter[Gram], occurs: Counter[Gram], total: float) -> _Weighted:
    weights = {g: count * (total - math.log(max(1, occurs[g]))) for g, count in grams.items()}
    squares = np.zeros(LONGEST)
    for gram, weight in weights.items():
        squares[len(gram) - 1] += weight**2
    length = sum(count for gram, count in grams.items() if len(gram) == 2)
    return _Weighted(weights, np.sqrt(squares), length)


def _score(given: _Weighted, references: Sequence[_Weighted]) -> float:
    """Ten times the mean over references and n of the clipped, penalised cosine."""
    return 10 * fmean(float(_similar(given, reference).mean()) for reference in references)


def _similar(given: _Weighted, reference: _Weighted) -> NDArray[np.float64]:
    value = np.zeros(LONGEST)
    for gram, weight in given.weights.items():
        other = reference.weights.get(gram, 0.0)
        value[len(gram) - 1] += min(weight, other) * other
    norms = given.norms * reference.norms
    value = np.divide(value, norms, out=value, where=norms != 0)
    gap = given.length - reference.length
    penalised: NDArray[np.float64] = value * math.exp(-(gap**2) / (2 * _WIDTH**2))
    return penalised
