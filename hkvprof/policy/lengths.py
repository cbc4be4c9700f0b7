"""Curves between the prompt lengths that they were measured at (numpy only)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hkvprof.policy.budget import INFEASIBLE


def loss_between(
    loss: NDArray[np.float32], lengths: NDArray[np.int64], tokens: int
) -> NDArray[np.float32]:
    """Curves [...] for prompts of `tokens`, from those at `lengths` [A]; `loss` [A, ...].

    Linear in the logarithm of the length; beyond the first and the last length theirs. A point that
    was measured at one of the two neighbours only has the loss of that one: whether a strategy fits
    a prompt is for its layout to say (planning.Menu.fits).
    """
    after = int(np.searchsorted(lengths, tokens, side="left"))
    if after == len(lengths) or int(lengths[after]) == tokens or after == 0:
        return loss[min(after, len(lengths) - 1)]
    first, last = (math.log(int(lengths[i])) for i in (after - 1, after))
    part = (math.log(tokens) - first) / (last - first)
    low, high = loss[after - 1].astype(np.float64), loss[after].astype(np.float64)
    blend = np.where(high >= INFEASIBLE, low, (1 - part) * low + part * high)
    return np.where(low >= INFEASIBLE, high, blend).astype(np.float32)
