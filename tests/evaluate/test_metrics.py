"""Metrics against cases worked out by hand, and their properties."""

from __future__ import annotations

import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.evaluate.metrics import (
    ANLS,
    EXACT_MATCH,
    FORMULA,
    POSITIONS,
    ROUGE_L,
    SUBSTRING,
    WORDS,
    Metric,
    choose,
    edit_distance,
    multiple_choice,
)
from hkvprof.evaluate.records import Gold, TaskSet
from hkvprof.samples.read import Sample, Turn

TEXTS = (EXACT_MATCH, SUBSTRING, FORMULA, WORDS, ROUGE_L, ANLS)
ANIMALS = ("a cat", "a dog", "two red birds", "red")


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        (EXACT_MATCH, " yellow  cross\n", ("yellow cross",), 1),
        (EXACT_MATCH, "yellow cross yellow", ("yellow cross",), 0),
        (EXACT_MATCH, "Yellow cross", ("yellow cross",), 0),
        (EXACT_MATCH, "b", ("a", "b"), 1),
        (SUBSTRING, "It says CENTRE here.", ("centre",), 1),
        (SUBSTRING, "cen\ntre", ("cen tre",), 1),
        (SUBSTRING, "center", ("centre",), 0),
        (SUBSTRING, "anything", ("  ",), 0),
        (SUBSTRING, "about 2,411", ("2411", "2,411"), 1),
        (FORMULA, r"$x^{2}$", (r"x ^ { 2 }",), 1),
        (FORMULA, r"$X^{2}$", (r"x^{2}",), 0),
        (WORDS, "It is Nova-7, I think", ("nova 7",), 1),
        (WORDS, "supernova", ("nova",), 0),
        (WORDS, "nova", ("?",), 0),
        # the | cat | sat: precision 3/5, recall 3/3.
        (ROUGE_L, "The cat, it sat down!", ("the cat sat",), 2 * 0.6 / 1.6),
        (ROUGE_L, "sat cat the", ("the cat sat",), 1 / 3),
        (ROUGE_L, "dogs", ("the cat sat", "Dogs."), 1),
        (ROUGE_L, "", ("the cat",), 0),
        (ROUGE_L, "猫", ("猫",), 1),
        (ROUGE_L, "狗", ("猫",), 0),
        (ANLS, "1/8/93", ("1/8/93", "january"), 1),
        (ANLS, "1/9/93", ("1/8/93",), 1 - 1 / 6),
        (ANLS, " JANUARY ", ("january",), 1),
        (ANLS, "abcd", ("abxy",), 0),  # distance 2/4 is not below one half
        (ANLS, "abcde", ("abcxy",), 0.6),
        (ANLS, "", ("a",), 0),
        (ANLS, "the answer is january", ("january",), 0),
        (POSITIONS, "[1, 0, 2]", ("[1, 0, 2]",), 1),
        (POSITIONS, "There are [1, 3, 2, 9] of them.", ("[1, 0, 2]",), 2 / 3),
        (POSITIONS, "1, 0, 2", ("[1, 0, 2]",), 0),
        (POSITIONS, "[one] [1]", ("[1, 0]",), 0.5),
    ],
)
def test_scores_worked_out_by_hand(
    metric: Metric, answer: str, references: tuple[str, ...], score: float
) -> None:
    assert metric(answer, references) == pytest.approx(score)
    assert isinstance(metric(answer, references), float)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distances_known_from_textbooks(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


SHORT = st.text("ab c1", max_size=12)


@settings(deadline=None)
@given(first=SHORT, second=SHORT, third=SHORT)
def test_edit_distance_is_a_metric(first: str, second: str, third: str) -> None:
    assert edit_distance(first, second) == edit_distance(second, first)
    assert (edit_distance(first, second) == 0) == (first == second)
    through = edit_distance(first, third) + edit_distance(third, second)
    assert edit_distance(first, second) <= through


@settings(deadline=None)
@given(answer=st.text(max_size=30), references=st.lists(st.text(max_size=30), min_size=1))
def test_scores_lie_between_0_and_1_and_the_best_reference_counts(
    answer: str, references: list[str]
) -> None:
    for metric in TEXTS:
        score = metric(answer, tuple(references))
        assert 0 <= score <= 1
        assert score == max(metric(answer, (reference,)) for reference in references)


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=30).filter(lambda text: any(map(str.isalnum, text))))
def test_the_reference_itself_scores_1(text: str) -> None:
    for metric in TEXTS:
        assert metric(text, (text,)) == 1, metric.name


@settings(deadline=None)
@given(first=SHORT, second=SHORT)
def test_measures_of_likeness_are_symmetric(first: str, second: str) -> None:
    assert ANLS(first, (second,)) == ANLS(second, (first,))
    assert EXACT_MATCH(first, (second,)) == EXACT_MATCH(second, (first,))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=8),
    st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=8),
)
def test_rouge_l_is_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else best
    f1 = 2 * table[-1][-1] / (len(first) + len(second))
    assert ROUGE_L(" ".join(first), (" ".join(second),)) == pytest.approx(f1)


