"""Synthetic profiles with fixed numbers, for tests and for the golden file.

`python -m tests.profiles` writes tests/golden/profile-v4.safetensors again; its bytes are pinned
by tests/profile/test_golden.py, so that a change of the format cannot pass unseen. It holds
`with_queries(with_key_bias(make_profile()))`. The files of versions 1 to 3 are as those wrote them:
`make_profile()`; of version 2 `one_length` of it without statistics, and of version 1 also
`plain_profile` of that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hkvprof.heads import (
    CALIBRATED,
    EXACT_BITS,
    HeadGrid,
    HeadType,
    KeepRule,
    ModelFingerprint,
    Strategy,
)
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.certificate import KEY as CERTIFICATE
from hkvprof.profile.certificate import Certificate, Level
from hkvprof.profile.confidence import KEY, MEASURES, Comparison, Confidence, Interval
from hkvprof.profile.planning import Rules
from hkvprof.profile.queries import QueryTables
from hkvprof.profile.record import Profile, ProjectedIndexTables
from hkvprof.profile.tables import HeadStatistics

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "profile-v4.safetensors"
GOLDEN_V3 = FOLDER / "profile-v3.safetensors"
GOLDEN_V2 = FOLDER / "profile-v2.safetensors"
GOLDEN_V1_INDEX = FOLDER / "profile-v1.safetensors"
GOLDEN_V1 = FOLDER / "profile-v1-plain.safetensors"
GRID = HeadGrid(layers=3, query_heads=4, kv_heads=2, head_dim=8)
STRATEGIES = (
    Strategy(HeadType.STATIC, pool=31),
    Strategy(HeadType.STATIC, pool=1, text_prior=0.5),
    Strategy(HeadType.DYNAMIC, index="mean", chunk=16),
    Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=64),
)
RATIOS = np.array([0.0625, 0.125, 0.25, 0.5, 1.0], dtype=np.float32)


def fingerprint(grid: HeadGrid = GRID) -> ModelFingerprint:
    """A model that does not exist."""
    return ModelFingerprint(
        architecture="Qwen2_5_VLForConditionalGeneration",
        grid=grid,
        rope={"theta": 1000000.0, "mrope_section": [1, 1, 2]},
        vision={"patch_size": 14, "merge_size": 2},
        config_hash="0123456789abcdef",
        weights_digest="fedcba9876543210",
        hub_id="example/model",
        commit="1" * 40,
    )


def _ramp(*shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Fixed numbers from low to high, exact in float32: steps of 1/256."""
    count = int(np.prod(shape))
    steps = np.round(np.linspace(low, high, count) * 256) / 256
    return steps.astype(np.float32).reshape(shape)


