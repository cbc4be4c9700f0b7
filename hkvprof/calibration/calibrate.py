"""The calibration loop: samples in, profile out.

Per sample: prefill under the model's own attention, teacher-force the reply and the follow-up turns
in one pass, and reduce every layer to small rows of figures. Rows are merged in the order of their
sample ids, in float64, so that the order of samples does not matter. They can be kept in a folder:
then a run can be stopped, and several processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.group import ALONE, Group
from hkvprof.calibration.index_fit import FIT_SAMPLES, Moments, until_enough
from hkvprof.calibration.kept import KeptProbes
from hkvprof.calibration.merge import build_profile
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.calibration.query_fit import fitted
from hkvprof.calibration.recipe import MEASURED, Recipe
from hkvprof.calibration.rows import RowFolder, SampleRow
from hkvprof.errors import SampleError, UsageError
from hkvprof.models.attention import hooked_attention
from hkvprof.models.processing import ChatProcessor
from hkvprof.models.rotary import rotating_keys
from hkvprof.profile.record import Profile
from hkvprof.samples.read import OnError, Sample

__all__ = ["calibrate", "measure"]

T = TypeVar("T")
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def calibrate(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    recipe: Recipe = MEASURED,
    *,
    rows: str | Path | None = None,
    on_error: OnError = "raise",
    track: Track | None = None,
    group: Group = ALONE,
) -> Profile:
    """Measure every KV head of `model` on `samples` and decide types and budgets.

    `recipe` says how. With `rows`, a folder, every measured sample is kept there at once, and a run
    that was stopped goes on from it. With `on_error="skip"`, samples that cannot be used are left
    out; the provenance counts and names them (`skipped`, `skipped_ids`).
    `track(iterable, description, total)` may wrap the loops to show progress. With a `group` of
    processes (`distributed.together`), each of which calls this with the same samples, they share
    the work and all return the same profile, that of one process alone.

    Raises ModelError for unsupported models, SampleError for bad samples, UsageError for a folder
    of other conditions.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"recipe must be hkvprof.Recipe, such as Recipe('paper'), found {recipe!r}"
        )
    run = Run(ProbedModel.of(model, processor, recipe), rows, on_error, track, group)
    ordered = _in_order(samples)
    tables, measured = run.measure(ordered, ordered[group.part])
    share = (measured, run.skipped)
    shares = [share] if group.in_step else group.collect(share)

    def build() -> Profile:
        joined = [row for part, _ in shares for row in part]
        skipped = {name: reason for _, part in shares for name, reason in part.items()}
        if not joined:
            raise _nothing_usable(skipped)
        return build_profile(run.conditions, joined, tables, recipe, sorted(skipped))

    return group.from_leader(build)


def measure(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    rows: str | Path,
    recipe: Recipe = MEASURED,
    *,
    shard: tuple[int, int] = (1, 1),
    on_error: OnError = "raise",
    track: Track | None = None,
) -> int:
    """Measure part `shard` (number, of how many) of the samples into a folder of rows.

    All shards get the same samples: the index is fitted on all of them. Returns how many rows this
    shard has there. `merge` makes a profile of the folder when all shards are done. Raises as
    `calibrate` does.
    """
    part, parts = shard
    if not 1 <= part <= parts:
        raise UsageError(f"shard is {part} of {parts}: expected 1 <= part <= parts")
    run = Run(ProbedModel.of(model, processor, recipe), rows, on_error, track, ALONE)
    ordered = _in_order(samples)
    chosen = ordered[part - 1 :: parts]
    _, measured = run.measure(ordered, chosen)
    if chosen and not measured:
        raise _nothing_usable(run.skipped)
    return len(measured)


class Run:
    """The two passes over the samples: one that fits the index, one that measures rows."""

    def __init__(
        self,
        probed: ProbedModel,
        rows: str | Path | None = None,
        on_error: OnError = "raise",
        track: Track | None = None,
        group: Group = ALONE,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
        self.probed, self.on_error, self.group = probed, on_error, group
        self.track = track or _untracked
        self.conditions = probed.conditions
        self.folder = None if rows is None else RowFolder(Path(rows), self.conditions)
        self.skipped: dict[str, str] = {}
        self.kept = KeptProbes(())

    def measure(
        self, samples: Sequence[Sample], share: Sequence[Sample]
    ) -> tuple[FittedTables | None, list[SampleRow]]:
        """The index tables, fitted on all samples, and the rows of this process's `share`."""
        tables = None
        with hooked_attention(self.probed.model):
            if self.probed.recipe.index_sizes or self.probed.turning is not None:
                fitted_on = _digest(samples)
                self.kept = KeptProbes(share)
                fit = partial(self.fit, samples)
                tables = self.group.index(self.folder, fitted_on, fit, self._wait)
            return tables, self._rows(share, tables)

    def fit(self, samples: Sequence[Sample]) -> FittedTables:
        """Look at samples until enough is seen; fit the projected index, and centres of queries
        where scores ask them."""
        view, queries = self.probed.view, self.probed.new_queries()
        moments = Moments(view.grid, rotating_keys(self.probed.model, view))
        enough = until_enough(samples, moments, self.skipped)

        def look(probe: Probe) -> None:
            probe.add_moments(moments, queries)
            self.kept.offer(probe)

        for sample in self.track(enough, "fitting the index", min(len(samples), FIT_SAMPLES)):
            self._probe(sample, look)
        if not bool(moments.key_rows.all()):
            raise _nothing_usable(self.skipped)
        return fitted(moments, queries, self.probed.recipe.index_sizes)

    def _wait(self, until: Iterator[None]) -> None:
        """Let another process fit the index."""
        for _ in self.track(until, "waiting for the index that another process fits", 1):
            pass

    def _rows(self, samples: Sequence[Sample], tables: FittedTables | None) -> list[SampleRow]:
        """Sparsity and loss curves of these samples: measured, or of the folder."""

        def row(probe: Probe) -> SampleRow:
            return self.group.row(self.folder, probe, tables)

        tracked = self.track(samples, "measuring heads", len(samples))
        rows = [self._probe(sample, row) for sample in tracked]
        return [row for row in rows if row is not None]

    def _probe(self, sample: Sample, work: Callable[[Probe], T]) -> T | None:
        """What `work` makes of the sample; None, and the reason kept, where it is skipped."""
        self.group.check()
        if sample.id in self.skipped:
            return None
        try:
            return work(self.kept.take(sample) or Probe(self.probed, sample))
        except SampleError as error:
            if self.on_error != "skip":
                raise
            self.skipped[sample.id] = str(error)
            return None


def _in_order(samples: Sequence[Sample]) -> list[Sample]:
    """By id. Raises SampleError where there are none, or two of one id."""
    if not samples:
        raise SampleError("there are no samples to calibrate on: expected at least one")
    identifier, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise SampleError(f"sample id {identifier!r} is given {count} times: ids must be unique")
    return sorted(samples, key=lambda sample: sample.id)


def _digest(samples: Sequence[Sample]) -> str:
    """Of the samples that an index is fitted on: their ids, in order."""
    names = json.dumps([sample.id for sample in samples])
    return hashlib.sha256(names.encode()).hexdigest()


def _nothing_usable(skipped: dict[str, str]) -> SampleError:
    """The error for samples none of which could be used, with the first reason."""
    return SampleError(f"no sample could be used: {next(iter(skipped.values()))}")


def _untracked(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return iterable