@given(answer=st.text(max_size=40), counts=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_lists_are_compared_place_by_place(answer: str, counts: list[int]) -> None:
    assert 0 <= POSITIONS(answer, (str(counts),)) <= 1
    assert POSITIONS(f"I see {counts}.", (str(counts),)) == 1
    assert POSITIONS(str([n + 1 for n in counts]), (str(counts),)) == 0


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("B.", 1),
        (" **B** ", 1),
        ("B. a dog", 1),
        ("B) a dog", 1),
        ("(b)", 1),
        ("Answer: C", 2),
        ("answer: (c)", 2),
        ("The answer is C.", 2),
        ("The correct answer must be **C**.", 2),
        ("Answer:\nC", 2),
        ("Looking at the image, the answer is (B), a dog.", 1),
        ("I would choose option D", 3),
        ("a dog", 1),
        ("A dog.", 1),
        ("It shows a cat.", 0),
        ("Two red birds are flying.", 2),
        ("red", 3),
        ("The answer is a dog", 1),
        ("A. Because option B is wrong.", 0),
        ("A is correct because it purrs.", 0),
        ("I see a dog", 1),
        ("It is D, red.", 3),
        # Nothing, something else, or more than one option:
        ("", None),
        ("E", None),
        ("none of them", None),
        ("a horse", None),
        ("I do not know", None),
        ("A fish", None),
        ("A or B", None),
        ("A, B", None),
        ("A. or B.", None),
        ("(A) and (B)", None),
        ("Both A and C are right", None),
        ("Answer: A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("a cat and a dog", None),
        ("A. a dog", None),
        ("I pick B since a cat is there", None),
        ("ABCD", None),
        ("A B C D", None),
    ],
)
def test_the_option_that_an_answer_chooses(answer: str, chosen: int | None) -> None:
    assert choose(answer, ANIMALS) == chosen


@pytest.mark.parametrize(
    ("answer", "options", "chosen"),
    [
        ("Vitamin C", ("vitamin c", "iron", "zinc"), 0),
        ("It is vitamin C.", ("vitamin c", "iron", "zinc"), 0),
        ("The answer is vitamin C", ("vitamin c", "iron", "zinc"), 0),
        ("4", ("2", "4", "8"), 1),
        ("There are 4.", ("2", "4", "8"), 1),
        ("14", ("2", "4", "8"), None),
        ("yes", ("yes", "no"), 0),
        ("same", ("same", "same"), None),
        ("", ("", "x"), None),
        ("B", ("", ""), 1),
        ("+", ("+", "-"), 0),
        ("B", ("x", "y") * 20, None),
        ("forty-first", (*(f"{n}th" for n in range(40)), "forty-first"), 40),
    ],
)
def test_options_by_their_texts(answer: str, options: tuple[str, ...], chosen: int | None) -> None:
    assert choose(answer, options) == chosen


def test_choices_are_scored_by_the_right_letter() -> None:
    metric = multiple_choice(ANIMALS)
    assert metric("(B)", ("B",)) == 1
    assert metric("(B)", ("A",)) == 0
    assert metric("A or B", ("A",)) == 0
    many = tuple(f"item {n}" for n in range(30))
    assert multiple_choice(many)("item 29", ("item 29",)) == 1
    assert multiple_choice(many)("B", ("item 1",)) == 0


@settings(deadline=None)
@given(
    options=st.lists(st.text(string.ascii_lowercase, min_size=3, max_size=8), min_size=2,
                     max_size=6, unique=True),
    data=st.data(),
)  # fmt: skip
def test_every_usual_form_of_an_answer_is_understood(
    options: list[str], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(options) - 1))
    letter, text = string.ascii_uppercase[number], options[number]
    forms = (letter, f"({letter})", f"{letter}.", f"{letter}. {text}", f"{letter}) {text}",
             text, f"Answer: {letter}", f"The answer is ({letter}).",
             text.capitalize() + ".")  # fmt: skip
    metric = multiple_choice(options)
    assert [metric(form, (letter,)) for form in forms] == [1] * len(forms)
    other = string.ascii_uppercase[(number + 1) % len(options)]
    assert choose(f"{letter} or {other}", options) is None


@settings(deadline=None)
@given(answer=st.text(max_size=60), options=st.lists(st.text(min_size=1, max_size=9), min_size=2))
def test_any_answer_chooses_one_option_or_none(answer: str, options: list[str]) -> None:
    chosen = choose(answer, options)
    assert chosen is None or 0 <= chosen < len(options)


# -- task sets ------------------------------------------------------------------------------------


def test_gold_is_the_samples_own_or_the_reply() -> None:
    message = ({"role": "user", "content": "?"},)
    plain = Sample("plain", "t", message, reply="yes", followups=(Turn("and?", "no"),))
    own = Sample("own", "t", message, reply="first", followups=(Turn("and?", "no"),))
    gold = Gold(("first", "second"), SUBSTRING)
    tasks = TaskSet("two", (plain, own), EXACT_MATCH, 8, {"own": gold})
    assert tasks.gold_of(plain, 0) == Gold(("yes",), EXACT_MATCH)
    assert tasks.gold_of(plain, 1) == Gold(("no",), EXACT_MATCH)
    assert tasks.gold_of(own, 0) is gold
    assert tasks.gold_of(own, 1) == Gold(("no",), EXACT_MATCH)
    assert (gold.score("the second"), gold.score("third")) == (1, 0)


def test_the_rouge_library_is_loaded_when_needed() -> None:
    code = "import hkvprof.evaluate.metrics, sys; print('rouge_score' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
