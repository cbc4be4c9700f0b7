"""Rows and targets of what follows a prompt, on tinyvl's chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hkvprof
from hkvprof.calibration.continuation import Continuation, build_continuation
from hkvprof.errors import SampleError
from hkvprof.samples.read import Sample, Turn
from hkvprof.testbed.generator import make_sample

_, PROCESSOR = hkvprof.load_model("tinyvl", dtype="float32", device="cpu")
SAMPLE = make_sample("list", 1, images=3, split="calibration", followups=2)


def words(ids: Any) -> list[str]:
    return PROCESSOR.tokenizer.convert_ids_to_tokens(list(map(int, ids)))


def build(sample: Sample, max_tokens: int = 192) -> Continuation:
    assert sample.reply is not None
    return build_continuation(PROCESSOR, sample, sample.reply, max_tokens)


def whole_conversation(sample: Sample) -> list[dict[str, Any]]:
    """Messages of all turns, the last reply included."""

    def text(value: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": value}]

    turns = [*sample.messages, {"role": "assistant", "content": text(sample.reply or "")}]
    for turn in sample.followups:
        turns.append({"role": "user", "content": text(turn.question)})
        turns.append({"role": "assistant", "content": text(turn.reply)})
    return turns


def test_ids_continue_the_prompt_to_the_whole_conversation() -> None:
    prompt = PROCESSOR.render(SAMPLE.messages, reply_next=True)
    whole = PROCESSOR.render(whole_conversation(SAMPLE), reply_next=False)
    expected = PROCESSOR.encode_text(whole)[len(PROCESSOR.encode_text(prompt)) :]
    assert build(SAMPLE).ids.tolist() == expected


def test_targets_are_the_replies_and_their_ends_without_the_first_token() -> None:
    """The prompt's last row predicts the first reply token: it is dense and not judged."""
    found = build(SAMPLE)
    replies = [SAMPLE.reply or "", *(turn.reply for turn in SAMPLE.followups)]
    spoken = [[*words(PROCESSOR.encode_text(reply)), "<|im_end|>"] for reply in replies]
    assert words(found.targets) == spoken[0][1:] + spoken[1] + spoken[2]
    assert words(found.ids[: len(spoken[0])]) == spoken[0]


def test_exact_marks_the_last_row_of_every_later_question() -> None:
    found = build(SAMPLE)
    exact = found.rows[found.exact]
    assert len(exact) == 2
    assert words(found.ids[exact]) == ["assistant", "assistant"]
    for row, turn in zip(exact.tolist(), SAMPLE.followups, strict=True):
        first = PROCESSOR.encode_text(turn.reply)[0]
        assert int(found.ids[row + 1]) == first
    # No other judged row belongs to a question: the token itself was spoken by the model.
    for row in found.rows[~found.exact].tolist():
        assert words([found.ids[row]])[0] not in ("user", "<|im_start|>", "assistant")


@settings(deadline=None, max_examples=40)
@given(
    replies=st.lists(
        st.lists(st.sampled_from(["red", "cross", "yes", "7", "B"]), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_rows_for_any_lengths_of_replies(replies: list[list[str]]) -> None:
    texts = [" ".join(reply) for reply in replies]
    sample = replace(
        SAMPLE,
        reply=texts[0],
        followups=tuple(Turn("how many images have a yellow cross", text) for text in texts[1:]),
    )
    found = build(sample)
    rows = found.rows.tolist()
    assert rows == sorted(set(rows))
    assert rows[-1] == len(found.ids) - 2  # the last row predicts the end of the last turn
    lengths = [len(PROCESSOR.encode_text(text)) for text in texts]
    assert len(rows) == lengths[0] + sum(length + 1 for length in lengths[1:])
    assert int(found.exact.sum()) == len(texts) - 1
    assert found.exact.shape == found.rows.shape


def test_a_reply_of_one_token_is_judged_by_its_end() -> None:
    found = build(replace(SAMPLE, reply="7", followups=()))
    assert words(found.ids) == ["7", "<|im_end|>"]
    assert found.rows.tolist() == [0]
    assert found.exact.tolist() == [False]
    assert words(found.targets) == ["<|im_end|>"]


def test_an_empty_reply_alone_leaves_nothing_to_judge() -> None:
    with pytest.raises(SampleError, match="calibration-list-000001"):
        build(replace(SAMPLE, reply="", followups=()))


def test_an_empty_reply_before_a_later_question_leaves_the_later_ones() -> None:
    found = build(replace(SAMPLE, reply="", followups=SAMPLE.followups[:1]))
    assert words(found.targets) == [
        *words(PROCESSOR.encode_text(SAMPLE.followups[0].reply)),
        "<|im_end|>",
    ]


def test_no_reply_begins_after_the_limit_and_no_question_stays_unanswered() -> None:
    one, two, three = (
        build(replace(SAMPLE, followups=SAMPLE.followups[:turns])).ids.tolist()
        for turns in range(3)
    )
    question = len(two) - len(PROCESSOR.encode_text(SAMPLE.followups[0].reply)) - 1
    assert build(SAMPLE, 1).ids.tolist() == one
    assert build(SAMPLE, len(one)).ids.tolist() == one
    assert build(SAMPLE, question).ids.tolist() == one
    assert build(SAMPLE, question + 1).ids.tolist() == two
    assert build(SAMPLE, len(two)).ids.tolist() == two
    assert build(SAMPLE, 10_000).ids.tolist() == three


class Forgetful:
    """A template that drops what the first reply said once there is a second question."""

    def __init__(self) -> None:
        self.tokenizer = PROCESSOR.tokenizer

    def render(self, conversation: Any, *, reply_next: bool) -> str:
        if len(conversation) > 2:
            conversation = conversation[:1] + conversation[2:]
        return PROCESSOR.render(conversation, reply_next=reply_next)

    def encode_text(self, text: str) -> list[int]:
        return PROCESSOR.encode_text(text)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(SampleError, match="rewrites earlier turns"):
        build_continuation(Forgetful(), SAMPLE, "7", 192)  # type: ignore[arg-type]
