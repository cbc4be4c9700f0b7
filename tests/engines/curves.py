"""Profiles with random falling curves, for plans of blocks and for tiny models in an engine."""

from __future__ import annotations

import numpy as np

from hkvprof.heads import HeadGrid, HeadType, KeepRule, ModelFingerprint, Strategy
from hkvprof.profile.record import Profile

RATIOS = np.array([0.05, 0.1, 0.2, 0.4, 1.0], dtype=np.float32)
STRATEGIES = (
    Strategy(HeadType.STATIC, pool=1),
    Strategy(HeadType.STATIC, pool=7),
    Strategy(HeadType.STATIC, pool=1, resident_bits=4),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=16),
)


def random_profile(grid: HeadGrid, seed: int, lengths: tuple[int, ...] = (512, 2048)) -> Profile:
    """A measured profile whose heads differ by orders of magnitude."""
    draw = np.random.default_rng(seed)
    heads = (grid.layers, grid.kv_heads)
    shape = (len(lengths), len(STRATEGIES), *heads, len(RATIOS))
    scale = np.exp(draw.normal(0, 2, size=(1, 1, *heads, 1)))
    steps = draw.random(shape) * scale
    loss = np.flip(np.flip(steps, -1).cumsum(-1), -1)
    loss = (loss - loss[..., -1:]).astype(np.float32)
    sparsity = np.full((1, grid.layers, grid.query_heads), 0.5, dtype=np.float32)
    return Profile(
        fingerprint=ModelFingerprint("LlamaForCausalLM", grid),
        recipe="measured",
        default_budget=0.2,
        keep=KeepRule(),
        strategies=STRATEGIES,
        kappas=(0.1,),
        ratios=RATIOS.copy(),
        lengths=np.array(lengths, dtype=np.int64),
        strategy=np.zeros(heads, dtype=np.uint8),
        budget=np.full(heads, 0.2, dtype=np.float32),
        sparsity_mean=sparsity,
        sparsity_std=sparsity.copy(),
        loss=loss,
        output_error=loss.copy(),
    )
