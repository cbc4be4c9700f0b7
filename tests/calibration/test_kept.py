"""Prompts that the first pass has read are not read again, and nobody can tell from the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hkvprof.calibration import kept
from hkvprof.calibration.calibrate import Run
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.calibration.recipe import MEASURED, Replies
from hkvprof.samples.read import Sample, Turn
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
    [("qwen2.5-vl", "given", 1), ("qwen2.5-vl", "own", 1), ("gemma3", "given", 2)],
)
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
