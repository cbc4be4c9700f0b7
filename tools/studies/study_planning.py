"""What roots of losses, and dealing a part of budgets evenly, are worth on tinyvl, equal bytes.

    python -m tools.studies.study_planning [--per-task 8] [--variants fourth,root,...]
                                        [--budgets 0.2,0.1,0.05,0.03] [--first-seed 6000]

Measures 64 samples of calibration/mini once (kept in --rows, if given), decides anew per variant,
and answers questions of the calibration split (never the held-out one) through the product's
runtime. The dense model's continuation is forced token by token: KL is mean KL(full || compressed)
in nats, and an answer is right when the whole greedy reply is. Prints a markdown table;
docs/experiments.md quotes it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch

import hkvprof
from hkvprof.calibration import decide
from hkvprof.calibration.calibrate import measure
from hkvprof.calibration.merge import merge
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.evaluate.replay import Lead, Reference, answer, end_tokens, refer, replay
from hkvprof.heads import Rules
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.samples.read import load_samples
from hkvprof.testbed.generator import make_sample
from tools.tinyvl.accuracy import same_reply

TASKS = ("ocr", "list", "find", "diff", "kv")
FIRST_SEED = 6000
STEPS, ANSWER_TOKENS = 24, 16

Question = tuple[str, Prefill, Reference]
VARIANTS = {
    "fourth": ("fourth roots of mean squares (as shipped)", 0.25, 0.0),
    "root": ("square roots", 0.5, 0.0),
    "fourth75": ("fourth roots, three quarters dealt evenly", 0.25, 0.75),
    "root75": ("square roots, three quarters dealt evenly", 0.5, 0.75),
    "even": ("all dealt evenly", 0.5, 1.0),
}
"""Name, the root that is taken (decide.POWER), and the part that is dealt evenly."""


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-task", type=int, default=8)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budgets", default="0.2,0.1,0.05,0.03")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--rows", type=Path, help="folder for the measured samples")
    options = parser.parse_args()
    budgets = [float(text) for text in options.budgets.split(",")]
    torch.set_num_threads(1)
    model, processor = hkvprof.load_model("tinyvl")
    with tempfile.TemporaryDirectory() as folder:
        rows = options.rows or Path(folder)
        measure(model, processor, load_samples("calibration/mini", max_samples=64).samples, rows)
        profiles = {name: _decided(rows, name) for name in options.variants.split(",")}
    questions = _questions(model, processor, options.per_task, options.first_seed)
    tokens = [prompt.tokens for _, prompt, _ in questions]
    out = sys.stdout
    out.write(f"{len(questions)} questions, {min(tokens)} to {max(tokens)} tokens; KL / right\n\n")
    out.write("| variant | " + " | ".join(f"{b:.0%}" for b in budgets) + " |\n")
    out.write("|---|" + "---|" * len(budgets) + "\n")
    for name, profile in profiles.items():
        cells = [_cell(model, processor, profile, budget, questions) for budget in budgets]
        out.write(f"| {VARIANTS[name][0]} | " + " | ".join(cells) + " |\n")
        out.flush()


def _decided(rows: Path, name: str) -> Profile:
    """The profile of a variant."""
    _, power, even = VARIANTS[name]
    with mock.patch.object(decide, "POWER", power):
        return replace(merge([rows]), rules=Rules(even))


@torch.no_grad()
def _questions(model: Any, processor: Any, per_task: int, first_seed: int) -> Sequence[Question]:
    """The right reply, the prompt, and what the full cache says to it."""
    ends, questions = end_tokens(model, processor), []
    for task in TASKS:
        for i in range(per_task):
            sample = make_sample(task, first_seed + i, images=(12, 16)[i % 2], split="calibration")
            prompt = capture(model, processor.encode([sample.messages]))
            prompt.restore(model)
            full = refer(
                model, prompt.dense_cache(), prompt.logits[0], Lead(), ends, STEPS, ANSWER_TOKENS
            )
            questions.append((sample.reply or "", prompt, full))
    return questions


@torch.no_grad()
def _cell(
    model: Any, processor: Any, profile: Profile, budget: float, questions: Sequence[Question]
) -> str:
    """KL and the share of right answers."""
    ends, kls, right = end_tokens(model, processor), [], []
    with apply(model, profile, budget=budget) as handle:
        for expected, prompt, full in questions:

            def filled(prompt: Prefill = prompt) -> Any:
                cache = handle.new_cache()
                prompt.fill(cache)
                return cache

            prompt.restore(model)
            distance, left = replay(model, filled(), prompt.logits[0], Lead(), full, stepwise=True)
            kls.append(distance.kl)
            ids = full.reply
            if left is not None and left < ANSWER_TOKENS:
                ids = answer(model, filled(), prompt.logits[0], Lead(), ends, ANSWER_TOKENS)
            right.append(same_reply(processor.decode(list(ids)), expected))
    return f"{fmean(kls):.4f} / {fmean(right):.2f}"


if __name__ == "__main__":
    main()
