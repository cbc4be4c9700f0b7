"""How sure a profile says it is: the record in its provenance, in words. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hkvprof.errors import ProfileError, counted
from hkvprof.heads import HeadType
from hkvprof.profile.certificate import Certificate, Level
from hkvprof.profile.certificate import recorded as recorded_certificate
from hkvprof.profile.confidence import KEY, Comparison, Confidence, Interval
from hkvprof.profile.record import Profile

MOST_HEADS = 6
"""Least sure heads that are named; --layer and --json have all."""
ENOUGH = 0.9
"""Share of heads on whose type profiles of two halves of the samples agree, where they suffice."""
LEAST = 16
"""Samples that are enough at least: what few of them agree on may be what they have in common."""
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
        record = confidence(profile)
    except ProfileError as error:
        return {"reason": f"the record cannot be used: {plain(error)}"}
    return {"reason": _absent(profile)} if record is None else record.to_json()


def certainty(profile: Profile) -> list[str]:
    """The section of `inspect` on how sure a profile is, as lines."""
    try:
        record = confidence(profile)
    except ProfileError as error:
        return [f"How sure: the record cannot be used: {plain(error)}"]
    if record is None:
        return [f"How sure: {_absent(profile)}"]
    if record.reason:
        return [f"How sure: {plain(record.reason)}"]
    worst = record.worst_task
    most = (
        f"; {plain(worst)} agrees least: {_whole(record.by_task[worst]['types'])}" if worst else ""
    )
    return [
        f"How sure ({record.samples} samples, with 95% intervals):",
        _line("two halves of the samples", record.halves),
        _line("one task and all others", record.tasks) + most,
        _line("text and multimodal prompts", record.kinds),
        *_one_sided(profile),
        f"  single samples agree on the type of {_whole(1 - record.flip_rate)} of heads",
        *_least_sure(record),
    ]


def _absent(profile: Profile) -> str:
    if profile.recipe == "uniform":
        return "not recorded; a uniform profile was not measured"
    return "not recorded; `hkvprof calibrate` and `hkvprof merge` record it"


def _line(who: str, compared: Comparison) -> str:
    if compared.reason:
        return f"  {who}: not compared: {plain(compared.reason)}"
    figures = compared.figures
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


def _interval(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _least_sure(record: Confidence) -> list[str]:
    heads = record.least_sure(MOST_HEADS)
    if not heads:
        return ["  least sure heads: none; all samples agree on every type"]
    named = [f"{layer}.{head} {_share(record, layer, head)}" for layer, head in heads]
    return [f"  least sure heads (layer.head, samples that agree): {', '.join(named)}"]


def _share(record: Confidence, layer: int, head: int) -> str:
    low, high = record.low[layer][head], record.high[layer][head]
    return _interval(Interval(record.agree[layer][head], low, high))


def verdict(profile: Profile) -> str:
    """Whether a calibration had samples enough, and what to do where it had not."""
    record = None if profile.recipe == "uniform" else confidence(profile)
    if record is None:
        return "Nothing says whether the samples were enough: the profile records no confidence"
    more = f"give more than these {counted(record.samples, 'sample')}, at best two to four times"
    if record.reason or record.halves.reason:
        return f"Too few samples to tell how sure the types are: {more}"
    agreed = record.halves.figures["types"].value
    halves = f"profiles of two halves of them agree on the type of {_whole(agreed)} of heads"
    if agreed < ENOUGH:
        return f"Too few samples: {halves}, {_whole(ENOUGH)} would do; {more}"
    if record.samples < LEAST:
        return f"Too few samples: {halves}, but fewer than {LEAST} miss kinds of prompts; {more}"
    return f"Enough samples ({record.samples:,}): {halves}"


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
        record = confidence(profile)
    except ProfileError:
        return []
    if record is None or record.reason:
        return []
    figures = zip(record.agree[layer], record.low[layer], record.high[layer], strict=True)
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


def page(record: Certificate) -> list[str]:
    """The verdict and the tests behind it."""
    return [_verdict(record), *(f"  {line}" for line in [_about(record), *_table(record)])]


def section(profile: Profile) -> list[str]:
    """The section of `inspect`; empty without a record."""
    record = recorded_certificate(profile.provenance)
    if record is None:
        return []
    if record.content != profile.content_digest:
        return ["Certificate: none; the one recorded is of other curves, budgets or tables"]
    return page(record)


def certificate_json(profile: Profile) -> dict[str, Any] | None:
    """For `inspect --json`: the record, and whether it is of this very content."""
    record = recorded_certificate(profile.provenance)
    return (
        None
        if record is None
        else {
            **record.to_json(),
            "valid": record.content == profile.content_digest,
        }
    )


def _verdict(record: Certificate) -> str:
    claim = claim_text(record.alpha, record.delta, record.loss)
    if record.certified is None:
        return f"Certificate: nothing certified ({claim}): {plain(record.reason)}"
    return f"Certificate: {100 * record.certified:g}%: {claim}"


def _about(record: Certificate) -> str:
    full = "" if record.full_score is None else f"; full cache {record.full_score:.1%} right"
    return (
        f"{record.samples} held-out samples of {plain(record.data)}, regimes "
        f"{plain(list(record.regimes))}, {plain(record.dtype)}, reads per step: "
        f"{plain(record.fetch)}{full}"
    )


def _table(record: Certificate) -> list[str]:
    lines = ["budget  samples  degraded  p-value"]
    passed = record.certified is not None
    for level in record.levels:
        lines.append(
            f"{f'{100 * level.budget:g}%':>6}  {level.samples:>7}  {level.degraded:>8}  "
            f"{_p_value(record, level):>7}  {_remark(record, level, passed)}".rstrip()
        )
        passed = passed and level.budget != record.certified
    return lines


def _p_value(record: Certificate, level: Level) -> str:
    return f"{'' if level.samples == record.samples else '>='}{level.p_value:.2g}"


def _remark(record: Certificate, level: Level, passed: bool) -> str:
    if passed:
        return "accepted"
    return "" if level.samples == record.samples else "given up: no verdict depends on the rest"
