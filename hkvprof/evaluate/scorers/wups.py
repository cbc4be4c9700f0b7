"""WUPS of NExT-QA's open-ended answers: how near the words of two short answers are in WordNet.

Equal to github.com/doc-doc/NExT-OE (metrics.py, eval_oe.py): words are lemmatised as pywsd does it
and stop words of their own list dropped; yes-no and counting questions are right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

from hkvprof.errors import UsageError
from hkvprof.evaluate.metrics import Metric
from hkvprof.lazy import require_extra

EXACT_TYPES = ("DB", "DC")
"""Types of question that are right or wrong: yes or no, and counting."""
DATA = ("wordnet", "averaged_perceptron_tagger_eng", "punkt_tab")
"""What nltk needs to have downloaded."""
_PLACES = ("corpora/wordnet", "taggers/averaged_perceptron_tagger_eng", "tokenizers/punkt_tab")

_FUNCTION_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
hers herself it its itself they them their theirs themselves this that these those what which who
whom
am is are was were be been being have has had having do does did doing can will should
a an the and but if or because as until while to from of at for with about into through during
again further then here there when where why how all any each most other some such only own so than
too very just now s t d ll m o re ve y ma ain
you're you've you'll you'd she's it's that'll should've
"""
_NEGATED = """
aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn
"""
STOP_WORDS = frozenset(
    {*_FUNCTION_WORDS.split(), *_NEGATED.split(), *(f"{word}'t" for word in _NEGATED.split())}
)
"""The list of NExT-OE's stopwords.txt: function words, without negations, numbers and places."""

Similarity = Callable[[str, str], float]


def wups(answer: Sequence[str], reference: Sequence[str], similarity: Similarity) -> float:
    """The lesser of both directions: of every word the nearest on the other side, multiplied.

    Words that are near to none do not count; 0 where none is.
    """
    return min(_directed(answer, reference, similarity), _directed(reference, answer, similarity))


def _directed(words: Sequence[str], others: Sequence[str], similarity: Similarity) -> float:
    product, found = 1.0, False
    for word in words:
        nearest = max((similarity(word, other) for other in others), default=0.0)
        if nearest > 0:
            product, found = product * nearest, True
    return product if found else 0.0


def content_words(sentence: str) -> list[str]:
    """Lemmas without stop words. Raises UsageError where nltk or its data are missing."""
    return [lemma for lemma in _lemmas(sentence) if lemma not in STOP_WORDS]


def similar(first: str, second: str) -> float:
    """Wu-Palmer similarity of the first senses of two words; 0 for what WordNet does not know."""
    if first == second:
        return 1.0
    one, other = _first_sense(first), _first_sense(second)
    return 0.0 if one is None or other is None else float(one.wup_similarity(other) or 0.0)


@lru_cache(maxsize=100_000)
def _first_sense(word: str) -> Any:
    return next(iter(_nltk().corpus.wordnet.synsets(word)), None)


def _lemmas(sentence: str) -> list[str]:
    nltk = _nltk()
    cut = nltk.tokenize.TreebankWordTokenizer().tokenize
    tokens = [token for part in nltk.sent_tokenize(sentence) for token in cut(part)]
    return [_lemma(word.lower(), tag) for word, tag in nltk.pos_tag(tokens)]


def _lemma(word: str, tag: str) -> str:
    """The lemma that WordNet knows, else the stem that it knows, else the word."""
    nltk = _nltk()
    kind = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}.get(tag[:2], "n")
    lemma = str(nltk.stem.WordNetLemmatizer().lemmatize(word, pos=kind))
    if _first_sense(lemma) is not None:
        return lemma
    stem = str(nltk.stem.PorterStemmer().stem(word))
    return stem if _first_sense(stem) is not None else word


@cache
def _nltk() -> Any:
    """nltk with its data. Raises UsageError, which says what to download."""
    nltk = require_extra("nltk", "metrics")
    missing = [name for name, place in zip(DATA, _PLACES, strict=True) if not _has(nltk, place)]
    if missing:
        raise UsageError(
            f"WUPS needs {', '.join(missing)} of nltk's data, found nothing in NLTK_DATA or the "
            f"usual places: python -m nltk.downloader {' '.join(missing)}"
        )
    return nltk


def _has(nltk: Any, place: str) -> bool:
    for name in (place, f"{place}.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return True
    return False


def _score(answer: str, reference: str) -> float:
    return wups(content_words(answer), content_words(reference), similar)


def _same(answer: str, reference: str) -> float:
    return content_words(answer) == content_words(reference)


WUPS = Metric("wups", _score)
WUPS_EXACT = Metric("wups_exact", _same)
"""Of yes-no and counting questions: the same content words."""


def check_wordnet() -> None:
    """Refuse before the model runs. Raises UsageError where nltk or its data are missing."""
    _nltk()
