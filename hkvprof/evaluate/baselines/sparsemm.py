"""SparseMM: heads get room by how much they matter to vision, known beforehand."""

from __future__ import annotations

from hkvprof.evaluate.baselines.base import PromptView, Selection, baseline
from hkvprof.evaluate.baselines.offline import static_loss
from hkvprof.evaluate.baselines.scores import keep_best, recent_count, rows, snapkv_of, spread

RHO = 0.1
"""Share of the room beside the window that all heads get alike."""


@baseline("sparsemm", "SparseMM-like", "arXiv 2506.05344", needs_profile=True)
def sparsemm(prompt: PromptView) -> Selection:
    """Window and a uniform floor for every head, the rest in proportion to an offline score.

    Published scores count how often a head looks at the image region of a word it reads (OCR);
    here a head's score is its loss in the profile when it is static at 20%, on calibration samples.
    Within a head, SnapKV.
    """
    window = recent_count(prompt)
    least = window + int(RHO * (prompt.room - window))
    score = static_loss(prompt.need_profile("sparsemm"))
    counts = spread(prompt.room * prompt.grid.total, score, least, prompt.tokens)
    return keep_best(prompt, snapkv_of(prompt), rows(counts, prompt.grid.kv_heads))
