"""The whole benchmark: links, prefill, cells; saved after each, and gone on with where it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.gpu.cells import Bench, run_cell, steps_in_all
from hkvprof.bench.gpu.links import measure_links
from hkvprof.bench.gpu.machine import Machine, machine_for
from hkvprof.bench.gpu.material import DRIFT, Keys, profiles
from hkvprof.bench.gpu.prefill import measure_prefill
from hkvprof.bench.gpu.records import Regime, Result, resume, save
from hkvprof.bench.methods import check_budgets
from hkvprof.errors import UsageError
from hkvprof.lazy import no_triton
from hkvprof.models.adapter import view_model
from hkvprof.models.shapes import SHAPES, build_shape
from hkvprof.profile.budgets import Budget
from hkvprof.runtime.graph import AHEAD

CAUTION = 1.5
"""A further cell is begun if this many times the longest one so far is left."""
LEAST_TOKENS = 64


@dataclass(frozen=True)
class Setup:
    """What is asked for. `minutes` is when no further cell is begun; `layers` None: the shape's."""

    shape: str = "qwen2.5-vl-7b"
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    budgets: tuple[str, ...] = ("0.20", "0.10", "0.05")
    layers: int | None = None
    dtype: str = "auto"
    device: str = "cuda"
    steps: int = 32
    rounds: int = 4
    prefill_tokens: int = 32768
    link_megabytes: float = 1024
    minutes: float = 9.0

    def __post_init__(self) -> None:
        """Raises UsageError or BudgetError."""
        if self.shape not in SHAPES:
            raise UsageError(f"unknown shape {self.shape!r}: expected {' or '.join(SHAPES)}")
        check_budgets(self.budgets)
        for text in self.budgets:
            if Budget.parse(text).share is None:
                raise UsageError(
                    f"budget {text}: expected shares of the dense cache such as 0.10, because they "
                    "are compared across contexts and batches"
                )
        if not self.contexts or min(self.contexts) < LEAST_TOKENS:
            raise UsageError(f"expected contexts of at least {LEAST_TOKENS} tokens such as 8192")
        if not self.batches or min(self.batches) < 1:
            raise UsageError("expected batches of at least 1 row such as 1,8,32")
        if self.rounds < 1 or self.steps // self.rounds < 2 or self.steps % self.rounds:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds: expected at least 2 in each, the "
                "same number in all"
            )
        if steps_in_all(self.steps, self.rounds) > AHEAD - 4:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds reach into the next compression: "
                "expected fewer, such as --steps 32 --rounds 4"
            )
        if self.prefill_tokens < LEAST_TOKENS or self.minutes <= 0 or self.link_megabytes <= 0:
            raise UsageError(
                f"expected a prefill of at least {LEAST_TOKENS} tokens, and minutes above 0"
            )

    @property
    def wanted(self) -> tuple[tuple[int, int], ...]:
        """Cells, smallest first."""
        pairs = {(context, batch) for context in self.contexts for batch in self.batches}
        return tuple(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair)))


def benchmark(
    setup: Setup,
    path: Path,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Run what is not in `path` yet, as far as the time goes; `path` holds all of it.

    Raises UsageError, also where `path` holds another benchmark.
    """
    began = clock()
    check_device(setup.device)
    shape = SHAPES[setup.shape]
    layers = setup.layers or shape.layers
    say(f"making {layers} layers of {setup.shape} with random weights")
    model = build_shape(setup.shape, layers, setup.dtype, setup.device, shape.vocabulary)
    machine = machine_for(model.device)
    regime = describe(setup, model, layers, machine)
    found = resume(path, regime)
    view = view_model(model)
    keys = Keys(view, model.dtype, model.device)
    made = profiles(model, view, keys)
    if found is None:
        say("copy bandwidth, and prefill")
        links = measure_links(machine, setup.link_megabytes)
        middle = setup.budgets[len(setup.budgets) // 2]
        prefill = measure_prefill(model, view, machine, made, middle, setup.prefill_tokens)
        found = Result(regime, setup.wanted, links, prefill)
        save(found, path)
    else:
        say(f"{path}: {len(found.cells)} cells are done")
    found = replace(found, wanted=tuple(dict.fromkeys((*found.wanted, *setup.wanted))))
    bench = Bench(model, view, machine, keys, made, regime, found.links, say)
    longest = 0.0
    for number, (context, batch) in enumerate(found.left):
        spent = clock() - began
        if number and spent + CAUTION * longest > 60 * setup.minutes:
            say(f"{spent / 60:.1f} minutes are over: run again for the rest")
            break
        start = clock()
        cell = run_cell(bench, context, batch)
        longest = max(longest, clock() - start)
        found = replace(found, cells=(*found.cells, cell))
        save(found, path)
    return found


def check_device(device: str) -> None:
    """Raise UsageError where there is no such device, or no Triton on it."""
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        raise UsageError(f"--device {device}: expected cuda, or cpu to try the benchmark")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "torch finds no CUDA device: run this on a machine that has one, or try it with "
            "--device cpu --shape tiny --context 2048 --batch 1 --prefill 1024"
        )
    if kind == "cuda" and (reason := no_triton()):
        raise UsageError(f"the benchmark is of the Triton kernels, and {reason}")


def describe(setup: Setup, model: Any, layers: int, machine: Machine) -> Regime:
    """The regime of a model made for this setup."""
    grid = view_model(model).grid
    versions = {"hkvprof": hkvprof.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    if not no_triton():
        import triton

        versions["triton"] = triton.__version__
    return Regime(
        shape=setup.shape,
        layers=layers,
        dtype=str(model.dtype).removeprefix("torch."),
        budgets=setup.budgets,
        steps=setup.steps,
        rounds=setup.rounds,
        prefill_tokens=setup.prefill_tokens,
        drift=DRIFT,
        weight_bytes=weight_bytes(model),
        token_bytes=grid.token_bytes(model.dtype.itemsize),
        device=machine.name,
        versions=versions,
    )


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a decoding step reads: neither vision tower nor embedding table."""
    unread = model.get_input_embeddings().weight
    return sum(
        weight.nbytes
        for name, weight in model.named_parameters()
        if "visual" not in name and weight is not unread
    )
