"""CIDEr on cases whose results the reference implementation gave.

Results: pycocoevalcap 1.2, PTBTokenizer (Stanford's jar) and Cider. On all 1,000 captions of its
example/captions_val2014_fakecap_results.json the words are the same as well.
"""

from __future__ import annotations

import pytest

from hkvprof.evaluate.scorers.cider import caption_words, cider

REFERENCES = {
    "horse": ["A man is riding a horse on the beach.", "a man rides a brown horse by the sea",
              "Someone's on a horse."],
    "dogs": ["Two dogs play with a ball.", "two dogs are playing in the park",
             "dogs run after a red ball"],
    "onion": ["A woman cuts an onion.", "a woman isn't crying while she cuts onions",
              "the cook slices an onion, quickly"],
}  # fmt: skip
CAPTIONS = {
    "horse": "a man is riding a horse",
    "dogs": "Two dogs are playing with a red ball in the park.",
    "onion": "A man drives a car.",
}


def test_scores_of_the_reference_implementation() -> None:
    found = cider(CAPTIONS, REFERENCES)
    assert found["horse"] == pytest.approx(3.103144736663703, abs=1e-12)
    assert found["dogs"] == pytest.approx(2.437689309869945, abs=1e-12)
    assert found["onion"] == 0


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog can't run, it doesn't want to.",
         "a man 's dog ca n't run it does n't want to"),
        ("Two people (a man) are sitting; they talk.",
         "two people -lrb- a man -rrb- are sitting they talk"),
        ('He said "hello" to Mr. Smith at 5:30 p.m. in the U.S.',
         "he said hello to mr. smith at 5:30 p.m. in the u.s."),
        ("A black-and-white cat -- very cute -- sleeps...",
         "a black-and-white cat very cute sleeps"),
        ("I cannot believe they're gonna win!", "i can not believe they 're gon na win"),
        ("The girls' team wins 1,000 dollars & a $20 prize.",
         "the girls team wins 1,000 dollars & a $ 20 prize"),
        ("A boy is running. The dog chases him.", "a boy is running the dog chases him"),
        ("well-known rock'n'roll star #1 plays", "well-known rock 'n' roll star # 1 plays"),
    ],
)  # fmt: skip
def test_words_of_captions(caption: str, words: str) -> None:
    assert " ".join(caption_words(caption)) == words


def test_a_single_caption_has_no_rare_words() -> None:
    assert cider({"one": "a man"}, {"one": ["a man"]}) == {"one": 0}


def test_only_captions_that_are_there_count() -> None:
    two = {name: CAPTIONS[name] for name in ("horse", "dogs")}
    assert cider(two, REFERENCES) == cider(two, {name: REFERENCES[name] for name in two})


def test_nothing_said_scores_nothing() -> None:
    assert cider({**CAPTIONS, "horse": ""}, REFERENCES)["horse"] == 0
