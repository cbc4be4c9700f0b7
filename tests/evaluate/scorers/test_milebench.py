"""MileBench's scores on cases whose results evaluate.py itself gave.

Results: github.com/MileBench/MileBench, evaluate.py at commit 9583e1f, class Eval (process,
match_choice), with rouge 1.0.1.
"""

from __future__ import annotations

import pytest

from hkvprof.evaluate.scorers import milebench

OPTIONS = ["a red disc", "a blue square", "red"]
SILENT = ["$5", "5.5", "no"]
NUMBERS = [str(number) for number in range(30)]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("The Cat, sat. On the mat!\n", "the cat sat on the mat"),
        ("1,000 red-hat people", "1000 redhat people"),
        ("red-hat people", "red hat people"),
        ("a.b 3.5 end.", "ab 3.5 end"),
        ("'quoted' answer'", "quoted' answer"),
        ("x/y (z) -w", "x y z w"),
    ],
)
def test_normalised_text(text: str, result: str) -> None:
    assert milebench.normalised(text) == result


@pytest.mark.parametrize(
    ("answer", "reference", "result"),
    [
        ("the blue cube moved to the left", "the blue cube moved", 0.7999999952000001),
        ("A man. A dog, a man.", "a man and a dog", 0.8571428522448981),
        ("the the the", "the cat", 0.6666666622222223),
        ("version 1.5 of it", "it is version 1.5", 0.7999999950000002),
        ("left right left", "right left right left", 0.999999995),
        ("dog", "cat", 0.0),
        ("He takes it. Then he goes.", "He takes the apple. Then he goes to the sink.",
         0.6153846106508877),
        ("", "cat", 0.0),
        ("...", "cat", 0.0),
    ],
)  # fmt: skip
def test_rouge(answer: str, reference: str, result: float) -> None:
    assert milebench.ROUGE(answer, (reference,)) == pytest.approx(result, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "options", "result"),
    [
        ("B", OPTIONS, "B"),
        ("b. a blue square", OPTIONS, "B"),
        ("It is a blue square, not a red disc", OPTIONS, "B"),
        ("", OPTIONS, "C"),
        ("disc", OPTIONS, "C"),
        ("C) red", OPTIONS, "C"),
        ("The answer is B", OPTIONS, "AB"),
        ("redred", OPTIONS, "C"),
        ("AB", OPTIONS, "AB"),
        ("A", SILENT, "A"),
        ("$5", SILENT, ""),
        ("it is 5.5", SILENT, ""),
        ("quoted", ["quoted'", "x"], "A"),
        ("27", NUMBERS, "C"),
        ("aa", [f"w{number:02d}" for number in range(30)], "AA"),
    ],
)
def test_the_chosen_option(answer: str, options: list[str], result: str) -> None:
    assert milebench.chosen(answer, options) == result


def test_choices_are_scored_by_their_text() -> None:
    metric = milebench.choice(OPTIONS)
    assert metric("B", ("A blue square",)) == 1
    assert metric("It is B", ("A blue square",)) == 1
    assert metric("The answer is B", ("A blue square",)) == 0, "its A counts too"
    assert metric("", ("red",)) == 1, "nothing said is C"


def test_needles_are_whole_words_and_answers_contain() -> None:
    assert milebench.NEEDLE("The code is 42.", ("42",)) == 1
    assert milebench.NEEDLE("The code is 421.", ("42",)) == 0
    assert milebench.NEEDLE("The code is A 42", ("a 42",)) == 0, "two words are never one"
    assert milebench.CONTAINED("It is in New York City.", ("new york",)) == 1
