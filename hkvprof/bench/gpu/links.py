"""Copy bandwidth of the card and of its link to the host, before anything else is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hkvprof.bench.gpu.machine import Machine

PCIE_5 = 40.0
"""GB/s from the host from which on a link counts as PCIe 5 x16 (63 GB/s each way by its standard,
PCIe 4 has 31.5)."""
_REPEATS = 9


@dataclass(frozen=True)
class Links:
    """GB/s (1e9 bytes). `copy` counts bytes read and written; the others each byte once."""

    copy: float
    from_host: float
    to_host: float
    megabytes: float

    @property
    def is_pcie_5(self) -> bool:
        """Whether the host link is at least that fast."""
        return self.from_host >= PCIE_5


def measure_links(machine: Machine, megabytes: float = 1024) -> Links:
    """Median of repeated copies of that size, after a first one; the host's side is pinned."""
    count = max(1, int(megabytes * 2**20))
    pinned = machine.device.type == "cuda"
    near = torch.zeros(count, dtype=torch.uint8, device=machine.device)
    other = torch.zeros_like(near)
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=pinned)

    def rate(work: Callable[[], Tensor], moved: int) -> float:
        machine.lap(work).milliseconds()
        laps = [machine.lap(work) for _ in range(_REPEATS)]
        return moved / median(lap.milliseconds() for lap in laps) / 1e6

    return Links(
        copy=rate(lambda: other.copy_(near), 2 * count),
        from_host=rate(lambda: near.copy_(host, non_blocking=True), count),
        to_host=rate(lambda: host.copy_(near, non_blocking=True), count),
        megabytes=megabytes,
    )
