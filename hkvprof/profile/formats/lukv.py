"""LU-KV as kvpress reads it (github.com/NVIDIA/kvpress, lukv_press.py; arXiv 2602.08585).

The share of tokens to remove from every KV head, for 99 budgets, as an .npy file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError, ProfileError, UsageError
from hkvprof.heads import HeadGrid, KeepRule
from hkvprof.profile.bounds import require
from hkvprof.profile.exchange import (
    Format,
    HeadScores,
    Parcel,
    parcel,
)
from hkvprof.profile.record import Profile

FILE = "budget_curve.npy"
STEPS = 99
"""Curves: number i is for the share (i + 1) / 100 of all tokens removed."""
_BUDGET = 0.10


def _write(profile: Profile) -> Parcel:
    """Budgets that are too small for a head's floor repeat the least one that is not."""
    kept, least = [], 1.0
    for step in range(1, STEPS + 1):
        try:
            found = profile.allocation((100 - step) / 100, profile.usual_tokens)
        except BudgetError:
            break
        kept.append(1 - found.ratio.astype(np.float32))
        least = (100 - step) / 100
    if not kept:
        raise UsageError(
            f"no budget below 1 holds at this profile's usual {profile.usual_tokens} tokens"
        )
    missing = STEPS - len(kept)
    said = [
        "scores: shares are measured under hkvprof's own selection; LU-KV's are made for one "
        "scorer each, and kvpress wants to be told which",
        f"prompt lengths: the shares are those of prompts of {profile.usual_tokens:,} tokens",
        "bytes: LU-KV takes shares of bytes for shares of tokens, also where an index or tokens in "
        "few bits hold them",
    ]
    if missing:
        said.append(f"budgets below {least:.0%}: the last {missing} curves repeat that one")
    stream = io.BytesIO()
    np.save(stream, np.stack(kept + [kept[-1]] * missing), allow_pickle=False)
    return parcel({FILE: stream.getvalue()}, *said)


def _read(files: Mapping[str, bytes], grid: HeadGrid, budget: float | None) -> HeadScores:
    chosen = _BUDGET if budget is None else budget
    step = round((1 - chosen) * 100)
    if not 1 <= step <= STEPS or not math.isclose(1 - step / 100, chosen, abs_tol=1e-9):
        raise UsageError(f"--budget {chosen:g}: LU-KV has curves for 0.01, 0.02 and so on to 0.99")
    curves = _array(files[FILE], (STEPS, grid.layers, grid.kv_heads))
    require(
        bool(np.isfinite(curves).all()) and bool(((curves >= 0) & (curves <= 1)).all()),
        "the curves hold shares outside [0, 1]",
    )
    means = curves.reshape(STEPS, -1).mean(axis=1)
    require(
        bool((np.diff(means) >= -1e-6).all()),
        "the curves should remove more from one budget to the next: they are out of order, or hold "
        "the shares kept",
    )
    share = np.clip(1 - curves[step - 1], 1e-6, 1).astype(np.float32)
    said = [f"{STEPS - 1} of {STEPS} curves: the one for {chosen:.0%} is scaled to others"]
    if abs(1 - means[step - 1] - chosen) > 0.01:
        said.append(f"their mean: the curve for {chosen:.0%} keeps {1 - means[step - 1]:.1%}")
    said.append("the scorer that they were made for: heads are scored by hkvprof")
    return HeadScores(share, chosen, KeepRule(sinks=4, recent=1), tuple(said))


def _array(data: bytes, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The array of an .npy file; its header is checked before anything is made room for."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
            np.lib.format.read_array_header_2_0)  # fmt: skip
        found, _, dtype = header(stream)
    except (ValueError, EOFError, TypeError, SyntaxError, TokenError) as error:
        raise ProfileError(f"this is no .npy file ({error})") from None
    require(
        found == shape and dtype.kind == "f",
        f"expected floats of shape {shape} (budgets, layers, KV heads), found {dtype} of {found}: "
        "it is of another model",
    )
    try:
        return np.load(io.BytesIO(data), allow_pickle=False).astype(np.float64)
    except (ValueError, EOFError) as error:
        raise ProfileError(f"this .npy file is cut short ({error})") from None


LUKV = Format("lukv", "LU-KV of kvpress", (FILE,), _write, _read)
