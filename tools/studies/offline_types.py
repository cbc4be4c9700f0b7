"""What deciding head types offline costs against deciding them for every request.

    python -m tools.studies.offline_types --profile PROFILE [--per-task 2] [--budget 0.2,0.1,0.05]

The paper's rule (a head is static when the top 2% of visible keys get 0.9 of the attention of text
rows) classifies every held-out prompt of tinyvl by itself, and once by the profile's mean sparsity.
All else is HybridKV's in both: budgets, pruning and chunks, at equal all-in bytes. The profile's
own types and hkvprof itself stand beside them. Tables in markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch

import hkvprof
from hkvprof.calibration.confidence import cohen_kappa, same_share
from hkvprof.calibration.decide import types_by_sparsity
from hkvprof.cli.progress import track
from hkvprof.evaluate.baselines import PromptView
from hkvprof.evaluate.baselines.ablations import offline_types
from hkvprof.evaluate.baselines.hybridkv import THETA, request_sparsity
from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, ProfiledModel
from hkvprof.evaluate.prefill import capture
from hkvprof.evaluate.records import FULL, OURS
from hkvprof.evaluate.statistics import summarise
from hkvprof.evaluate.tasks import load_tasks
from hkvprof.heads import HeadType
from hkvprof.samples.read import open_images

METHODS = {FULL: "full cache", "hybridkv": "types per request",
           "hybridkv_offline": "types offline", OURS: "hkvprof"}  # fmt: skip
REGIMES = ("inside", "after")


def main() -> None:
    """Classify, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="profiles/tinyvl.hkv.safetensors")
    parser.add_argument("--per-task", type=int, default=2)
    parser.add_argument("--budget", default="0.2,0.1,0.05")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, processor = hkvprof.load_model("tinyvl", dtype=options.dtype)
    profile = hkvprof.load_profile(options.profile)
    tasks = load_tasks("tinyvl", processor, options.per_task)
    requests = []
    for sample in track(tasks.samples, "classifying", len(tasks.samples)):
        prefill = capture(model, processor.encode([open_images(sample)]))
        sparsity = request_sparsity(PromptView(model, prefill, 1.0))
        requests.append(types_by_sparsity(sparsity, THETA, profile.grid))
    _agreement("offline, the paper's rule", offline_types(profile), requests)
    _agreement("offline, the profile's types", profile.head_types, requests)
    _between(requests)
    comparison = ComparisonPlan(
        tuple(options.budget.split(",")), ("hybridkv", "hybridkv_offline"), REGIMES
    )
    answers = compare(ProfiledModel(model, processor, profile), tasks, comparison, track=track)
    _say("\n| regime | budget | types | score | KL |\n|---|---|---|---|---|")
    for row in summarise(answers):
        score = "-" if row.score is None else f"{row.score:.1%}"
        kl = f"{row.kl.value:.3f} [{row.kl.low:.3f}, {row.kl.high:.3f}]"
        budget = row.budget or "1"
        _say(f"| {row.regime} | {budget} | {METHODS[row.method]} | {score} | {kl} |")


def _agreement(name: str, offline: np.ndarray, requests: Sequence[np.ndarray]) -> None:
    """Over all heads of all prompts, and the prompts' range."""
    shares = [same_share(offline, types) for types in requests]
    kappa = cohen_kappa(np.stack([offline] * len(requests)), np.stack(requests))
    static = float((offline == HeadType.STATIC).mean())
    theirs = fmean(float((types == HeadType.STATIC).mean()) for types in requests)
    span = f"{min(shares):.1%} to {max(shares):.1%} per prompt"
    _say(
        f"{name} ({static:.0%} static) against per request ({theirs:.0%} static): equal types "
        f"{fmean(shares):.1%} ({span}), kappa {kappa:.2f}"
    )


def _between(requests: Sequence[np.ndarray]) -> None:
    """How far the prompts agree with each other."""
    pairs = [(a, b) for i, a in enumerate(requests) for b in requests[:i]]
    first, second = (np.stack(part) for part in zip(*pairs, strict=True))
    _say(
        f"one request against another: equal types {same_share(first, second):.1%}, kappa "
        f"{cohen_kappa(first, second):.2f}"
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
