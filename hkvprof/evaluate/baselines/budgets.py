"""Whole numbers of tokens for layers and heads, to the last token of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from hkvprof.evaluate.baselines.base import Prompt, Selection


def spread(total: int, weights: ArrayLike, least: int, most: int) -> list[int]:
    """`total` dealt out: `least` each, the rest in proportion to `weights`, nobody over `most`.

    What `most` turns away goes to the others in proportion. Where `total` does not even hold
    `least` for everyone, all get the same; only where it exceeds `most` for everyone is it not
    used up. Of the places after the comma, the largest are rounded up.
    """
    weight = np.asarray(weights, dtype=np.float64).ravel()
    count = len(weight)
    total = min(total, count * most)
    least = min(least, total // count)
    weight = np.maximum(weight, 1e-9 * max(float(weight.max()), 1e-30))
    low, high = 0.0, (most - least) / float(weight.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(least + middle * weight, most).sum() <= total:
            low = middle
        else:
            high = middle
    exact = np.minimum(least + low * weight, most)
    whole = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - whole), kind="stable")
    while (left := total - int(whole.sum())) > 0:
        whole[order[whole[order] < most][:left]] += 1
    return [int(number) for number in whole]


T = TypeVar("T")


def rows(numbers: Sequence[T], width: int) -> list[list[T]]:
    """A flat list over all heads as one list per layer."""
    return [list(numbers[i : i + width]) for i in range(0, len(numbers), width)]


def best_of_all(
    score: Float[Tensor, "*heads tokens"], total: int, safe: int = 0
) -> Bool[Tensor, "*heads tokens"]:
    """Which tokens belong to the `total` best-scored of all heads; ties go to earlier ones.

    Every head's own `safe` best ones come first.
    """
    shape = score.shape
    score = score.reshape(-1, shape[-1]).clone()
    if safe:
        own = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :safe]
        score.scatter_(-1, own, torch.inf)
    order = torch.sort(score.flatten(), descending=True, stable=True).indices[:total]
    chosen = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    chosen[order] = True
    return chosen.view(shape)


def keep_marked(prompt: Prompt, marked: Sequence[Bool[Tensor, "kv_heads tokens"]]) -> Selection:
    """Every head keeps the tokens that are marked in its row."""
    return [
        [layer.keep(head, row.nonzero()[:, 0]) for head, row in enumerate(mark)]
        for layer, mark in zip(prompt.layers, marked, strict=True)
    ]
