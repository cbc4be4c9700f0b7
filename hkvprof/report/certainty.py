"""How sure a profile says it is: the record in its provenance, in words. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkvprof.errors import ProfileError
from hkvprof.heads import HeadType
from hkvprof.profile.certificate import Certificate, Level
from hkvprof.profile.certificate import recorded as recorded_certificate
from hkvprof.profile.confidence import KEY, Comparison, Confidence, Interval
from hkvprof.profile.record import Profile

MOST_HEADS = 6
"""Least sure heads that are named; --layer and --json have all."""
FEW = 0.1
"""Share of heads of one type up to which kappa depends on a handful of them."""


def confidence(profile: Profile) -> Confidence | None:
    """The recorded confidence; None where there is none. Raises ProfileError if it is damaged."""
    if KEY not in profile.provenance:
        return None
    return Confidence.from_json(profile.provenance[KEY], profile.head_types.shape)


def recorded(profile: Profile) -> dict[str, Any]:
    """The recorded confidence as plain JSON, or the reason why there is none. Never raises."""
    try:
        found = confidence(profile)
    except ProfileError as error:
        return {"reason": f"the record cannot be used: {plain(error)}"}
    return {"reason": _absent(profile)} if found is None else found.to_json()


def certainty(profile: Profile) -> list[str]:
    """The section of `inspect` on how sure a profile is, as lines."""
    try:
        found = confidence(profile)
    except ProfileError as error:
        return [f"How sure: the record cannot be used: {plain(error)}"]
    if found is None:
        return [f"How sure: {_absent(profile)}"]
    if found.reason:
        return [f"How sure: {plain(found.reason)}"]
    worst = found.worst_task
    most = (
        f"; {plain(worst)} agrees least: {_whole(found.by_task[worst]['types'])}" if worst else ""
    )
    return [
        f"How sure ({found.samples} samples, with 95% intervals):",
        _line("two halves of the samples", found.halves),
        _line("one task and all others", found.tasks) + most,
        _line("text and multimodal prompts", found.kinds),
        *_one_sided(profile),
        f"  single samples agree on the type of {_whole(1 - found.flip_rate)} of heads",
        *_least_sure(found),
    ]


def _absent(profile: Profile) -> str:
    if profile.recipe == "uniform":
        return "not recorded; a uniform profile was not measured"
    return "not recorded; `hkvprof calibrate` and `hkvprof merge` record it"


def _line(who: str, found: Comparison) -> str:
    if found.reason:
        return f"  {who}: not compared: {plain(found.reason)}"
    figures = found.figures
    return (
        f"  {who}: agree on the type of {_whole(figures['types'].value)} of heads, kappa "
        f"{_interval(figures['kappa'])}, budgets rank alike by {_interval(figures['ratios'])}"
    )


def _one_sided(profile: Profile) -> list[str]:
    """A warning where Cohen's kappa is low for want of heads to agree on."""
    static = float((profile.head_types == HeadType.STATIC).mean())
    if FEW < static < 1 - FEW:
        return []
    few = "static" if static <= FEW else "dynamic"
    return [f"  (kappa says little here: {_whole(min(static, 1 - static))} of heads are {few})"]


def _interval(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _least_sure(found: Confidence) -> list[str]:
    heads = found.least_sure(MOST_HEADS)
    if not heads:
        return ["  least sure heads: none; all samples agree on every type"]
    named = [f"{layer}.{head} {_share(found, layer, head)}" for layer, head in heads]
    return [f"  least sure heads (layer.head, samples that agree): {', '.join(named)}"]


def _share(found: Confidence, layer: int, head: int) -> str:
    low, high = found.low[layer][head], found.high[layer][head]
    return _interval(Interval(found.agree[layer][head], low, high))


def doubts(profile: Profile) -> str:
    """How many heads became dynamic because static was not proven better; "" where none is."""
    count = profile.provenance.get("conservative")
    if type(count) is not int or count < 1:
        return ""
    return (
        f"{count} of {profile.grid.total} heads are dynamic because samples do not tell (95%) that "
        "static loses less"
    )


def type_agreements(profile: Profile, layer: int) -> list[list[float]]:
    """[share, low, high] of every KV head of a layer; empty where nothing is recorded."""
    try:
        found = confidence(profile)
    except ProfileError:
        return []
    if found is None or found.reason:
        return []
    figures = zip(found.agree[layer], found.low[layer], found.high[layer], strict=True)
    return [list(head) for head in figures]


def agreement_text(figures: list[float]) -> str:
    """A figure with its interval, such as `0.87 [0.79, 0.92]`."""
    return _interval(Interval(*figures))


def _whole(share: float) -> str:
    return f"{100 * share:.0f}%"


def plain(value: object) -> str:
    """A stranger's JSON value on one line, control characters escaped."""
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(k)} {plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value)
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_UNITS = {
    "answers": "of samples like these get a worse answer than with the full cache",
    "agreement": "of samples like these get another answer than with the full cache",
}


def claim_text(alpha: float, delta: float, loss: str) -> str:
    """What a certificate says, as a sentence without its end."""
    return f"with {100 * (1 - delta):g}% confidence, at most {100 * alpha:g}% {_UNITS[loss]}"


def page(found: Certificate) -> list[str]:
    """A certificate as lines: the verdict, and the tests behind it."""
    return [_verdict(found), *(f"  {line}" for line in [_about(found), *_table(found)])]


def section(profile: Profile) -> list[str]:
    """The section of `inspect` on the certificate, as lines; empty where none is recorded."""
    found = recorded_certificate(profile.provenance)
    if found is None:
        return []
    if found.content != profile.content_digest:
        return ["Certificate: none; the one recorded is of other curves, budgets or tables"]
    return page(found)


def certificate_json(profile: Profile) -> dict[str, Any] | None:
    """The certificate for `inspect --json`, and whether it is of this very content."""
    found = recorded_certificate(profile.provenance)
    if found is None:
        return None
    return {**found.to_json(), "valid": found.content == profile.content_digest}


def _verdict(found: Certificate) -> str:
    claim = claim_text(found.alpha, found.delta, found.loss)
    if found.certified is None:
        return f"Certificate: nothing certified ({claim}): {plain(found.reason)}"
    return f"Certificate: {100 * found.certified:g}%: {claim}"


def _about(found: Certificate) -> str:
    full = "" if found.full_score is None else f"; full cache {found.full_score:.1%} right"
    return (
        f"{found.samples} held-out samples of {plain(found.data)}, regimes "
        f"{plain(list(found.regimes))}, {plain(found.dtype)}{full}"
    )


def _table(found: Certificate) -> list[str]:
    lines = ["budget  samples  degraded  p-value"]
    passed = found.certified is not None
    for level in found.levels:
        lines.append(
            f"{f'{100 * level.budget:g}%':>6}  {level.samples:>7}  {level.degraded:>8}  "
            f"{_p_value(found, level):>7}  {_remark(found, level, passed)}".rstrip()
        )
        passed = passed and level.budget != found.certified
    return lines


def _p_value(found: Certificate, level: Level) -> str:
    return f"{'' if level.samples == found.samples else '>='}{level.p_value:.2g}"


def _remark(found: Certificate, level: Level, passed: bool) -> str:
    if passed:
        return "accepted"
    return "" if level.samples == found.samples else "given up: no verdict depends on the rest"
