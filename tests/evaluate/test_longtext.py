"""Long-text samples: deterministic, split by text, of the right length, answer where planted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import UsageError
from hkvprof.evaluate import longtext
from hkvprof.evaluate.longtext import (
    JOINT,
    MAX_FOLLOWUPS,
    PARTS,
    SPLITS,
    TASKS,
    count_words,
    is_correct,
    make_sample,
    make_samples,
    paragraphs,
    parse_range,
    split_sentences,
)
from hkvprof.samples.read import Sample, load_samples

SHIPPED = Path(__file__).parents[2] / "calibration" / "longtext" / "samples.jsonl"


def context_of(sample: Sample) -> str:
    return str(sample.messages[0]["content"][0]["text"])


def question_of(sample: Sample) -> str:
    return str(sample.messages[0]["content"][1]["text"])


def depth_of(sample: Sample) -> float:
    """Relative position of the answer in the context."""
    assert sample.reply is not None
    return context_of(sample).index(sample.reply) / len(context_of(sample))


any_sample = {
    "task": st.sampled_from(TASKS),
    "index": st.integers(0, 5000),
    "tokens": st.integers(600, 4000),
    "split": st.sampled_from(SPLITS),
    "followups": st.integers(0, MAX_FOLLOWUPS),
}


@settings(max_examples=120, deadline=None)
@given(**any_sample)
def test_length_and_answers(task: str, index: int, tokens: int, split: str, followups: int) -> None:
    sample = make_sample(task, index, tokens, split, followups)
    context, question = context_of(sample), question_of(sample)
    assert count_words(context + JOINT + question) == pytest.approx(tokens, rel=0.03)
    assert sample.id == f"{split}-{task}-{index:06d}"
    assert sample.messages[0]["content"][0]["modality"] == "context"
    assert len(sample.followups) == followups
    replies = [turn.reply for turn in sample.followups]
    replies += sample.reply.split(PARTS) if sample.reply else []
    for reply in replies:
        assert context.count(reply) == 1
        assert reply not in question
    questions = [question, *(turn.question for turn in sample.followups)]
    assert len(set(questions)) == len(questions)
    assert (sample.reply is None) == (task == "continuation")


@settings(max_examples=20, deadline=None)
@given(**any_sample)
def test_same_arguments_give_the_same_sample(
    task: str, index: int, tokens: int, split: str, followups: int
) -> None:
    arguments = (task, index, tokens, split, followups)
    assert make_sample(*arguments) == make_sample(*arguments)


@settings(max_examples=20, deadline=None)
@given(**any_sample)
def test_filler_comes_from_the_split_alone(
    task: str, index: int, tokens: int, split: str, followups: int
) -> None:
    own = paragraphs(split)
    other = set(paragraphs(SPLITS[1 - SPLITS.index(split)]))
    pieces = context_of(make_sample(task, index, tokens, split, followups)).split(JOINT)
    assert not other.intersection(pieces)
    strangers = [piece for piece in pieces if piece not in own]
    planted = followups + (task not in ("continuation", "prose_qa"))
    assert len(strangers) <= planted + 1  # the last paragraph may be cut


def test_splits_share_no_paragraph_and_no_long_sentence() -> None:
    sentences = [
        {s for text in paragraphs(split) for s in split_sentences(text) if len(s) >= 50}
        for split in SPLITS
    ]
    assert not sentences[0] & sentences[1]
    assert not set(paragraphs(SPLITS[0])) & set(paragraphs(SPLITS[1]))
    assert all(sum(map(len, paragraphs(split))) > 80_000 for split in SPLITS)
    assert len(set(paragraphs("heldout"))) == len(paragraphs("heldout"))


def test_every_topic_lies_in_one_split() -> None:
    assert {longtext.split_of(name) for name in longtext.topics()} == set(SPLITS)
    total = sum(len(paragraphs(split)) for split in SPLITS)
    assert total == sum(len(texts) for texts in longtext.topics().values())


def test_needles_are_spread_over_the_whole_context() -> None:
    depths = sorted(depth_of(make_sample("passkey", index)) for index in range(60))
    for expected, depth in enumerate(depths):
        assert depth == pytest.approx((expected + 0.5) / 60, abs=0.06)


def test_followup_needles_lie_apart() -> None:
    sample = make_sample("passkey", 7, followups=3)
    context = context_of(sample)
    places = sorted(context.index(turn.reply) / len(context) for turn in sample.followups)
    places = sorted([*places, depth_of(sample)])
    assert all(later - earlier > 0.15 for earlier, later in pairwise(places))


def test_prose_question_asks_for_the_next_sentence() -> None:
    sample = make_sample("prose_qa", 3)
    assert sample.reply is not None
    opening = question_of(sample).split(": ", 1)[1]
    text = context_of(sample)
    between = text[text.index(opening) : text.index(sample.reply)]
    assert len(split_sentences(between.strip())) == 1
    assert JOINT not in between


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("The phone number is 555 0142.", "555-0142", True),
        ('It is "Amber  Falcon\nRiver".', "amber falcon river", True),
        ("The codes are 4821 and 9920.", "9920; 4821", True),
        ("The code is 4821.", "9920; 4821", False),
        ("The passkey is 482153.", "48215", False),
        ("", "48215", False),
    ],
)
def test_judging(answer: str, reply: str, right: bool) -> None:
    assert is_correct(answer, reply) is right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "riddle"}, "expected a task among passkey"),
        ({"task": "passkey", "tokens": 100}, "at least 600 tokens"),
        ({"task": "passkey", "followups": 9}, "0 to 3 follow-ups"),
        ({"task": "passkey", "split": "train"}, "expected a split among"),
        ({"task": "passkey", "tokens": 10**6}, "Ask for shorter samples"),
    ],
)
def test_impossible_requests_say_what_is_possible(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_sample(**{"index": 0, **arguments})


def test_lookalike_facts_are_drawn_again() -> None:
    index = next(i for i in range(10_000) if not longtext._is_clear(drawn("kv", i)))
    assert longtext._is_clear(make_sample("kv", index, 600, "heldout", 3))


def drawn(task: str, index: int) -> Sample:
    """The first attempt at a sample."""
    rng = Random(f"longtext heldout {task} {index}")
    return longtext._draw(task, index, 600, "heldout", 3, count_words, rng)


def test_shipped_set_is_what_the_command_makes() -> None:
    """Same facts and questions; the lengths depend on the tokenizer, which is not needed here."""
    samples = load_samples(str(SHIPPED)).samples
    again = make_samples(len(samples), (2000, 4000), "calibration")
    assert [s.id for s in samples] == [s.id for s in again]
    asked = [(s.reply, s.followups) for s in samples if s.task not in ("copy", "prose_qa")]
    assert asked == [(s.reply, s.followups) for s in again if s.task not in ("copy", "prose_qa")]
    assert SHIPPED.stat().st_size < 1_500_000


def test_token_ranges() -> None:
    assert parse_range("2000-4000") == (2000, 4000)
    assert parse_range("2500") == (2500, 2500)
    for wrong in ("", "4000-2000", "many", "10-20"):
        with pytest.raises(UsageError, match="--tokens like"):
            parse_range(wrong)
