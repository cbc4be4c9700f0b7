"""Prompts that the first pass has read are not read again, and nobody can tell from the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hkvprof.calibration import kept
from hkvprof.calibration.calibrate import Run
from hkvprof.calibration.continuation import MAX_REPLY_TOKENS
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.calibration.recipe import MEASURED, Replies
from hkvprof.samples.read import Sample, Turn, open_images
from tests.models.conversations import picture, user
from tests.models.families import processor_of, words
from tests.models.tiny import build_covered


def asked(number: int, side: int) -> Sample:
    """A sample with a picture of its own size, and a later question."""
    question = user(words(60 + number, number))
    shown = {"type": "image", "image": picture(side, 56, number)}
    message = {**question, "content": [shown, *question["content"]]}
    later = (Turn(words(4, number), words(6, number)),)
    return Sample(f"s{number}", "t", (message,), reply=words(5, number), followups=later)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of samples, as their prompts are read."""
    seen: list[str] = []
    work = Probe._prefill

    def count(self: Probe, *asked: Any) -> None:
        seen.append(self.sample.id)
        work(self, *asked)

    monkeypatch.setattr(Probe, "_prefill", count)
    return seen


@pytest.mark.parametrize(
    ("name", "replies", "readings"),
    [("qwen2.5-vl", "given", 1), ("qwen2.5-vl", "own", 1), ("gemma3", "given", 2),
     ("gemma3", "own", 2)],
)  # fmt: skip
def test_a_prompt_is_read_once_where_it_can_be_kept(
    name: str, replies: Replies, readings: int, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are the same to the bit, also with M-RoPE, whose offset is on the model; layers with a
    sliding window cannot go back to the prompt."""
    model = build_covered(name)
    processor, _ = processor_of(name, model)
    probed = ProbedModel.of(model, processor, replace(MEASURED, replies=replies))
    samples = [asked(number, side) for number, side in enumerate((56, 112, 84))]
    _, rows = Run(probed).measure(samples, samples)
    assert sorted(read) == sorted([sample.id for sample in samples] * readings)
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    read.clear()
    _, again = Run(probed).measure(samples, samples)
    assert len(read) == 2 * len(samples)
    for one, other in zip(rows, again, strict=True):
        ours, theirs = one.tensors(), other.tensors()
        assert {key: value.tobytes() for key, value in ours.items()} == {
            key: value.tobytes() for key, value in theirs.items()
        }


def test_no_more_is_kept_than_there_is_room_for(
    read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of samples that another process measures."""
    model = build_covered("qwen2.5-vl")
    processor, _ = processor_of("qwen2.5-vl", model)
    probed = ProbedModel.of(model, processor, MEASURED)
    samples = [asked(number, 56) for number in range(4)]
    tokens = Probe(probed, samples[0]).encoded.tokens
    monkeypatch.setattr(kept, "KEPT_BYTES", 3 * tokens * 2 * 2 * 2 * 16 * 4)
    Run(probed).measure(samples, samples[1:])
    assert read.count("s0") == 1
    assert 4 < len(read) < 4 + 3


def test_own_replies_are_those_of_generate() -> None:
    """Also where layers cannot be cropped: full sliding windows."""
    model = build_covered("gemma3")
    processor, _ = processor_of("gemma3", model)
    probed = ProbedModel.of(model, processor, replace(MEASURED, replies="own"))
    sample = asked(0, 56)
    Run(probed).measure([sample], [sample])
    inputs = processor.encode([open_images(sample)]).to(model.device, model.dtype)
    made = model.generate(
        **inputs, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
    )  # fmt: skip
    reply = made[0, inputs["input_ids"].shape[1] :]
    assert probed.answered["s0"].reply == processor.decode(reply)
