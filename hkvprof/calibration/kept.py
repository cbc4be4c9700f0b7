"""Prompts that the first pass over the samples has read, kept so that the second need not."""

from __future__ import annotations

from collections.abc import Iterable

from hkvprof.calibration.probe import Probe
from hkvprof.samples.read import Sample

KEPT_BYTES = 2**30
"""Most bytes of keys and values that are kept, in host memory; other prompts are read again."""


class KeptProbes:
    """Probes of samples that are to be measured, after their first pass, within KEPT_BYTES."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._wanted = {sample.id for sample in samples}
        self._room = KEPT_BYTES
        self._probes: dict[str, Probe] = {}

    def offer(self, probe: Probe) -> None:
        """Keep a probe that has been looked at, if it is wanted and there is room."""
        if probe.sample.id in self._wanted and probe.cache_bytes <= self._room and probe.pause():
            self._room -= probe.cache_bytes
            self._probes[probe.sample.id] = probe

    def take(self, sample: Sample) -> Probe | None:
        """The probe of a sample, once; None where none was kept."""
        return self._probes.pop(sample.id, None)
