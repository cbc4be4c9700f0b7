"""What many answers say about a method: means, paired differences, and how sure they are.

Intervals are 95% percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) over
samples: the questions about one context are drawn together, since they rise and fall together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkvprof.errors import UsageError
from hkvprof.evaluate.records import FULL, OURS, Answer

RESAMPLES = 5000
_LEAST = 1e-100  # a divisor below it is zero

Question = tuple[str, str, int]  # sample, task, turn
Figures = Mapping[Question, float]
Group = dict[Question, Answer]
Key = tuple[str, str, str]  # regime, method, budget
Groups = dict[Key, Group]


@dataclass(frozen=True)
class BootstrapInterval:
    """A mean, or a ratio of means, and its 95% bootstrap interval, which holds it.

    It stems from `samples` samples; with few of them it is too narrow, with one it has no width.
    """

    value: float
    low: float
    high: float
    samples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class TaskScore:
    """Mean score in [0, 1] over the answers of one task, and the metrics it mixes (sorted)."""

    score: float
    answers: int
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class MethodSummary:
    """One method at one budget in one regime; None where there is nothing to take a mean of.

    - `score` is over the `scored` answers; `score_share` (of the full cache's score), `difference`
      (score less the full cache's) and `worst_task` are over the scored questions that both
      answered; tasks that the full cache never gets right have no ratio.
    - `kl`, `nll` and `nll_difference` (to the full cache, same questions) in nats per token;
      `true_kl` and `true_nll_difference` where what really follows was forced. The full cache's
      `kl` is noise.
    - `runtime_kl`: of an engine, to hkvprof in transformers under the engine's plan.
    - `all_kept`: share of samples all of whose scored questions score no less than with the full
      cache.
    - `share` and `storage_share`: resident over dense bytes, by the receipt and by the tensors.
    - `read_share`: read from the host per decoding step, over dense bytes; `limit_share`: the most
      that any step could.
    """

    regime: str
    method: str
    budget: str
    answers: int
    scored: int
    score: float | None
    tasks: dict[str, TaskScore]
    score_share: float | None
    difference: BootstrapInterval | None
    worst_task: str
    worst_ratio: float | None
    kl: BootstrapInterval
    agreement: float
    nll: float
    nll_difference: float | None
    share: float
    storage_share: float
    host_bytes: float
    compress_seconds: float
    hit_rate: float | None
    true_kl: BootstrapInterval | None = None
    true_nll_difference: float | None = None
    all_kept: float | None = None
    read_share: float = 0.0
    limit_share: float = 0.0
    runtime_kl: BootstrapInterval | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; figures that are not finite become null."""
        return _plain(self)


@dataclass(frozen=True)
class Duel:
    """hkvprof against the best public baseline `by` score or by KL, over the questions of both.

    `ours` and `theirs` are means over these `questions`. A positive `difference` speaks for
    hkvprof: ours - theirs for the score, theirs - ours for KL (nats), whose `ratio` is theirs over
    ours (None if ours can be 0). The rival is the best on these very answers, which favours it.
    """

    regime: str
    budget: str
    by: str
    rival: str
    questions: int
    ours: float
    theirs: float
    difference: BootstrapInterval
    ratio: BootstrapInterval | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict as above; `excludes_zero` is that of the difference."""
        return _plain(self, excludes_zero=self.difference.excludes_zero)


def summarise(answers: Sequence[Answer], seed: int = 0) -> list[MethodSummary]:
    """One summary per regime, method and budget, in the order of first appearance.

    Raises UsageError if a regime has no answers of the full cache, or a question two of one method.
    """
    groups = _grouped(answers)
    return [_summary(key, group, groups[key[0], FULL, ""], seed) for key, group in groups.items()]


def duels(answers: Sequence[Answer], public: Collection[str], seed: int = 0) -> list[Duel]:
    """Per regime and budget of hkvprof: against the best of `public` by score, then by KL.

    A duel without a common question is left out. Raises as `summarise` does.
    """
    groups = _grouped(answers)
    ours = [key for key in groups if key[1] == OURS]
    fought = (_duel(groups, key, by, public, seed) for key in ours for by in ("score", "kl"))
    return [duel for duel in fought if duel]


def ranking(summaries: Sequence[MethodSummary], public: Collection[str]) -> list[str]:
    """Public baselines, best first: by the mean difference to full over all budgets and regimes.

    Equal ones (those without scores too) by mean KL, then by name.
    """

    def rank(name: str) -> tuple[float, float, str]:
        rows = [s for s in summaries if s.method == name]
        lost = [-s.difference.value for s in rows if s.difference]
        return _worth(lost), _worth([s.kl.value for s in rows]), name

    return sorted({s.method for s in summaries} & set(public), key=rank)


def bootstrap(
    over: Figures, under: Figures | None = None, seed: int = 0
) -> BootstrapInterval | None:
    """The mean of `over`, or its sum over the sum of `under`, with its interval.

    None without questions, or where a resample divides by 0 or less; NaN if a figure is not finite.
    """
    under = dict.fromkeys(over, 1.0) if under is None else under
    if not over:
        return None
    if not all(map(math.isfinite, (*over.values(), *under.values()))):
        return BootstrapInterval(
            math.nan, math.nan, math.nan, len({sample for sample, _, _ in over})
        )
    questions = sorted(over)
    samples, where = np.unique([sample for sample, _, _ in questions], return_inverse=True)
    sums = np.stack([np.bincount(where, [side[q] for q in questions]) for side in (over, under)])
    drawn = _weights(len(samples), seed) @ sums.T
    if not (drawn[:, 1] > _LEAST).all():
        return None
    value = math.fsum(sums[0]) / math.fsum(sums[1])
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return BootstrapInterval(value, min(float(low), value), max(float(high), value), len(samples))


@lru_cache(maxsize=4)
def _weights(samples: int, seed: int) -> NDArray[np.float64]:
    """How often every resample draws every sample; the same draws serve all methods.

    scipy.stats.bootstrap would draw anew for each (which moves published ends), and takes no
    single sample.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)
    return drawn.astype(np.float64)


def _grouped(answers: Sequence[Answer]) -> Groups:
    groups: Groups = {}
    for answer in answers:
        question = (answer.sample, answer.task, answer.turn)
        group = groups.setdefault((answer.regime, answer.method, answer.budget), {})
        if question in group:
            raise UsageError(
                f"{answer.method} {answer.budget} answers {question} twice in regime "
                f"{answer.regime!r}: expected one answer; do not join several runs"
            )
        group[question] = answer
    for regime, _, _ in groups:
        if (regime, FULL, "") not in groups:
            raise UsageError(
                f"regime {regime!r} has no answers of the method {FULL!r}, with which the others "
                "are compared: evaluate the full cache too"
            )
    return groups


def _figures(group: Group, field: str) -> dict[Question, float]:
    """A field of the answers that have one."""
    return {q: value for q, a in group.items() if (value := getattr(a, field)) is not None}


def _less(left: Figures, right: Figures) -> dict[Question, float]:
    """Paired differences over the common questions."""
    return {q: left[q] - right[q] for q in left if q in right}


def _mean(values: Collection[float]) -> float | None:
    return fmean(values) if values else None


def _worth(losses: Collection[float]) -> float:
    """The mean to sort by: last where there is none."""
    return fmean(losses) if losses and all(map(math.isfinite, losses)) else math.inf


def _summary(key: Key, group: Group, full: Group, seed: int) -> MethodSummary:
    answers = list(group.values())
    dense = sum(a.dense_bytes for a in answers)
    scores, reference = _figures(group, "score"), _figures(full, "score")
    both = {q: reference[q] for q in scores if q in reference}
    right = math.fsum(both.values())
    worst_ratio, worst_task = _worst(scores, both)
    kl = bootstrap(_figures(group, "kl"), seed=seed)
    assert kl is not None
    return MethodSummary(
        *key,
        answers=len(answers),
        scored=len(scores),
        score=_mean(scores.values()),
        tasks=_tasks(answers),
        score_share=math.fsum(scores[q] for q in both) / right if right else None,
        difference=bootstrap(_less(scores, reference), seed=seed),
        worst_task=worst_task,
        worst_ratio=worst_ratio,
        kl=kl,
        true_kl=bootstrap(_figures(group, "true_kl"), seed=seed),
        agreement=fmean(a.agreement for a in answers),
        nll=fmean(a.nll for a in answers),
        nll_difference=_mean(_less(_figures(group, "nll"), _figures(full, "nll")).values()),
        all_kept=_all_kept(scores, both),
        true_nll_difference=_mean(
            _less(_figures(group, "true_nll"), _figures(full, "true_nll")).values()
        ),
        share=sum(a.resident_bytes for a in answers) / dense,
        storage_share=sum(a.storage_bytes for a in answers) / dense,
        host_bytes=fmean(a.host_bytes for a in answers),
        compress_seconds=fmean(a.compress_seconds for a in answers),
        hit_rate=_mean(_figures(group, "hit_rate").values()),
        read_share=fmean(a.read_share for a in answers),
        limit_share=max(a.limit_share for a in answers),
        runtime_kl=bootstrap(_figures(group, "runtime_kl"), seed=seed),
    )


def _all_kept(scores: Figures, full: Figures) -> float | None:
    kept: dict[str, bool] = {}
    for question, right in full.items():
        sample = question[0]
        kept[sample] = kept.get(sample, True) and scores[question] >= right
    return _mean([float(one) for one in kept.values()])


def _tasks(answers: Sequence[Answer]) -> dict[str, TaskScore]:
    """By task, in the order of first appearance; tasks without a score are left out."""
    scored = {}
    for task in dict.fromkeys(a.task for a in answers):
        scores = [a.score for a in answers if a.task == task and a.score is not None]
        metrics = {a.metric for a in answers if a.task == task and a.score is not None}
        if scores:
            scored[task] = TaskScore(fmean(scores), len(scores), tuple(sorted(metrics)))
    return scored


def _worst(scores: Figures, full: Figures) -> tuple[float | None, str]:
    """Least ratio to the full cache's score, and its task (the first name among equals)."""
    ratios = []
    for task in {task for _, task, _ in full}:
        here = [question for question in full if question[1] == task]
        right = math.fsum(full[q] for q in here)
        if right > 0:
            ratios.append((math.fsum(scores[q] for q in here) / right, task))
    return min(ratios, default=(None, ""))


def _duel(groups: Groups, key: Key, by: str, public: Collection[str], seed: int) -> Duel | None:
    """Against the rival over whom ours has the least advantage, on the questions of both."""
    regime, _, budget = key
    ours = _figures(groups[key], by)
    candidates = []
    for (where, name, at), group in groups.items():
        theirs = _figures(group, by)
        gaps = _less(ours, theirs) if by == "score" else _less(theirs, ours)
        if gaps and where == regime and at == budget and name in public:
            candidates.append((_worth(gaps.values()), name, gaps, theirs))
    if not candidates:
        return None
    _, rival, gaps, theirs = min(candidates, key=lambda one: one[:2])
    ours, theirs = {q: ours[q] for q in gaps}, {q: theirs[q] for q in gaps}
    difference = bootstrap(gaps, seed=seed)
    assert difference is not None
    means = fmean(ours.values()), fmean(theirs.values())
    ratio = bootstrap(theirs, ours, seed) if by == "kl" else None
    return Duel(regime, budget, by, rival, len(gaps), *means, difference, ratio)


def _plain(record: MethodSummary | Duel, **more: Any) -> dict[str, Any]:
    """As JSON would give it back; null for NaN and infinities, which JSON has not."""
    return json.loads(json.dumps(asdict(record) | more), parse_constant=lambda _: None)
