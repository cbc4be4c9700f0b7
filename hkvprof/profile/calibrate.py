"""The calibration loop: samples in, profile out.

Per sample: prefill under the model's own attention, teacher-force the reply and the follow-up turns
in one pass, and reduce every layer to small rows of figures. Rows are merged in the order of their
sample ids, in float64, so that the order of samples does not matter. They can be kept in a folder:
then a run can be stopped, and several processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from hkvprof.artifact import Profile, ProjectedIndexTables
from hkvprof.errors import SampleError, UsageError
from hkvprof.heads import KeepRule
from hkvprof.models.adapter import view_model
from hkvprof.models.attention import hooked_attention
from hkvprof.models.processing import ChatProcessor
from hkvprof.policy.planning import DEFAULT, Rules
from hkvprof.profile import classify
from hkvprof.profile.conditions import Conditions, current_versions
from hkvprof.profile.evidence import CONSERVATIVE, MEAN
from hkvprof.profile.fit import Moments
from hkvprof.profile.merge import Decision, build_profile
from hkvprof.profile.probe import KAPPAS, RATIOS, Bench, Probe
from hkvprof.profile.risk import Risk
from hkvprof.profile.rows import RowFolder, SampleRow
from hkvprof.profile.samples import Sample

__all__ = ["KAPPAS", "RATIOS", "calibrate", "measure"]

T = TypeVar("T")
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Recipe = Literal["paper", "measured"]

FIT_SAMPLES = 64
FIT_TOKENS = 65_536
"""The index is fitted on up to FIT_SAMPLES samples, but at least 16 and then no more than these."""


def calibrate(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    *,
    recipe: Recipe = "measured",
    theta: float = 0.9,
    budget: float = 0.10,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    replies: Literal["given", "own"] = "given",
    track: Track | None = None,
    keep: KeepRule | None = None,
    rows: str | Path | None = None,
    rules: Rules = DEFAULT,
    risk: Risk = MEAN,
    conservative: bool = CONSERVATIVE,
) -> Profile:
    """Measure every KV head of `model` on `samples` and decide types and budgets.

    `recipe="measured"` chooses strategy and ratio per head to minimise the loss at the head's
    output and at the reply (docs/method.md); `"paper"` applies HybridKV's rule: static when
    text-centric sparsity reaches `theta`. `budget` is the profile's default share; `seed`, with
    which the samples were chosen, is only recorded. With `on_error="skip"`, samples that cannot be
    used are left out; the provenance counts and names
    them (`skipped`, `skipped_ids`).
    `replies="own"` judges the model's own greedy replies in place of those in the samples (a sample
    without a reply is always judged by the model's own); `keep` are the tokens that every head
    keeps. `track(iterable, description, total)` may wrap the loops to show progress. With `rows`, a
    folder, every measured sample is kept there at once, and a run that was stopped goes on from it.

    `rules`, `risk` and `conservative` are those of evidence.Decision, for `measured`.

    Raises ModelError for unsupported models, SampleError for bad samples, UsageError for options
    out of range and for a folder of other conditions.
    """
    decision = Decision(theta, budget, seed, rules=rules, risk=risk, conservative=conservative)
    decision.check(recipe)
    bench = _bench(model, processor, recipe, replies, keep)
    run = _Run(bench, recipe, on_error, track or _untracked, rows)
    found, tables = run.measure(samples, (1, 1))
    skipped = tuple(sorted(run.skipped))
    return build_profile(run.conditions, found, tables, replace(decision, skipped=skipped))


def measure(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    rows: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    recipe: Recipe = "measured",
    on_error: Literal["raise", "skip"] = "raise",
    replies: Literal["given", "own"] = "given",
    track: Track | None = None,
    keep: KeepRule | None = None,
) -> int:
    """Measure part `shard` (number, of how many) of the samples into a folder of rows.

    All shards get the same samples: the index is fitted on all of them. Returns how many rows this
    shard has there. `merge` makes a profile of the folder when all shards are done. Raises as
    `calibrate` does.
    """
    part, parts = shard
    if not 1 <= part <= parts:
        raise UsageError(f"shard is {part} of {parts}: expected 1 <= part <= parts")
    bench = _bench(model, processor, recipe, replies, keep)
    run = _Run(bench, recipe, on_error, track or _untracked, rows)
    found, _ = run.measure(samples, shard)
    return len(found)


def _bench(
    model: Any, processor: ChatProcessor, recipe: str, replies: str, keep: KeepRule | None
) -> Bench:
    if recipe not in ("paper", "measured"):
        raise UsageError(f"unknown recipe {recipe!r}: expected paper or measured")
    if replies not in ("given", "own"):
        raise UsageError(f"replies is {replies!r}: expected 'given' or 'own'")
    paper = recipe == "paper"
    return Bench(
        model=model,
        processor=processor,
        view=view_model(model),
        menu=classify.PAPER_MENU if paper else classify.MEASURED_MENU,
        keep=keep or (KeepRule() if paper else classify.MEASURED_KEEP),
        own_replies=replies == "own",
    )


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise SampleError("there are no samples to calibrate on: expected at least one")
    identifier, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise SampleError(f"sample id {identifier!r} is given {count} times: ids must be unique")


def _untracked(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return iterable


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in an order of which every beginning is spread evenly over the list."""
    golden = (math.sqrt(5) - 1) / 2
    places = sorted(range(len(samples)), key=lambda i: (i * golden) % 1.0)
    return [samples[i] for i in places]


