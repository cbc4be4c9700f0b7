"""What the benchmark asks of a machine: clocks, memory, graphs. CUDA, or a CPU to try it on."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hkvprof.runtime.graph import CudaGraphs, Recorder

USABLE = 0.9
"""Share of free memory that caches may take."""
CPU = "CPU"
"""How a machine's name begins that is no GPU."""
_MEMINFO = Path("/proc/meminfo")


class Lap(Protocol):
    """One measured stretch of device work."""

    def milliseconds(self) -> float:
        """How long it took; waits for the device."""
        ...


class Machine(Protocol):
    """Where the benchmark runs."""

    device: torch.device
    counts_bytes: bool
    """Whether `allocated` is the allocator's own count."""

    @property
    def name(self) -> str:
        """The card's, or the processor's."""
        ...

    def wait(self) -> None:
        """Until all work is done."""
        ...

    def lap(self, work: Callable[[], Any]) -> Lap:
        """Do the work, between two marks."""
        ...

    def allocated(self) -> int:
        """Bytes that tensors hold on the device."""
        ...

    def free(self) -> int:
        """Bytes that caches may take on the device; gives back what is cached."""
        ...

    def recorder(self, advance: Callable[[int], None]) -> Recorder:
        """For steps whose host part `advance` books."""
        ...


def host_free() -> int:
    """Bytes that pinned memory may take on the host."""
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(USABLE * 1024 * int(lines["MemAvailable"].split()[0]))
    return int(USABLE / 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class _Events:
    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin, self._end = begin, end

    def milliseconds(self) -> float:
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


class CudaMachine:
    """See Machine: CUDA events, torch's caching allocator, CUDA graphs."""

    counts_bytes = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        """The card's."""
        return str(torch.cuda.get_device_name(self.device))

    def wait(self) -> None:
        """For the device."""
        torch.cuda.synchronize(self.device)

    def lap(self, work: Callable[[], Any]) -> Lap:
        """Between two events; the host does not wait here."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return _Events(begin, end)

    def allocated(self) -> int:
        """torch.cuda.memory_allocated."""
        return int(torch.cuda.memory_allocated(self.device))

    def free(self) -> int:
        """A share of what the driver says is free."""
        gc.collect()
        torch.cuda.empty_cache()
        give_back = getattr(torch._C, "_host_emptyCache", None)  # pinned memory; since torch 2.6
        if give_back is not None:
            give_back()
        return int(USABLE * torch.cuda.mem_get_info(self.device)[0])

    def recorder(self, advance: Callable[[int], None]) -> Recorder:
        """CUDA graphs: the host's part runs once, while recording."""
        return CudaGraphs()


class _Seconds:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def milliseconds(self) -> float:
        return 1e3 * self._seconds


class _AgainAndAgain:
    """Takes a recorded step by running it, and takes the host's part back: replays have none."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._advance(1)

        def replay() -> Tensor:
            out = step()
            self._advance(-1)
            return out

        return replay


class CpuMachine:
    """See Machine: to try the benchmark; its times mean nothing, and graphs are plain steps."""

    device = torch.device("cpu")
    counts_bytes = False

    @property
    def name(self) -> str:
        """The architecture's."""
        return f"{CPU} ({platform.processor() or platform.machine()})"

    def wait(self) -> None:
        """There is nothing to wait for."""

    def lap(self, work: Callable[[], Any]) -> Lap:
        """By the clock on the wall."""
        begin = time.perf_counter()
        work()
        return _Seconds(time.perf_counter() - begin)

    def allocated(self) -> int:
        """Nobody counts: the caches' own tensors are looked at instead."""
        return 0

    def free(self) -> int:
        """What the host has."""
        gc.collect()
        return host_free()

    def recorder(self, advance: Callable[[int], None]) -> Recorder:
        """Plain steps."""
        return _AgainAndAgain(advance)


def machine_for(device: torch.device) -> Machine:
    """The machine of a model on `device`."""
    return CudaMachine(device) if device.type == "cuda" else CpuMachine()
