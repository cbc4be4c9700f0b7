"""What a profile says, as plain figures: the JSON of `hkvprof inspect --json`. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import BudgetError, UsageError
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Fetch
from hkvprof.profile.capacity import Reach, find_reach
from hkvprof.profile.record import SCHEMA_VERSION, Profile
from hkvprof.profile.upgrade import tokens_told
from hkvprof.report import attention
from hkvprof.report.certainty import certificate_json, recorded, type_agreements
from hkvprof.report.measured import covering

CLOSE = 0.10
"""Relative difference in loss below which the two types of a measured head are borderline."""
ITEM_BYTES = 2
"""Bytes per K/V element in the figures (bfloat16, float16)."""


@dataclass(frozen=True)
class KeptMemory:
    """Dense against kept K/V bytes of one prompt at the default budgets, and bytes that a decoding
    step reads from the host: in the mean, and at most."""

    tokens: int
    dense_bytes: int
    kept_bytes: int
    read_bytes: int = 0
    most_read_bytes: int = 0


def memory(profile: Profile, tokens: int) -> KeptMemory | None:
    """K/V bytes of a prompt at ITEM_BYTES per element; None if the budget is too small."""
    dense = tokens * profile.grid.token_bytes(ITEM_BYTES)
    try:
        plan = profile.plan(profile.default_budget, tokens, ITEM_BYTES)
    except BudgetError:
        return None
    ratio = np.array([head.ratio for layer in plan.layers for head in layer.heads])
    reads = round(plan.read_bytes), plan.most_read_bytes
    return KeptMemory(tokens, dense, round(dense * float(ratio.mean())), *reads)


def static_share(profile: Profile) -> float:
    """Share of KV heads that are static at the default budget."""
    return float((profile.head_types == HeadType.STATIC).mean())


def sentence(profile: Profile, tokens: int) -> str:
    """The profile in one sentence."""
    types = f"{static_share(profile):.0%} of KV heads static"
    budget = percent(profile.default_budget)
    kept = memory(profile, tokens)
    if kept is None:
        return f"{types}; {budget} is too little for a {tokens:,}-token prompt"
    read, most = (human(size) for size in (kept.read_bytes, kept.most_read_bytes))
    reads = f", and a step reads {read} from the host, at most {most}" if most != "0 B" else ""
    return (
        f"{types}; at {budget} a {tokens:,}-token prompt keeps {human(kept.kept_bytes)} instead of "
        f"{human(kept.dense_bytes)}{reads}{_found(profile)}"
    )


def _found(profile: Profile) -> str:
    """What the certificate's samples say of answers at the default budget; empty without one."""
    known = covering(profile, Fetch())
    said = "" if known is None else known.at(profile.default_budget)
    return f"; held-out samples, {said}" if said else ""


def usage(profile: Profile, file: str) -> list[str]:
    """Lines of code that apply a profile in `file`."""
    return [
        "import hkvprof",
        "",
        f"model, processor = hkvprof.load_model({profile.fingerprint.hub_id or 'MODEL'!r})",
        f"with hkvprof.apply(model, {file!r}, budget={profile.default_budget:.3g}) as handle:",
        "    model.generate(...)",
        "    print(handle.receipt())",
    ]


def percent(share: float) -> str:
    """A share as `10%` or `12.5%`."""
    return f"{100 * share:.3g}%"


def human(size: float) -> str:
    """Bytes with a binary unit and three significant digits: `188 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.3g} TiB"


def reach(profile: Profile) -> Reach:
    """Which prompts the default budget serves; the shortest calibrated one is the provenance's."""
    shortest = tokens_told(profile.provenance, "min") or int(profile.lengths[0])
    ends = profile.keep.sinks + profile.keep.recent
    chunks = sorted({strategy.chunk for strategy in profile.strategies if strategy.index})
    return find_reach(profile.allocation, profile.default_budget, shortest, ends, chunks)


def unserved(profile: Profile) -> str:
    """What to know where the calibration's own prompts are too short; empty where they are not."""
    served = reach(profile)
    if served.covers_calibration:
        return ""
    budget = f"The default budget of {100 * served.budget:.3g}%"
    least, needed = served.shortest, served.needed
    prompts = "no prompt" if least is None else f"prompts of {least:,} tokens and more"
    advice = "" if needed is None else f"; those need a budget of {100 * needed:.3g}%"
    return (
        f"{budget} serves {prompts}, and the shortest calibrated one has "
        f"{served.calibrated:,}{advice} (shorter ones raise BudgetError, or stay dense under "
        "strict=False)"
    )


@dataclass(frozen=True)
class Borderline:
    """A head whose type could as well be the other, and why (`layer`, `head` count from 0)."""

    layer: int
    head: int
    reason: str


def borderline(profile: Profile) -> list[Borderline]:
    """All borderline heads of a profile, by layer and head.

    Measured profiles: the best static and the best dynamic strategy differ by less than CLOSE in
    loss at the head's own ratio. Paper profiles: the interval mean +- std / sqrt(samples) of the
    sparsity of a query head of the group straddles theta.
    """
    if profile.recipe == "paper":
        return _near_theta(profile)
    return _close_in_loss(profile) if profile.recipe == "measured" else []


def _close_in_loss(profile: Profile) -> list[Borderline]:
    types = np.array([strategy.head_type for strategy in profile.strategies])
    if len(set(types)) < 2:
        return []
    found = []
    for layer, head in np.ndindex(profile.strategy.shape):
        losses = losses_at_budget(profile, layer, head)
        static, dynamic = (losses[types == kind].min() for kind in HeadType)
        gap, top = abs(static - dynamic), max(static, dynamic)
        if 0 < top < INFEASIBLE and gap < CLOSE * top:
            reason = f"loss {static:.3g} static, {dynamic:.3g} dynamic"
            found.append(Borderline(layer, head, reason))
    return found


