"""The conditions of a benchmark, for the line without which its figures mean nothing."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.records import Regime
from hkvprof.bench.run import Setup
from hkvprof.models.adapter import view_model

_CPUINFO = Path("/proc/cpuinfo")


def describe(model: Any, name: str, profile: str, setup: Setup) -> Regime:
    """The regime of a benchmark of `model` in this process; `name` and `profile` as asked for."""
    return Regime(
        model=name,
        profile=profile,
        layers=view_model(model).grid.layers,
        batch=setup.batch,
        new_tokens=setup.new_tokens,
        rounds=setup.rounds,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(model.device),
        threads=torch.get_num_threads(),
        kernels=_kernels(),
        versions={
            "hkvprof": hkvprof.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


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


def _kernels() -> str:
    """What the runtime says about its kernels; `none` where it has none."""
    try:
        status = importlib.import_module("hkvprof.runtime.kernels").status
    except (ImportError, AttributeError):
        return "none"
    return str(status())