def make_profile(recipe: str = "measured", grid: HeadGrid = GRID) -> Profile:
    """A sound profile; loss falls with the ratio and differs by head and strategy."""
    heads = (grid.layers, grid.kv_heads)
    menu = len(STRATEGIES)
    scale = _ramp(menu, *heads, low=1.0, high=2.0)
    loss = scale[..., None] * (1 - RATIOS) / 4
    loss[2, :, :, 0] = INFEASIBLE
    loss = np.stack([loss, np.where(loss < INFEASIBLE, loss * 1.5, loss)]).astype(np.float32)
    strategy = (np.arange(grid.total) % menu).astype(np.uint8).reshape(heads)
    budget = np.where(np.arange(grid.total) % 2, 0.0625, 0.125).astype(np.float32).reshape(heads)
    return Profile(
        fingerprint=fingerprint(grid),
        recipe=recipe,
        default_budget=0.1,
        keep=KeepRule(),
        strategies=STRATEGIES,
        kappas=(0.05, 0.1),
        ratios=RATIOS.copy(),
        lengths=np.array([256, 1024]),
        strategy=strategy,
        budget=budget,
        sparsity_mean=_ramp(2, grid.layers, grid.query_heads, low=0.75, high=1.0),
        sparsity_std=_ramp(2, grid.layers, grid.query_heads, low=0.0, high=0.25),
        loss=loss,
        output_error=(loss.clip(max=1) / 2).astype(np.float32),
        static_margin=_ramp(2, *heads, len(RATIOS), high=0.0625),
        index=index_tables(grid),
        statistics=None if recipe == "uniform" else head_statistics(grid),
        rules=Rules(even=0.5),
        provenance={
            "samples": 16,
            "tasks": {"ocr": 8, "count": 8},
            "skipped": 1,
            "tokens": {"min": 200, "mean": 400.5, "max": 900},
            "theta": 0.9,
            "seed": 0,
            "versions": {"hkvprof": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        },
    )


def head_statistics(grid: HeadGrid) -> HeadStatistics:
    """Later heads look more at images; 16 samples have a reply, 8 a later question."""
    heads = (grid.layers, grid.query_heads)
    image = _ramp(*heads, high=0.5)
    others = [np.full(heads, share, dtype=np.float32) for share in (0.125, 0.25, 0.125)]
    sinks, text, recent = others
    video = np.zeros(heads, dtype=np.float32)
    return HeadStatistics(
        modality_mass_mean=np.stack([sinks + 0.5 - image, text, image, video, recent]),
        modality_mass_std=_ramp(5, *heads, high=0.25),
        entropy_mean=_ramp(*heads, low=0.25, high=0.75),
        entropy_std=_ramp(*heads, high=0.125),
        drift_mean=_ramp(3, *heads, low=0.25, high=0.75),
        drift_samples=np.array([16, 8, 8], dtype=np.int32),
    )


def index_tables(grid: HeadGrid) -> ProjectedIndexTables:
    """Tables of 16 and 32 bits, 3 and 4 channels, that lead nowhere in particular."""
    heads, channels = (grid.layers, grid.kv_heads), 4
    codebooks, subspaces = [], []
    for owner in ((1, 0, 1), (3, 1, 0, 1)):
        shape = (*heads, 256, len(owner))
        codebooks.append((np.arange(np.prod(shape)) * 101 % 255 - 127).astype(np.int8))
        codebooks[-1].shape = shape
        subspaces.append(np.tile(np.array(owner, dtype=np.uint8), (*heads, 1)))
    return ProjectedIndexTables(
        sizes=(16, 32),
        key_projection=_ramp(*heads, grid.head_dim, channels, low=-1).astype(np.float16),
        query_projection=_ramp(*heads, grid.head_dim, channels, high=-1).astype(np.float16),
        key_mean=_ramp(*heads, grid.head_dim, low=-2, high=2),
        deviation=_ramp(*heads, channels, low=1, high=3),
        codebooks=tuple(codebooks),
        subspaces=tuple(subspaces),
    )


def with_key_bias(profile: Profile) -> Profile:
    """The profile with biases in two of three rotary pairs, and two channels that do not turn."""
    assert profile.index is not None
    grid = profile.grid
    bias = _ramp(grid.layers, grid.kv_heads, 8, low=-8, high=8)
    bias[..., [1, 4, 6, 7]] = 0
    index = replace(
        profile.index,
        key_bias=bias,
        frequency=np.array([1.0, 0.25, 0.0625], dtype=np.float32),
        axis=np.array([0, 1, 2], dtype=np.uint8),
    )
    return replace(profile, index=index)


def with_queries(profile: Profile) -> Profile:
    """The profile with a calibrated score as its first strategy, and three centres to ask."""
    grid = profile.grid
    heads = (grid.layers, grid.query_heads)
    queries = QueryTables(
        centres=_ramp(*heads, 3, grid.head_dim, low=-4, high=4).astype(np.float16),
        weights=np.tile(np.array([0.5, 0.375, 0.125], dtype=np.float32), (*heads, 1)),
        frequency=np.array([1.0, 0.25, 0.0625], dtype=np.float32),
    )
    first = replace(profile.strategies[0], score=CALIBRATED)
    return replace(profile, strategies=(first, *profile.strategies[1:]), queries=queries)


def with_confidence(profile: Profile) -> Profile:
    """The profile with figures on how sure it is."""
    half = Interval(0.5, 0.25, 0.75)
    figures = dict.fromkeys(MEASURES, half)
    layers, heads = profile.strategy.shape
    share = tuple(tuple(1 - (i + h) / 16 for h in range(heads)) for i in range(layers))
    record = Confidence(
        16,
        agree=share,
        low=tuple(tuple(x / 2 for x in layer) for layer in share),
        high=tuple((1.0,) * heads for _ in share),
        halves=Comparison({**figures, "types": Interval(0.94, 0.9, 0.97)}, 20, 100),
        tasks=Comparison(figures, 2, 100),
        by_task={"ocr": dict.fromkeys(MEASURES, 0.75), "count": dict.fromkeys(MEASURES, 0.25)},
        kinds=Comparison(reason="there is only one kind: every prompt holds images or video"),
    )
    return replace(profile, provenance={**profile.provenance, KEY: record.to_json()})


def make_certificate(profile: Profile) -> Certificate:
    """One that certifies 20% of 50, 20 and 5%, the last given up half way."""
    return Certificate(
        alpha=0.02,
        delta=0.05,
        loss="answers",
        samples=150,
        levels=(Level(0.5, 150, 0, 0.0483), Level(0.2, 150, 0, 0.0483), Level(0.05, 75, 1, 0.196)),
        certified=0.2,
        reason="",
        regimes=("inside", "later"),
        full_score=0.9,
        content=profile.content_digest,
        weights_digest="fedcba9876543210",
        dtype="bfloat16",
        data="held-out",
        data_digest="0" * 64,
        options={"min_tokens": 64, "max_new_tokens": 16},
        versions={"hkvprof": "0.1.0"},
    )


def with_certificate(profile: Profile) -> Profile:
    """The profile with a certificate of it."""
    record = make_certificate(profile).to_json()
    return replace(profile, provenance={**profile.provenance, CERTIFICATE: record})


def plain_profile(profile: Profile) -> Profile:
    """The profile without index tables and without the strategy that needs them."""
    return replace(
        profile,
        index=None,
        strategies=profile.strategies[:3],
        strategy=np.minimum(profile.strategy, 2),
        loss=profile.loss[:, :3].copy(),
        output_error=profile.output_error[:, :3].copy(),
    )


def in_16_bits(profile: Profile) -> Profile:
    """The profile without strategies whose residents have fewer bits."""
    loss = profile.loss.copy()
    loss[:, [s.resident_bits < EXACT_BITS for s in profile.strategies]] = INFEASIBLE
    return replace(profile, loss=loss)


def one_length(profile: Profile) -> Profile:
    """The profile as an older one: the first curves, for prompts of all lengths."""
    return replace(
        profile,
        lengths=np.array([profile.usual_tokens]),
        loss=profile.loss[:1].copy(),
        output_error=profile.output_error[:1].copy(),
        static_margin=None,
        rules=Rules(),
    )


if __name__ == "__main__":
    with_queries(with_key_bias(make_profile())).save(GOLDEN)
