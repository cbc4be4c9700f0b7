"""The two passes over the samples, in one process or as one of several."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hkvprof.calibration.conditions import Conditions, current_versions
from hkvprof.calibration.group import Group
from hkvprof.calibration.index_fit import Moments
from hkvprof.calibration.probe import Bench, Probe
from hkvprof.calibration.rows import RowFolder, SampleRow
from hkvprof.errors import SampleError, UsageError
from hkvprof.models.attention import hooked_attention
from hkvprof.profile.record import ProjectedIndexTables
from hkvprof.samples.read import Sample

T = TypeVar("T")
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

FIT_SAMPLES = 64
FIT_TOKENS = 65_536
"""The index is fitted on up to FIT_SAMPLES samples, but at least 16 and then no more than these."""


class Run:
    """The two passes over the samples, in this process."""

    def __init__(
        self,
        bench: Bench,
        recipe: str,
        on_error: str,
        track: Track,
        rows: str | Path | None,
        group: Group,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
        self.bench, self.on_error, self.track, self.group = bench, on_error, track, group
        self.skipped: dict[str, str] = {}
        self.conditions = Conditions(
            fingerprint=bench.view.fingerprint,
            recipe=recipe,
            strategies=bench.menu,
            keep=bench.keep,
            kappas=bench.kappas,
            ratios=bench.ratios,
            replies="own" if bench.own_replies else "given",
            dtype=str(bench.model.dtype).removeprefix("torch."),
            versions=current_versions(),
        )
        self.folder = None if rows is None else RowFolder(Path(rows), self.conditions)

    def measure(
        self, ordered: Sequence[Sample], mine: Sequence[Sample]
    ) -> tuple[ProjectedIndexTables | None, list[SampleRow]]:
        """The index tables, fitted on all samples, and the rows of this process's."""
        tables = None
        with hooked_attention(self.bench.model):
            if self.conditions.recipe == "measured":
                tables = self._tables(ordered)
            return tables, self._rows(mine, tables)

    # -- first pass: the index ------------------------------------------------------------------

    def _tables(self, ordered: Sequence[Sample]) -> ProjectedIndexTables:
        """Fitted once per group: by all processes in step, or by the leading one."""
        if not self.group.in_step:
            return self.group.from_leader(lambda: self._folder_tables(ordered))
        known = self.group.from_leader(lambda: self._known_tables(ordered))
        tables = known or self._fit(spread(ordered))
        return self.group.from_leader(lambda: self._keep(tables, ordered))

    def _folder_tables(self, ordered: Sequence[Sample]) -> ProjectedIndexTables:
        known = self._known_tables(ordered)
        return known or self._keep(self._fit(spread(ordered)), ordered)

    def _known_tables(self, ordered: Sequence[Sample]) -> ProjectedIndexTables | None:
        return None if self.folder is None else self.folder.tables(_fitted_on(ordered))

    def _keep(
        self, tables: ProjectedIndexTables, ordered: Sequence[Sample]
    ) -> ProjectedIndexTables:
        if self.folder is None:
            return tables
        return self.folder.keep_tables(tables, _fitted_on(ordered))

    def _fit(self, samples: Sequence[Sample]) -> ProjectedIndexTables:
        """Look at samples until enough is seen, and fit the projected index."""
        moments = Moments(self.bench.view.grid)
        total = min(len(samples), FIT_SAMPLES)
        for sample in self.track(self._until_enough(samples, moments), "fitting the index", total):
            self._guarded(sample, lambda probe: probe.add_moments(moments))
        if not bool(moments.key_rows.all()):
            raise nothing_usable(self.skipped)
        sizes = tuple(sorted({s.bits for s in self.bench.menu if s.index == "projected"}))
        return moments.fit(sizes)

    def _until_enough(self, samples: Sequence[Sample], moments: Moments) -> Iterator[Sample]:
        used = 0
        for sample in samples:
            if is_enough(used, int(moments.key_rows.max())):
                return
            yield sample
            used += sample.id not in self.skipped

    # -- second pass: the rows ------------------------------------------------------------------

    def _rows(
        self, samples: Sequence[Sample], tables: ProjectedIndexTables | None
    ) -> list[SampleRow]:
        """Sparsity and loss curves of these samples."""
        rows = []
        for sample in self.track(samples, "measuring heads", len(samples)):
            row = self._guarded(sample, lambda probe: self._row(probe, tables))
            if row is not None:
                rows.append(row)
        return rows

    def _row(self, probe: Probe, tables: ProjectedIndexTables | None) -> SampleRow:
        """Measured now, unless the folder has it; in step, the leading process's folder counts."""
        folder, in_step = self.folder, self.group.in_step
        if folder is None:
            return probe.measure(tables)

        def find() -> SampleRow | None:
            return folder.find(probe.sample.id, probe.digest)

        known = self.group.from_leader(find) if in_step else find()
        if known is not None:
            return known
        row = probe.measure(tables)
        if self.group.leads or not in_step:
            folder.add(row)
        return row

    def _guarded(self, sample: Sample, work: Callable[[Probe], T]) -> T | None:
        self.group.check()
        if sample.id in self.skipped:
            return None
        try:
            return work(Probe(self.bench, sample))
        except SampleError as error:
            if self.on_error != "skip":
                raise
            self.skipped[sample.id] = str(error)
            return None


def _fitted_on(ordered: Sequence[Sample]) -> str:
    """Digest of the samples that an index is fitted on."""
    names = json.dumps([sample.id for sample in ordered])
    return hashlib.sha256(names.encode()).hexdigest()


def nothing_usable(skipped: dict[str, str]) -> SampleError:
    """The error for samples none of which could be used, with the first reason."""
    return SampleError(f"no sample could be used: {next(iter(skipped.values()))}")


def is_enough(samples: int, tokens: int) -> bool:
    """Whether an index that has seen so many needs no more: FIT_SAMPLES, or 16 with FIT_TOKENS."""
    return samples >= FIT_SAMPLES or (samples >= 16 and tokens >= FIT_TOKENS)


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in an order of which every beginning is spread evenly over the list."""
    golden = (math.sqrt(5) - 1) / 2
    places = sorted(range(len(samples)), key=lambda i: (i * golden) % 1.0)
    return [samples[i] for i in places]
