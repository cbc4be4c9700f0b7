"""PyramidKV: SnapKV with more room in early layers than in late ones."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.scores import keep_best, recent_count, snapkv_of, spread

BETA = 20
"""The last layer gets 1/20 of the mean beside the window, the first one what that leaves."""


@baseline("pyramidkv", "PyramidKV", "arXiv 2406.02069")
def pyramidkv(prompt: PromptView) -> Selection:
    """Layer budgets fall linearly with depth; within a layer, as SnapKV.

    The window is the same everywhere. Budgets are rounded so that they sum to the room exactly.
    """
    layers, heads = prompt.grid.layers, prompt.grid.kv_heads
    window = recent_count(prompt)
    mean = prompt.room - window
    last = mean / BETA
    first = 2 * mean - last
    if first > prompt.tokens - window:
        first = float(prompt.tokens - window)
        last = 2 * mean - first
    step = (first - last) / max(1, layers - 1)
    if layers == 1:
        first = float(mean)
    sizes = [window + first - step * number for number in range(layers)]
    counts = spread(prompt.room * layers, sizes, 0, prompt.tokens)
    return keep_best(prompt, snapkv_of(prompt), [[count] * heads for count in counts])
