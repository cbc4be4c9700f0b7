"""SparseMM (github.com/CR400AF-A/SparseMM, sparsemm_utils.py and visual_head; arXiv 2506.05344).

Scores of query heads, a list of one number a sample for each, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import HeadGrid, KeepRule
from hkvprof.profile.bounds import require
from hkvprof.profile.exchange import (
    Format,
    HeadScores,
    Parcel,
    parcel,
)
from hkvprof.profile.formats.checks import (
    expect_keys,
    is_number,
    read_json,
    to_json,
)
from hkvprof.profile.record import Profile

FILE = "head_score.json"
EVEN = 0.1
"""The part of a budget that SparseMM deals evenly (its scripts' `ratio`)."""
_BUDGET = 0.10
_ENOUGH = 4
"""Samples from which their like scores are no chance."""


def _write(profile: Profile) -> Parcel:
    group = profile.grid.group
    scores = {
        f"{layer}-{head}": [round(float(profile.budget[layer, head // group]) / group, 9)]
        for layer in range(profile.grid.layers)
        for head in range(profile.grid.query_heads)
    }
    return parcel(
        {FILE: to_json(scores)},
        "scores of single samples: one number a query head, its part of the share that its KV head "
        f"has at the default budget {profile.default_budget:g}. SparseMM gives exactly these "
        "shares where its `ratio` (dealt evenly) is 0",
        "curves: at other budgets SparseMM scales these shares",
    )


def _read(files: Mapping[str, bytes], grid: HeadGrid, budget: float | None) -> HeadScores:
    samples = _samples(read_json(files[FILE], "the score file"), grid)
    heads = samples.mean(axis=-1).reshape(grid.layers, grid.kv_heads, grid.group).sum(axis=-1)
    chosen = _BUDGET if budget is None else budget
    share = chosen * (EVEN + (1 - EVEN) * heads / heads.mean())
    return HeadScores(
        np.clip(share, 1e-6, 1).astype(np.float32),
        chosen,
        KeepRule(),
        (
            f"scores of {samples.shape[-1]} samples: their means, dealt as SparseMM does, "
            f"{EVEN:.0%} of the budget evenly and the rest by score",
            "scores of query heads: their sums over the query heads of a KV head",
        ),
    )


def _samples(scores: Any, grid: HeadGrid) -> NDArray[np.float64]:
    """Scores [layers, query_heads, samples]. Raises ProfileError for what cannot be right."""
    require(isinstance(scores, dict), "the score file should hold an object of lists")
    wanted = [f"{row}-{head}" for row in range(grid.layers) for head in range(grid.query_heads)]
    expect_keys(scores, wanted, f"{grid.layers} layers of {grid.query_heads} query heads")
    require(
        list(scores) == wanted,
        "the score file has its heads out of order: SparseMM reads them by their places, whatever "
        "their names, and would give scores to the wrong heads; sort them by layer and head",
    )
    lists = list(scores.values())
    sound = all(isinstance(one, list) and one and all(map(is_number, one)) for one in lists)
    require(sound, "the score file should hold a list of numbers, at least 0, for every head")
    counts = sorted({len(one) for one in lists})
    require(len(counts) == 1, f"heads have {counts} samples: expected as many for every head")
    found = np.array(lists, dtype=np.float64)
    _check_samples(found)
    return found.reshape(grid.layers, grid.query_heads, counts[0])


def _check_samples(scores: NDArray[np.float64]) -> None:
    """Raise ProfileError for scores [heads, samples] that say nothing, or of a known fault.

    Until 33f2f0a SparseMM's script for Qwen decoded without a cache (its issue 10): from the second
    token on, a head saw nothing but that token, and no image. What is left of a sample is one token
    and one box, so that every head that hit it has the same score.
    """
    means = scores.mean(axis=1)
    require(bool((means > 0).any()), "the score file has 0 for all heads: nothing was measured")
    require(bool((means != means[0]).any()), "the score file tells no head from another")
    least = np.where(scores > 0, scores, np.inf).min(axis=0)
    most = scores.max(axis=0)
    hit = most > 0
    require(
        int(hit.sum()) < _ENOUGH or bool((least[hit] < most[hit] * (1 - 1e-9)).any()),
        f"in each of {int(hit.sum())} samples all heads that score have one and the same score: "
        "these were made by SparseMM's script that decodes without a cache (its issue 10) and are "
        "wrong; make them anew with its commit 33f2f0a or later",
    )


SPARSEMM = Format("sparsemm", "SparseMM", (FILE,), _write, _read)
