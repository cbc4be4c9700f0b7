"""Paired: what roots, pooled curves and dealing a part of budgets evenly are worth at equal bytes.

    python -m tools.studies.study_planning ROWS [--model tinyvl] [--count 40] [--dtype auto]
                                [--variants own75,pooled1,...] [--budgets 0.2,0.1,0.05,0.03]

ROWS is a folder of `hkvprof calibrate --rows`. Profiles are decided anew per variant, and prompts
of the calibration split (never the held-out one) are answered through the product's runtime: with
tinyvl new scenes of 12 and 16 images, else texts of calibration/longtext of 1,200 to 3,500 tokens.
The full cache's continuation is forced token by token. The markdown table has the mean KL(full ||
compressed) in nats and, to the first variant, the mean of the logarithm of the ratio with its
standard error. docs/experiments.md quotes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

import hkvprof
from hkvprof.calibration import decide
from hkvprof.calibration import merge as merging
from hkvprof.calibration.confidence import Confidence
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.evaluate.replay import Lead, end_tokens, refer, replay
from hkvprof.heads import Rules
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.samples.read import load_samples
from hkvprof.testbed.generator import make_sample

TASKS = ("ocr", "list", "find", "diff", "kv")
FIRST_SEED = 12_000
STEPS = 32
TOKENS = (1_200, 3_500)
NOISE = 1e-5
"""Added to both sides of a ratio of KLs, in nats."""
VARIANTS = {
    "own75": ("square roots, three quarters dealt evenly", 0.5, 0.0, 0.75),
    "own": ("square roots, nothing evenly", 0.5, 0.0, 0.0),
    "fourth": ("fourth roots, nothing evenly", 0.25, 0.0, 0.0),
    "fourth75": ("fourth roots, three quarters evenly", 0.25, 0.0, 0.75),
    "pooled1": ("square roots, the mean head's curve added once", 0.5, 1.0, 0.0),
    "pooled3": ("the same, added three times", 0.5, 3.0, 0.0),
    "fourthpooled1": ("fourth roots, the mean head's curve added once", 0.25, 1.0, 0.0),
    "even": ("all evenly", 0.5, 0.0, 1.0),
}
"""Name, the root that is taken (decide.POWER), how often the mean head's curve is added to each
head's own, and the part dealt evenly."""


def main() -> None:
    """Ask every prompt of every variant, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="tinyvl")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--dtype", default="auto", help="budgets count elements of it")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--budgets", default="0.2,0.1,0.05,0.03")
    options = parser.parse_args()
    budgets = [float(text) for text in options.budgets.split(",")]
    torch.set_num_threads(1)
    model, processor = hkvprof.load_model(options.model, dtype=options.dtype)
    profiles = {name: decided(options.rows, name) for name in options.variants.split(",")}
    figures, tokens = [], []
    for prompt in _prompts(model, processor, options.model, options.count):
        figures.append(_distances(model, processor, prompt, list(profiles.values()), budgets))
        tokens.append(prompt.tokens)
        cells = "; ".join(" ".join(f"{kl:.4f}" for kl in row) for row in figures[-1])
        sys.stderr.write(f"{len(tokens)}/{options.count}: {prompt.tokens} tokens: {cells}\n")
    sys.stdout.write(f"{len(tokens)} prompts, {min(tokens)} to {max(tokens)} tokens; KL, ratio\n\n")
    sys.stdout.write("| variant | " + " | ".join(f"{b:.0%}" for b in budgets) + " |\n")
    sys.stdout.write("|---|" + "---|" * len(budgets) + "\n")
    for name, row in zip(profiles, _cells(np.array(figures)), strict=True):
        sys.stdout.write(f"| {VARIANTS[name][0]} | " + " | ".join(row) + " |\n")


def decided(rows: Path, name: str) -> Profile:
    """The profile of a variant; how sure it is is not asked."""
    _, power, pooled, even = VARIANTS[name]
    unsure = mock.patch.object(merging, "assess", lambda e, _: Confidence(e.samples, "a study"))
    with mock.patch.object(decide, "POWER", power), unsure:
        profile = merging.merge([rows])
    own = np.ma.masked_greater_equal(profile.loss, INFEASIBLE)
    loss = (own + pooled * own.mean(axis=(2, 3), keepdims=True)).filled(INFEASIBLE)
    return replace(profile, loss=loss.astype(np.float32), rules=Rules(even))


@torch.no_grad()
def _prompts(model: Any, processor: Any, name: str, count: int) -> Iterator[Prefill]:
    """So many prompts of the calibration split."""
    if name == "tinyvl":
        for i in range(count):
            images, task = (12, 16)[i % 2], TASKS[i % len(TASKS)]
            sample = make_sample(task, FIRST_SEED + i, images=images, split="calibration")
            yield capture(model, processor.encode([sample.messages]))
        return
    found = 0
    for sample in load_samples("calibration/longtext").samples:
        encoded = processor.encode([sample.messages])
        if TOKENS[0] <= encoded.tokens <= TOKENS[1] and found < count:
            found += 1
            yield capture(model, encoded)


@torch.no_grad()
def _distances(
    model: Any, processor: Any, prompt: Prefill, profiles: list[Profile], budgets: list[float]
) -> list[list[float]]:
    """KL [variants][budgets]."""
    prompt.restore(model)
    ends, first = end_tokens(model, processor), prompt.logits[0]
    full = refer(model, prompt.dense_cache(), first, Lead(), ends, STEPS, 1)
    found: list[list[float]] = []
    for profile in profiles:
        found.append([])
        for budget in budgets:
            with apply(model, profile, budget=budget) as handle:
                cache = handle.new_cache()
                prompt.restore(model)
                prompt.fill(cache)
                distance, _ = replay(model, cache, first, Lead(), full, stepwise=True)
            found[-1].append(distance.kl)
    return found


def _cells(kl: NDArray[np.float64]) -> list[list[str]]:
    """Text of every variant and budget, of KL [prompts, variants, budgets]."""
    ratio = np.log((kl + NOISE) / (kl[:, :1] + NOISE))
    error = ratio.std(axis=0) / np.sqrt(len(kl))
    return [
        [
            f"{kl[:, v, b].mean():.4f}"
            + (f", {ratio[:, v, b].mean():+.2f} ± {error[v, b]:.2f}" if v else "")
            for b in range(kl.shape[2])
        ]
        for v in range(kl.shape[1])
    ]


if __name__ == "__main__":
    main()
