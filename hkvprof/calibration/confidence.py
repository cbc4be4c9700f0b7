"""How sure a profile is of its types and budgets, from the very rows that it was made of.

Everything is planned by the functions that make the profile, for its prompt length and default
budget: what single samples would have said, and how far profiles of different samples agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, spearmanr

from hkvprof.calibration.evidence import Counts, Evidence, Judgement
from hkvprof.heads import HeadType
from hkvprof.profile.confidence import MEASURES, Comparison, Confidence, Heads, Interval


def wilson(count: int, total: int) -> tuple[float, float]:
    """95% score interval of the share `count` / `total` (Wilson 1927, JASA 22, 209-212).

    For independent trials with one probability; unlike the normal approximation it stays within
    [0, 1] and has a width where all trials agree. `total` is at least 1.
    """
    assert 0 <= count <= total
    assert total > 0
    ends, share = binomtest(count, total).proportion_ci(method="wilson"), count / total
    return min(share, float(ends.low)), max(share, float(ends.high))


def same_share(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Share of entries that are equal."""
    return float((first == second).mean())


def cohen_kappa(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Agreement beyond chance (Cohen 1960): (p_o - p_e) / (1 - p_e), in [-1, 1].

    p_o is the share of equal entries, p_e the one expected of independent decisions with the same
    shares of each type. Where both name one and the same type throughout, 0 / 0 counts as 1.
    """
    observed = same_share(first, second)
    kinds = np.union1d(first, second)
    expected = sum(float((first == k).mean()) * float((second == k).mean()) for k in kinds)
    if len(kinds) < 2:
        return 1.0
    return (observed - expected) / (1 - expected)


def jaccard(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Static heads of both over static heads of either; 1 where neither has any."""
    ours, theirs = first == HeadType.STATIC, second == HeadType.STATIC
    either = int((ours | theirs).sum())
    return float((ours & theirs).sum()) / either if either else 1.0


def spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Correlation of ranks, equal values sharing their mean rank (Spearman 1904), in [-1, 1].

    Without any spread there is no order: 1 where both are constant, 0 where one is.
    """
    flat = [bool((values == values.flat[0]).all()) for values in (first, second)]
    if any(flat):
        return float(all(flat))
    return float(spearmanr(first, second, axis=None).statistic)


LEAST_SAMPLES = 4
SPLITS = 20
"""Random halves whose mean agreement is the estimate."""
SPLITS_PER_RESAMPLE = 2
MOST_TASKS = 24
"""Tasks that are compared, those with the most samples."""
MOST_RESAMPLES, LEAST_RESAMPLES = 100, 20
HEAD_PLANS = 400 * 112
"""Heads planned for the intervals of one comparison: it bounds the resamples of large models."""
SEED = 0

Figures = NDArray[np.float64]
"""MEASURES, in their order."""
Strata = Sequence[NDArray[np.int64]]
"""Samples of each task."""


def assess(evidence: Evidence, whole: Judgement) -> Confidence:
    """How sure the profile is that `whole`, the judgement of everything, became.

    **Per head**: the share of samples that, each alone, would give the head the profile's type
    (`measured`: planned on the sample's own curves with the scales of the whole; `paper`: the
    sample's sparsity against theta), with Wilson's 95% interval; the flip rate is the rest. It says
    how much a type depends on the prompt. It is not the probability that the type is right: single
    samples are noisier than their mean, a mean may rightly follow a few prompts that lose much, and
    a measured type also depends on what other heads are given. Samples of one task resemble each
    other, so that the interval is too narrow for prompts of other tasks.

    **Per profile**: agreement of two profiles of different samples, halves (of which each sees half
    the samples, so that the whole is surer), a task and all others (a small task disagrees by
    chance, too), text and multimodal prompts. Intervals are 95% percentile bootstrap intervals
    (Efron and Tibshirani 1993, chapter 13) over tasks, then samples within them, moved so that
    their mean lies at the estimate: resamples hold samples twice, which shifts agreement itself.
    They also hold the noise of single splits. Seeded: the same rows give the same figures.
    """
    if evidence.samples < LEAST_SAMPLES:
        return Confidence(
            evidence.samples,
            f"too few samples: {evidence.samples}, expected at least {LEAST_SAMPLES}",
        )
    agree, low, high = _heads(evidence, whole)
    tasks, by_task = _tasks(evidence)
    return Confidence(
        evidence.samples, "", agree, low, high, _halves(evidence), tasks, by_task, _kinds(evidence)
    )


def compare(evidence: Evidence, first: Counts, second: Counts) -> Figures:
    """MEASURES between the profiles of two parts of the samples."""
    ours, theirs = (evidence.judge(part, whole=False) for part in (first, second))
    return np.array([
        same_share(ours.types, theirs.types),
        cohen_kappa(ours.types, theirs.types),
        jaccard(ours.types, theirs.types),
        spearman(ours.chosen.ratio, theirs.chosen.ratio),
        spearman(_ground(evidence, ours, first), _ground(evidence, theirs, second)),
    ])  # fmt: skip


def _ground(evidence: Evidence, judgement: Judgement, counts: Counts) -> Figures:
    """What decides about heads: their least loss over strategies at the default budget, linear in
    log ratio; or, where none is measured, the sparsity of query heads."""
    if len(evidence.ratios) < 2:
        return evidence.moments(counts)[0].ravel().astype(np.float64)
    best = judgement.loss_here.min(axis=0).astype(np.float64).reshape(-1, len(evidence.ratios))
    at, known = np.log(evidence.recipe.budget), np.log(evidence.ratios.astype(np.float64))
    return np.array([np.interp(at, known, curve) for curve in best])


def _heads(evidence: Evidence, whole: Judgement) -> tuple[Heads, Heads, Heads]:
    """Agreeing share, lower and upper end per head."""
    same = np.zeros(whole.types.shape, dtype=np.int64)
    for sample in range(evidence.samples):
        same += evidence.types_of_sample(sample, whole.scales) == whole.types
    counts, which = np.unique(same, return_inverse=True)
    figures = [[n / evidence.samples, *wilson(n, evidence.samples)] for n in counts.tolist()]
    table = np.round(figures, 4)[which.reshape(same.shape)] + 0.0
    agree, low, high = (tuple(map(tuple, table[..., i].tolist())) for i in range(3))
    return agree, low, high


# -- profiles of different samples ----------------------------------------------------------------


def _halves(evidence: Evidence) -> Comparison:
    random, strata = _random(0), _strata(evidence)

    def split(parts: Strata) -> Figures:
        return compare(evidence, *_halve(random, parts, evidence.samples))

    def enough(drawn: NDArray[np.int64], parts: Strata) -> bool:
        return sum(map(len, parts)) >= LEAST_SAMPLES

    estimate = np.mean([split(strata) for _ in range(SPLITS)], axis=0)
    count = _affordable(evidence, 2 * SPLITS_PER_RESAMPLE)
    resampled = [
        np.mean([split(parts) for _ in range(SPLITS_PER_RESAMPLE)], axis=0)
        for _, parts in _resamples(random, strata, count, enough)
    ]
    return _comparison(estimate, resampled, SPLITS)


def _tasks(evidence: Evidence) -> tuple[Comparison, dict[str, dict[str, float]]]:
    """A task alone against all others, and the same for each task."""
    strata, names = _strata(evidence), sorted(set(evidence.tasks))
    if len(strata) < 2:
        return Comparison(reason=f"all samples are of one task ({names[0]})"), {}
    enough = [t for t, s in enumerate(strata) if 2 <= len(s) <= evidence.samples - 2]
    compared = sorted(enough, key=lambda t: (-len(strata[t]), t))[:MOST_TASKS]
    if not compared:
        return Comparison(reason="no task has two samples, and the others two"), {}

    def comparable(drawn: NDArray[np.int64], parts: Strata) -> bool:
        sizes = {t: int((drawn == t).sum()) * len(strata[t]) for t in drawn.tolist()}
        judged = set(compared) & set(sizes)
        return bool(judged) and all(sum(sizes.values()) - sizes[t] >= 2 for t in judged)

    single = _against_others(evidence, compared, np.arange(len(strata)), strata)
    count = _affordable(evidence, 2 * len(compared))
    resampled = []
    for drawn, parts in _resamples(_random(1), strata, count, comparable):
        by_number = _against_others(evidence, compared, drawn, parts)
        weights = [int((drawn == t).sum()) for t in by_number]  # each as often as it was drawn
        resampled.append(np.average(list(by_number.values()), axis=0, weights=weights))
    estimate = np.mean(list(single.values()), axis=0)
    by_task = {
        names[t]: dict(zip(MEASURES, (np.round(figures, 4) + 0.0).tolist(), strict=True))
        for t, figures in single.items()
    }
    return _comparison(estimate, resampled, len(single)), by_task


def _against_others(
    evidence: Evidence, compared: Sequence[int], drawn: NDArray[np.int64], parts: Strata
) -> dict[int, Figures]:
    """Each drawn task that is compared, against the others; `parts` are the samples drawn of it."""
    figures = {}
    for task in sorted(set(compared) & set(drawn.tolist())):
        own = [part for t, part in zip(drawn, parts, strict=True) if t == task]
        rest = [part for t, part in zip(drawn, parts, strict=True) if t != task]
        figures[task] = compare(evidence, _counts(evidence, own), _counts(evidence, rest))
    return figures


def _kinds(evidence: Evidence) -> Comparison:
    """Prompts of text alone against those with images or video."""
    seeing = evidence.vision_tokens > 0
    if seeing.all() or not seeing.any():
        only = "holds images or video" if seeing.all() else "is text alone"
        return Comparison(reason=f"there is only one kind: every prompt {only}")
    if min(seeing.sum(), (~seeing).sum()) < 2:
        return Comparison(reason="one kind has but one sample: expected at least two of each")
    strata = _strata(evidence)

    def both(drawn: NDArray[np.int64], parts: Strata) -> bool:
        held = seeing[np.concatenate(parts)]
        return min(held.sum(), (~held).sum()) >= 2

    resampled = []
    for _, parts in _resamples(_random(2), strata, _affordable(evidence, 2), both):
        counts = _counts(evidence, parts)
        resampled.append(compare(evidence, counts * ~seeing, counts * seeing))
    estimate = compare(evidence, evidence.everything * ~seeing, evidence.everything * seeing)
    return _comparison(estimate, resampled, 1)


# -- resampling -----------------------------------------------------------------------------------


def _random(stream: int) -> np.random.RandomState:
    """One stream per comparison; RandomState, since no version of numpy changes it (NEP 19)."""
    return np.random.RandomState(SEED + stream)


def _strata(evidence: Evidence) -> Strata:
    """Samples of each task, by the tasks' names."""
    return [
        np.array([i for i, label in enumerate(evidence.tasks) if label == task])
        for task in sorted(set(evidence.tasks))
    ]


def _counts(evidence: Evidence, parts: Strata) -> Counts:
    return np.bincount(np.concatenate(parts), minlength=evidence.samples)


def _affordable(evidence: Evidence, plans: int) -> int:
    """Resamples of a comparison that needs so many plans each."""
    wanted = HEAD_PLANS // (plans * evidence.conditions.grid.total)
    return max(LEAST_RESAMPLES, min(MOST_RESAMPLES, wanted))


def _resamples(
    random: np.random.RandomState,
    strata: Strata,
    count: int,
    accept: Callable[[NDArray[np.int64], Strata], bool],
) -> Iterator[tuple[NDArray[np.int64], Strata]]:
    """Tasks drawn with replacement, and then samples of each: the first `count` that `accept`
    takes. It must take the strata themselves, so that there is an end."""
    made = 0
    while made < count:
        drawn = random.randint(len(strata), size=len(strata))
        parts = [strata[t][random.randint(len(strata[t]), size=len(strata[t]))] for t in drawn]
        if accept(drawn, parts):
            yield drawn, parts
            made += 1


def _halve(random: np.random.RandomState, strata: Strata, samples: int) -> tuple[Counts, Counts]:
    """Halves with as many samples of each task; an odd one goes to the smaller half."""
    halves: tuple[list[int], list[int]] = ([], [])
    for part in strata:
        mixed = random.permutation(part).tolist()
        middle, coin = len(mixed) // 2, int(random.randint(2))
        more = coin if len(halves[0]) == len(halves[1]) else int(len(halves[1]) < len(halves[0]))
        halves[more].extend(mixed[middle:])
        halves[1 - more].extend(mixed[:middle])
    first, second = (np.bincount(np.array(h), minlength=samples) for h in halves)
    return first, second


def _comparison(estimate: Figures, resampled: Sequence[Figures], repeats: int) -> Comparison:
    """Percentile intervals, moved so that the resamples' mean lies at the estimate."""
    moved = np.array(resampled) - np.mean(resampled, axis=0) + estimate
    low, high = np.quantile(moved, [0.025, 0.975], axis=0)
    least = np.array(list(MEASURES.values()))
    low = np.clip(np.minimum(low, estimate), least, 1)
    high = np.clip(np.maximum(high, estimate), least, 1)
    ends = zip(estimate, low, high, strict=True)
    figures = dict(zip(MEASURES, (Interval.rounded(*end) for end in ends), strict=True))
    return Comparison(figures, repeats, len(resampled))
