"""WUPS on cases whose lemmas, similarities and scores the reference implementation gave.

Results: github.com/doc-doc/NExT-OE at commit a83f8f5 (metrics.get_wups, eval_oe.remove_stop), with
pywsd 1.3.0's lemmatize_sentence on WordNet 3.0.
"""

from __future__ import annotations

import pytest

from hkvprof.errors import UsageError
from hkvprof.evaluate.scorers import wups

NEAR = {
    "jump|jump": 1.0, "jump|out": 0.5, "over|jump": 0.35294117647058826,
    "over|out": 0.35294117647058826,
    "use|pull": 0.7142857142857143, "use|out": 0.6666666666666666, "bottle|pull": 0.125,
    "bottle|out": 0.11764705882352941,
    "reach|laugh": 0.14285714285714285, "out|laugh": 0.2857142857142857,
    "eat|accumulate": 0.25, "eat|residue": 0.25, "eat|side": 0.2,
    "food|accumulate": 0.18181818181818182, "food|residue": 0.6666666666666666,
    "food|side": 0.36363636363636365,
}  # fmt: skip
"""Wu-Palmer similarities of WordNet 3.0, by nltk."""
CASES = [
    ("jump over", "jumps out", "jump over", "jump out", 0.35294117647058826),
    ("use bottle", "pulled it out", "use bottle", "pull out", 0.08928571428571429),
    ("reach out to", "laugh", "reach out", "laugh", 0.04081632653061224),
    ("to eat the food", "accumulate residue to side", "eat food", "accumulate residue side",
     0.06060606060606061),
]  # fmt: skip
"""Answer, reference, the content words of both, and WUPS at 0."""


def near(first: str, second: str) -> float:
    return NEAR.get(f"{first}|{second}", NEAR.get(f"{second}|{first}", 0.0))


@pytest.mark.parametrize(("answer", "reference", "said", "wanted", "score"), CASES)
def test_scores_of_the_reference_implementation(
    answer: str, reference: str, said: str, wanted: str, score: float
) -> None:
    assert wups.wups(said.split(), wanted.split(), near) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(("answer", "reference", "said", "wanted", "score"), CASES)
def test_the_same_with_nltk_and_wordnet(
    answer: str, reference: str, said: str, wanted: str, score: float
) -> None:
    try:
        wups.check_wordnet()
    except UsageError as error:
        pytest.skip(f"not compared with WordNet itself: {error}")
    assert (wups.content_words(answer), wups.content_words(reference)) == (
        said.split(), wanted.split(),
    )  # fmt: skip
    assert wups.WUPS(answer, (reference,)) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [("", "no", 0.0), ("no", "", 0.0), ("", "", 0.0), ("cat", "dog", 0.0), ("dog", "dog", 1.0)],
)
def test_words_that_are_near_to_nothing(said: str, wanted: str, score: float) -> None:
    same = float
    assert wups.wups(said.split(), wanted.split(), lambda a, b: same(a == b)) == score


def test_stop_words_are_those_of_the_benchmark() -> None:
    """Negations, numbers and places count; its list has 156 words."""
    assert not {"no", "not", "nor", "in", "on", "up", "down", "off", "under"} & wups.STOP_WORDS
    assert {"the", "won't", "you're", "mightn", "ain"} <= wups.STOP_WORDS
    assert len(wups.STOP_WORDS) == 156


def test_missing_data_is_told_with_the_command_that_gets_it() -> None:
    class Nothing:
        @staticmethod
        def find(name: str) -> None:
            raise LookupError(name)

    class Nltk:
        data = Nothing

    assert not wups._has(Nltk, "corpora/wordnet")
