"""What the benchmark asks of a machine: clocks, graphs, copy bandwidth, room for caches."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hkvprof.bench.methods import Kind, Method
from hkvprof.bench.records import Links
from hkvprof.models.adapter import ModelView
from hkvprof.profile.budgets import Budget
from hkvprof.runtime.graph import CudaGraphs, Recorder

Lap = Callable[[], float]
"""Milliseconds that a piece of work took; waits for the device."""
_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_COPIES = 9


class Machine:
    """A CPU, or a device that torch gives no clock for.

    What a step takes is measured here too, but graphs are plain steps, and nobody counts bytes but
    the system for the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        """The device with its product name, where known."""
        return device_name(self.device)

    def wait(self) -> None:
        """Until all work is done."""

    def lap(self, work: Callable[[], Any]) -> Lap:
        """Do the work, between two readings of the clock."""
        begin = time.perf_counter()
        work()
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return lambda: milliseconds

    def allocated(self) -> int | None:
        """Bytes of tensors on the device by the allocator's count; None where nobody counts."""
        return None

    def process_bytes(self) -> int | None:
        """Bytes that differ by what is held: the allocator's count, or the process's memory.

        What is free already is given back first. None where unknown.
        """
        gc.collect()
        if self.device.type != "cpu" or not _STATM.exists():
            return None
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: returns free pages
        if trim is not None:
            trim(0)
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def free(self, share: float) -> int:
        """That share of the device's free bytes; what torch keeps in stock is given back first."""
        gc.collect()
        return host_free(share)

    def recorder(self, advance: Callable[[int], None] = lambda steps: None) -> Recorder:
        """For steps whose host part `advance` books."""
        return _PlainSteps(advance)


class CudaMachine(Machine):
    """CUDA events, torch's caching allocator, CUDA graphs."""

    def wait(self) -> None:
        """Until the device has done all work."""
        torch.cuda.synchronize(self.device)

    def lap(self, work: Callable[[], Any]) -> Lap:
        """Between two events; the host does not wait here."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return milliseconds

    def allocated(self) -> int:
        """Bytes by torch.cuda.memory_allocated, without waiting."""
        return int(torch.cuda.memory_allocated(self.device))

    def process_bytes(self) -> int:
        """The allocator's count, garbage collected."""
        gc.collect()
        return self.allocated()

    def free(self, share: float) -> int:
        """Of what the driver says is free."""
        gc.collect()
        torch.cuda.empty_cache()
        give_back = getattr(torch._C, "_host_emptyCache", None)  # pinned memory; since torch 2.6
        if give_back is not None:
            give_back()
        return int(share * torch.cuda.mem_get_info(self.device)[0])

    def recorder(self, advance: Callable[[int], None] = lambda steps: None) -> Recorder:
        """CUDA graphs: the host's part runs once, while recording."""
        return CudaGraphs(self.device)


class _PlainSteps:
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


def machine_for(device: torch.device) -> Machine:
    """The machine of a model on `device`."""
    return CudaMachine(device) if device.type == "cuda" else Machine(device)


def device_name(device: torch.device) -> str:
    """The device with its product name, where known."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu" and _CPUINFO.exists():
        lines = _CPUINFO.read_text(errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"cpu ({names[0]})"
    return f"{device} ({platform.processor() or platform.machine()})"


def host_free(share: float) -> int:
    """That share of the host's available bytes; where unknown, of half of its memory."""
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(share * 1024 * int(lines["MemAvailable"].split()[0]))
    return int(share / 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@contextmanager
def no_collector() -> Iterator[None]:
    """No automatic garbage collection within; what lives already is not looked at by others."""
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def stock_bytes(cache: Any, view: ModelView) -> int:
    """Bytes of the storages behind the covered layers of a cache of transformers."""
    layers = [cache.layers[number] for number in view.layer_ids]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def measure_links(machine: Machine, megabytes: float) -> Links:
    """Median of repeated copies of so many MiB, after a first one; the host's side is pinned."""
    count = max(1, int(megabytes * 2**20))
    pinned = machine.device.type == "cuda"
    near = torch.zeros(count, dtype=torch.uint8, device=machine.device)
    other = torch.zeros_like(near)
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=pinned)

    def rate(work: Callable[[], Tensor], moved: int) -> float:
        machine.lap(work)()
        laps = [machine.lap(work) for _ in range(_COPIES)]
        return moved / median(lap() for lap in laps) / 1e6

    return Links(
        copy=rate(lambda: other.copy_(near), 2 * count),
        from_host=rate(lambda: near.copy_(host, non_blocking=True), count),
        to_host=rate(lambda: host.copy_(near, non_blocking=True), count),
        megabytes=megabytes,
    )


@dataclass(frozen=True)
class CacheSpace:
    """What the caches of a context of `tokens` tokens may take, in bytes.

    `dense` are those of a dense cache of so many `segments` (a KV head of a layer and row),
    `working` what is needed beside the caches. `host` is for pinned items; None where they lie in
    the device's own memory.
    """

    tokens: int
    dense: int
    segments: int
    working: int
    device: int
    host: int | None

    @property
    def for_caches(self) -> int:
        """Bytes on the device, less the working ones."""
        return self.device - self.working


def gather_groups(
    wanted: Sequence[Method], space: CacheSpace
) -> tuple[list[list[Method]], dict[Method, str]]:
    """Sets of methods whose caches fit together, in order; and why others fit nowhere."""
    groups: list[list[Method]] = []
    reasons: dict[Method, str] = {}
    left = 0
    for method in wanted:
        device, pinned = needs(method, space)
        if device > space.for_caches:
            reasons[method] = _too_large(device, "on the device", space.for_caches)
        elif space.host is not None and pinned > space.host:
            reasons[method] = _too_large(pinned, "of pinned host memory", space.host)
        else:
            if not groups or device > left:
                groups.append([])
                left = space.for_caches
            groups[-1].append(method)
            left -= device
    return groups, reasons


def _too_large(needed: int, where: str, had: int) -> str:
    return f"needs {needed / 1e9:.1f} GB {where}, {max(0, had) / 1e9:.1f} GB can be had"


def needs(method: Method, space: CacheSpace) -> tuple[int, int]:
    """Bytes on the device, and pinned ones on the host (which a set shares).

    torch rounds blocks of pinned memory, one per segment, up to powers of two.
    """
    if not method.kind.compresses or method.kind is Kind.WHOLE:
        return space.dense, 0
    share = Budget.parse(method.budget).resolve(space.tokens, space.dense)
    part = {Kind.STATIC: 0.0, Kind.PROFILE: 0.5, Kind.DYNAMIC: 1.0}[method.kind]
    device = share * space.dense * 1.02 + (part * space.dense if method.control else 0)
    # A set's mixed heads find their items among those of its dynamic ones, or the other way round.
    block = 1 << max(0, space.dense // space.segments - 1).bit_length()
    pinned = space.segments * block if part else 0
    return (int(device) + pinned, 0) if space.host is None else (int(device), pinned)
