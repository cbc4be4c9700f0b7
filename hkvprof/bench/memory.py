"""Bytes of this process, of the machine, and of transformers' own caches."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hkvprof.models.adapter import ModelView

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
_USABLE = 0.6
"""Share of the free memory that caches may take; the rest is for prefill's activations."""


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


def process_bytes(device: torch.device) -> int | None:
    """Device bytes allocated by torch, or resident bytes of the process; None where unknown.

    What is free already is given back first, so that differences are what is really held.
    """
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type != "cpu" or not _STATM.exists():
        return None
    _trim()
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> None:
    """Let glibc return free pages to the system; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(device: torch.device) -> int:
    """Memory that caches may take on `device`."""
    if device.type == "cuda":
        return int(_USABLE * torch.cuda.mem_get_info(device)[0])
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(_USABLE * 1024 * int(lines["MemAvailable"].split()[0]))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_USABLE / 2 * whole)


def stock_bytes(cache: Any, view: ModelView) -> int:
    """Bytes of the storages behind the covered layers of a cache of transformers."""
    layers = [cache.layers[number] for number in view.layer_ids]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
