"""Profiles whose types and shares are given by hand or by a file, and not measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.heads import KeepRule, ModelFingerprint, Strategy
from hkvprof.profile.record import Profile

_RATIOS = np.array([0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], dtype=np.float32)


def given_profile(
    fingerprint: ModelFingerprint,
    menu: tuple[Strategy, ...],
    choice: NDArray[np.uint8],
    share: NDArray[np.float32],
    budget: float,
    keep: KeepRule,
    provenance: Mapping[str, Any],
) -> Profile:
    """A `uniform` profile of `choice`, an index into `menu`, and `share`, both [layers, kv_heads].

    Its curves say nothing: loss falls linearly with the ratio. Raises ProfileError.
    """
    grid = fingerprint.grid
    shape = (grid.layers, grid.kv_heads)
    curve = np.broadcast_to(1 - _RATIOS, (1, len(menu), *shape, len(_RATIOS)))
    sparsity = np.zeros((1, grid.layers, grid.query_heads), dtype=np.float32)
    return Profile(
        fingerprint=fingerprint,
        recipe="uniform",
        default_budget=budget,
        keep=keep,
        strategies=menu,
        kappas=(0.1,),
        ratios=_RATIOS.copy(),
        lengths=np.ones(1, dtype=np.int64),
        strategy=choice,
        budget=share,
        sparsity_mean=sparsity,
        sparsity_std=sparsity.copy(),
        loss=curve.astype(np.float32),
        output_error=curve.astype(np.float32),
        provenance={"recipe": "uniform", "samples": 0, **provenance},
    )
