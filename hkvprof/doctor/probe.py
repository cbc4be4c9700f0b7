"""The doctor's own profile: no two heads alike, so that a plan in the wrong place shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hkvprof.artifact import Profile
from hkvprof.heads import KeepRule
from hkvprof.profile.uniform import uniform_profile

_LEAST, _SPAN = 0.3, 0.3
_GOLDEN = 0.6180339887498949
"""Its multiples, fractions taken, never repeat and lie evenly."""


def probe_profile(model: Any) -> Profile:
    """Static and dynamic heads in turns, each with a share of its own; the budget is their mean."""
    plain = uniform_profile(model)
    shape = plain.strategy.shape
    number = np.arange(plain.grid.total).reshape(shape)
    layer, head = np.divmod(number, plain.grid.kv_heads)
    shares = (_LEAST + _SPAN * np.modf(_GOLDEN * (number + 1))[0]).astype(np.float32)
    made = uniform_profile(
        model, (layer + head) % 2, budget=float(shares.mean()), chunk=4, keep=KeepRule(4, 8, 16)
    )
    return replace(made, budget=shares)
