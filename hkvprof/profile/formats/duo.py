"""DuoAttention (github.com/mit-han-lab/duo-attention, utils.py, attn_patterns; arXiv 2410.10819).

A score of every KV head in [0, 1], 1 for full attention, as TSV; windows in a configuration.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import ProfileError, UsageError
from hkvprof.heads import HeadGrid
from hkvprof.profile.bounds import require
from hkvprof.profile.exchange import (
    HALF,
    Format,
    HeadScores,
    Parcel,
    full_or_window,
    head_ranks,
    parcel,
    window_share,
)
from hkvprof.profile.formats.checks import (
    read_json,
    to_json,
    whole_number,
)
from hkvprof.profile.record import Profile

FILES = ("full_attention_heads.tsv", "config.json")
SINKS, RECENT = 128, 256
"""The windows of every pattern that DuoAttention publishes."""


def _write(profile: Profile) -> Parcel:
    rows = ["\t".join(f"{score:.9g}" for score in row) for row in head_ranks(profile)]
    config = {
        "model_name": profile.fingerprint.hub_id,
        "sink_size": SINKS,
        "recent_size": RECENT,
    }
    return parcel(
        {FILES[0]: ("\n".join(rows) + "\n").encode(), FILES[1]: to_json(config)},
        "curves and shares: one score a head, its rank by what it loses when pruned, so that a "
        "sparsity of 0.5 and a threshold of 0.5 mean the same heads",
        f"windows: a profile measures none, and the file has DuoAttention's {SINKS} first and "
        f"{RECENT} last tokens",
    )


def _read(files: Mapping[str, bytes], grid: HeadGrid, budget: float | None) -> HeadScores:
    scores = _table(files[FILES[0]], grid)
    config = read_json(files[FILES[1]], FILES[1])
    require(isinstance(config, dict), f"{FILES[1]} should hold an object")
    sinks, recent = (
        whole_number(config.get(name), f"{FILES[1]}: {name}", low, most)
        for name, low, most in (("sink_size", 0, 4096), ("recent_size", 1, 65536))
    )
    part = HALF if budget is None else _full_part(budget, window_share(sinks, recent))
    full = np.zeros(scores.size, dtype=bool)
    full[np.argsort(-scores, axis=None, kind="stable")[: round(part * scores.size)]] = True
    said = f"scores: the {full.mean():.0%} of heads with the highest ones keep everything"
    return full_or_window(full.reshape(scores.shape), sinks, recent, said)


def _full_part(budget: float, least: float) -> float:
    """The part of heads that keep everything when all keep `budget` on average."""
    if budget < least:
        raise UsageError(
            f"--budget {budget:g} is less than the windows of all heads ({least:.4f}): raise it"
        )
    return (budget - least) / (1 - least) if least < 1 else 1.0


def _table(data: bytes, grid: HeadGrid) -> NDArray[np.float64]:
    """The scores [layers, kv_heads] of a TSV. Raises ProfileError."""
    name = FILES[0]
    try:
        lines = data.decode("ascii").split("\n")
        rows = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise ProfileError(f"{name} is no table of numbers with tabs between ({error})") from None
    widths = sorted({len(row) for row in rows})
    found = f"{len(rows)} lines of {' or '.join(map(str, widths)) or 'no'} numbers"
    require(
        len(rows) == grid.layers and widths == [grid.kv_heads],
        f"{name} should have {grid.layers} lines, one a layer, of {grid.kv_heads} numbers, one a "
        f"KV head; found {found}: it is of another model",
    )
    scores = np.array(rows)
    require(
        bool(np.isfinite(scores).all()) and bool(((scores >= 0) & (scores <= 1)).all()),
        f"{name} holds scores outside [0, 1], to which training clamps them",
    )
    require(
        bool((scores != scores.flat[0]).any()),
        f"{name} gives all heads the score {scores.flat[0]:g}: a pattern before its training",
    )
    return scores


DUO = Format("duo", "DuoAttention", FILES, _write, _read)
