"""Prompts of the calibration split, for baselines that fit something once per model."""

from __future__ import annotations

from typing import Any

from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.evaluate.records import TaskSet
from hkvprof.models.processing import ChatProcessor
from hkvprof.samples.read import open_images

PROMPTS, TOKENS = 6, 1500


def calibration_prompts(model: Any, processor: ChatProcessor, tasks: TaskSet) -> list[Prefill]:
    """Six prompts of another split than what is judged: tinyvl's own, or prose of 1500 tokens."""
    if tasks.name == "tinyvl":
        from hkvprof.testbed.generator import TASKS, make_sample

        samples = [
            make_sample(task, 0, images=16, split="calibration") for task in list(TASKS)[:PROMPTS]
        ]
    else:
        from hkvprof.evaluate.longtext import make_samples

        samples = make_samples(
            PROMPTS, (TOKENS, TOKENS), "calibration",
            count_tokens=lambda text: len(processor.encode_text(text)),
        )  # fmt: skip
    return [capture(model, processor.encode([open_images(sample)])) for sample in samples]