def losses_at_budget(profile: Profile, layer: int, head: int) -> NDArray[np.float64]:
    """Loss of every strategy at the head's own ratio, linear in log ratio between the points, on
    prompts of the usual length.

    INFEASIBLE where none was measured.
    """
    if len(profile.ratios) < 2:
        return np.full(len(profile.strategies), float(INFEASIBLE))
    ratios = np.log(profile.ratios.astype(np.float64))
    at = math.log(float(profile.budget[layer, head]))
    curves = profile.loss_at(profile.usual_tokens)[:, layer, head].astype(np.float64)
    left = max(0, int(np.searchsorted(ratios, at, side="right")) - 1)
    values = np.array([np.interp(at, ratios, curve) for curve in curves])
    return np.where(curves[:, left] >= INFEASIBLE, float(INFEASIBLE), values)


def _near_theta(profile: Profile) -> list[Borderline]:
    theta, samples = (_number(profile.provenance.get(key)) for key in ("theta", "samples"))
    kappa = kappa_index(profile)
    if theta is None or samples is None or samples <= 0 or kappa is None:
        return []
    error = profile.sparsity_std[kappa] / math.sqrt(samples)
    distance = np.abs(profile.sparsity_mean[kappa] - theta)
    group = profile.grid.group
    found = []
    for layer, head in np.ndindex(profile.strategy.shape):
        queries = slice(head * group, (head + 1) * group)
        if (distance[layer, queries] <= error[layer, queries]).any():
            at = int(distance[layer, queries].argmin()) + head * group
            mean, spread = profile.sparsity_mean[kappa, layer, at], error[layer, at]
            reason = f"sparsity {mean:.3f} +- {spread:.3f}, theta {theta:g}"
            found.append(Borderline(layer, head, reason))
    return found


def kappa_index(profile: Profile) -> int | None:
    """Which of `kappas` decided types: that nearest to provenance's `theta_kappa`, else to 0.1."""
    if not profile.kappas:
        return None
    wanted = _number(profile.provenance.get("theta_kappa")) or 0.1
    return int(np.abs(np.array(profile.kappas) - wanted).argmin())


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def strategies_used(profile: Profile) -> dict[str, int]:
    """How many heads use each strategy, most used first."""
    counts = Counter(int(number) for number in profile.strategy.flat)
    return {profile.strategies[number].name: count for number, count in counts.most_common()}


def summarise(profile: Profile, tokens: int) -> dict[str, Any]:
    """Everything `inspect` shows, JSON-ready."""
    kept = memory(profile, tokens)
    return {
        "schema": SCHEMA_VERSION,
        "sentence": sentence(profile, tokens),
        "recipe": profile.recipe,
        "lengths": profile.lengths.tolist(),
        "default_budget": profile.default_budget,
        "shortest_prompt": reach(profile).shortest,
        "static_share": static_share(profile),
        "memory": vars(kept) if kept else None,
        "fingerprint": profile.fingerprint.to_json(),
        "keep": vars(profile.keep),
        "strategies": strategies_used(profile),
        "types": [[HeadType(t).name.lower() for t in row] for row in profile.head_types.tolist()],
        "strategy": [
            [profile.strategies[s].name for s in row] for row in profile.strategy.tolist()
        ],
        "budget": _rounded(profile.budget),
        "borderline": [vars(head) for head in borderline(profile)],
        "confidence": recorded(profile),
        "certificate": certificate_json(profile),
        "attention": attention.recorded(profile),
        "provenance": dict(profile.provenance),
    }


def summarise_layer(profile: Profile, layer: int) -> dict[str, Any]:
    """One layer, head by head, with sparsity and loss curves. Raises UsageError."""
    if not 0 <= layer < profile.grid.layers:
        raise UsageError(
            f"there is no layer {layer}: expected 0 to {profile.grid.layers - 1} (--layer)"
        )
    heads = [_head(profile, layer, head) for head in range(profile.grid.kv_heads)]
    for head, agreement in enumerate(type_agreements(profile, layer)):
        heads[head]["type_agreement"] = agreement
    return {
        "layer": layer,
        "kappas": list(profile.kappas),
        "ratios": _rounded(profile.ratios),
        "tokens": profile.usual_tokens,
        "heads": heads,
    }


def _head(profile: Profile, layer: int, head: int) -> dict[str, Any]:
    group = profile.grid.group
    queries = slice(head * group, (head + 1) * group)
    strategy = profile.strategies[profile.strategy[layer, head]]
    loss = profile.loss_at(profile.usual_tokens)
    return {
        "head": head,
        "type": strategy.head_type.name.lower(),
        "strategy": strategy.name,
        "ratio": _rounded(profile.budget[layer, head]),
        "query_heads": list(range(queries.start, queries.stop)),
        "sparsity_mean": _rounded(profile.sparsity_mean[:, layer, queries]),
        "sparsity_std": _rounded(profile.sparsity_std[:, layer, queries]),
        "loss": {
            entry.name: _curve(loss[number, layer, head])
            for number, entry in enumerate(profile.strategies)
        },
    }


def _curve(loss: NDArray[np.float32]) -> list[float | None]:
    """A loss curve; None where the strategy does not fit."""
    return [None if value >= INFEASIBLE else _rounded(value) for value in loss]


def _rounded(values: Any) -> Any:
    """Nested lists of floats with six significant digits."""
    flat = np.asarray(values, dtype=np.float64)
    return np.vectorize(lambda v: float(f"{v:.6g}"), otypes=[float])(flat).tolist()
