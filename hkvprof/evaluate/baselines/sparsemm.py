"""SparseMM: heads get room by how much they matter to vision, known beforehand."""

from __future__ import annotations

import numpy as np

from hkvprof.evaluate.baselines.base import Prompt, Selection, baseline
from hkvprof.evaluate.baselines.budgets import rows, spread
from hkvprof.evaluate.baselines.scores import WINDOW, keep_best, snapkv_of
from hkvprof.heads import HeadType

RHO = 0.1
"""Share of the room beside the window that all heads get alike."""
AT = 0.05
"""Kept share at which the profile is asked what a static head loses."""


@baseline("sparsemm", "SparseMM-like", "arXiv 2506.05344", needs_profile=True)
def sparsemm(prompt: Prompt) -> Selection:
    """Window and a uniform floor for every head, the rest in proportion to an offline score.

    Published scores count how often a head looks at the image region of a word it reads (OCR);
    here a head's score is its loss in the profile when it is static at 5%, on calibration samples.
    Within a head, SnapKV.
    """
    profile = prompt.need_profile("sparsemm")
    static = [s.head_type is HeadType.STATIC for s in profile.strategies]
    at = int(np.abs(profile.ratios - AT).argmin())
    score = profile.loss[static][..., at].min(axis=0)
    window = min(WINDOW, max(1, prompt.room // 2))
    least = window + int(RHO * (prompt.room - window))
    counts = spread(prompt.room * prompt.grid.total, score, least, prompt.tokens)
    return keep_best(prompt, snapkv_of(prompt), rows(counts, prompt.grid.kv_heads))
