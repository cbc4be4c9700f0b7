"""Profiles without calibration: one type for all heads, or types given by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.profile.given import given_profile
from hkvprof.profile.record import Profile


def uniform_profile(
    model: Any,
    types: str | NDArray[Any] = "static",
    *,
    budget: float = 0.10,
    pool: int = 7,
    index: str = "mean",
    chunk: int = 16,
    keep: KeepRule | None = None,
) -> Profile:
    """A profile that gives every head the same share, for ablations, tests and checks.

    `types` is "static", "dynamic" or an array [layers, kv_heads] of HeadType values; `pool` is the
    pooling width of static heads, `index` ("mean" or "minmax") and `chunk` describe dynamic ones.
    Its curves say nothing (loss falls linearly with the ratio). Raises UsageError.
    """
    view = view_model(model)
    shape = (view.grid.layers, view.grid.kv_heads)
    if isinstance(types, str):
        if types not in ("static", "dynamic"):
            raise UsageError(f"types must be 'static', 'dynamic' or an array, found {types!r}")
        types = np.full(shape, HeadType[types.upper()])
    choice = np.asarray(types).astype(np.uint8)
    if choice.shape != shape or bool((choice > 1).any()):
        raise UsageError(
            f"types must be an array of 0 and 1 of shape {shape}, found {choice.shape}"
        )
    menu = (
        Strategy(HeadType.STATIC, pool=pool),
        Strategy(HeadType.DYNAMIC, index=index, chunk=chunk),
    )
    share = np.full(shape, budget, dtype=np.float32)
    return given_profile(view.fingerprint, menu, choice, share, budget, keep or KeepRule(), {})