class _Run:
    """The two passes over the samples."""

    def __init__(
        self, bench: Bench, recipe: str, on_error: str, track: Track, rows: str | Path | None
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
        self.bench, self.on_error, self.track = bench, on_error, track
        self.skipped: dict[str, str] = {}
        self.conditions = Conditions(
            fingerprint=bench.view.fingerprint,
            recipe=recipe,
            strategies=bench.menu,
            keep=bench.keep,
            kappas=KAPPAS,
            ratios=RATIOS,
            replies="own" if bench.own_replies else "given",
            dtype=str(bench.model.dtype).removeprefix("torch."),
            versions=current_versions(),
        )
        self.folder = None if rows is None else RowFolder(Path(rows), self.conditions)

    def measure(
        self, samples: Sequence[Sample], shard: tuple[int, int]
    ) -> tuple[list[SampleRow], ProjectedIndexTables | None]:
        """Rows of a shard's samples, sorted by id, and the index tables."""
        _check_samples(samples)
        ordered = sorted(samples, key=lambda sample: sample.id)
        tables = None
        with hooked_attention(self.bench.model):
            if self.conditions.recipe == "measured":
                tables = self._tables(ordered)
            mine = ordered[shard[0] - 1 :: shard[1]]
            return self.rows(mine, tables), tables

    def _tables(self, ordered: Sequence[Sample]) -> ProjectedIndexTables:
        """Those of the folder, else fitted now."""
        names = json.dumps([sample.id for sample in ordered])
        fitted_on = hashlib.sha256(names.encode()).hexdigest()
        known = None if self.folder is None else self.folder.tables(fitted_on)
        if known is not None:
            return known
        tables = self.fit(_spread(ordered))
        if self.folder is not None:
            self.folder.keep_tables(tables, fitted_on)
        return tables

    def fit(self, samples: Sequence[Sample]) -> ProjectedIndexTables:
        """First pass, until enough is seen: fit the projected index."""
        moments = Moments(self.bench.view.grid)
        total = min(len(samples), FIT_SAMPLES)
        for sample in self.track(self._until_enough(samples, moments), "fitting the index", total):
            self._guarded(sample, lambda probe: probe.add_moments(moments))
        if not bool(moments.key_rows.all()):
            raise SampleError(f"no sample could be used: {self._first_reason()}")
        sizes = tuple(sorted({s.bits for s in self.bench.menu if s.index == "projected"}))
        return moments.fit(sizes)

    def _until_enough(self, samples: Sequence[Sample], moments: Moments) -> Iterator[Sample]:
        """Samples until FIT_SAMPLES were used, or 16 with FIT_TOKENS tokens."""
        used = 0
        for sample in samples:
            if used >= FIT_SAMPLES or (used >= 16 and moments.key_rows.max() >= FIT_TOKENS):
                return
            yield sample
            used += sample.id not in self.skipped

    def rows(
        self, samples: Sequence[Sample], tables: ProjectedIndexTables | None
    ) -> list[SampleRow]:
        """Second pass, all samples: sparsity and loss curves."""
        rows = []
        for sample in self.track(samples, "measuring heads", len(samples)):
            row = self._guarded(sample, lambda probe: self._row(probe, tables))
            if row is not None:
                rows.append(row)
        if not rows:
            raise SampleError(f"no sample could be used: {self._first_reason()}")
        return sorted(rows, key=lambda row: row.id)

    def _row(self, probe: Probe, tables: ProjectedIndexTables | None) -> SampleRow:
        """Measured now, unless the folder has it."""
        if self.folder is None:
            return probe.measure(tables)
        known = self.folder.find(probe.sample.id, probe.digest)
        if known is not None:
            return known
        row = probe.measure(tables)
        self.folder.add(row)
        return row

    def _guarded(self, sample: Sample, work: Callable[[Probe], T]) -> T | None:
        if sample.id in self.skipped:
            return None
        try:
            return work(Probe(self.bench, sample))
        except SampleError as error:
            if self.on_error != "skip":
                raise
            self.skipped[sample.id] = str(error)
            return None

    def _first_reason(self) -> str:
        return next(iter(self.skipped.values()), "none was given")
