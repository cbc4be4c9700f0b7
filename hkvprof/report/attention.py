"""What query heads attend to, as `inspect` tells it. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.profile.record import Profile
from hkvprof.profile.tables import CLASSES, PAIRS, HeadStatistics

MOST_HEADS = 6
"""Heads that are named; --json has all."""
_DEPTHS = 3
_LEAST_MASS = 0.005
"""Mass below which a modality is not there."""
_VISION = ("image", "video")
_TOLD = {
    "window_decoding": "prompt's end and reply",
    "window_later": "prompt's end and later questions",
    "decoding_later": "reply and later questions",
}


def attention(profile: Profile) -> list[str]:
    """The section of `inspect`."""
    measured = profile.statistics
    if measured is None:
        return [f"Attention: {_absent(profile)}"]
    width = len(f"  layers {profile.grid.layers - 1}-{profile.grid.layers - 1}")
    heading = "".join(f"{name:>8}" for name in (*CLASSES, "entropy"))
    lines = ["Attention of text rows, mean over heads and samples:", " " * width + heading]
    for first, last in _depths(profile.grid.layers):
        part = slice(first, last + 1)
        mass = [
            _whole(float(measured.modality_mass_mean[c, part].mean())) for c in range(len(CLASSES))
        ]
        entropy = f"{float(measured.entropy_mean[part].mean()):.2f}"
        name = f"  layers {first}-{last}"
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in (*mass, entropy)))
    for kind in _VISION:
        lines += _most(measured, kind)
    return [*lines, _drift(measured)]


def _most(measured: HeadStatistics, kind: str) -> list[str]:
    heads = [h for h in most_on(measured, kind) if h["mass"] >= _LEAST_MASS]
    if not heads:
        return []
    named = ", ".join(f"{h['layer']}.{h['query_head']} {_whole(h['mass'])}" for h in heads)
    return [f"  most on {kind} (layer.query head): {named}"]


def most_on(measured: HeadStatistics, kind: str) -> list[dict[str, Any]]:
    """The MOST_HEADS query heads with the most mass on a class, most first."""
    mass = measured.modality_mass_mean[CLASSES.index(kind)]
    order = np.argsort(-mass, axis=None, kind="stable")[:MOST_HEADS]
    return [
        {"layer": int(layer), "query_head": int(head), "mass": float(mass[layer, head])}
        for layer, head in zip(*np.unravel_index(order, mass.shape), strict=True)
    ]


def _drift(measured: HeadStatistics) -> str:
    told = [
        f"{_TOLD[pair]} {_whole(float(mean.mean()))} ({count} samples)"
        for pair, mean, count in zip(
            PAIRS, measured.drift_mean, measured.drift_samples, strict=True
        )
        if count
    ]
    if not told:
        return "  drift: not measured; only recipe 'measured' reads replies"
    return f"  same top tenth of tokens (by chance 10%): {', '.join(told)}"


def recorded(profile: Profile) -> dict[str, Any]:
    """Everything as plain JSON, or the reason why there is nothing."""
    measured = profile.statistics
    if measured is None:
        return {"reason": _absent(profile)}
    return {
        "modality_mass": dict(zip(CLASSES, _rounded(measured.modality_mass_mean), strict=True)),
        "modality_mass_std": dict(zip(CLASSES, _rounded(measured.modality_mass_std), strict=True)),
        "entropy": _rounded(measured.entropy_mean),
        "entropy_std": _rounded(measured.entropy_std),
        "drift": {
            pair: {"samples": int(count), "overlap": _rounded(mean) if count else None}
            for pair, mean, count in zip(
                PAIRS, measured.drift_mean, measured.drift_samples, strict=True
            )
        },
    }


def _absent(profile: Profile) -> str:
    if profile.recipe == "uniform":
        return "not recorded; a uniform profile was not measured"
    return "not recorded; profiles hold it from schema version 3 on: calibrate again"


def _depths(layers: int) -> list[tuple[int, int]]:
    """First and last layer of up to three parts of equal depth."""
    parts = np.array_split(np.arange(layers), min(_DEPTHS, layers))
    return [(int(part[0]), int(part[-1])) for part in parts]


def _whole(share: float) -> str:
    return f"{100 * share:.0f}%"


def _rounded(values: NDArray[np.float32]) -> Any:
    """The array as nested lists of numbers with four digits."""
    return (np.round(values.astype(np.float64), 4) + 0.0).tolist()
