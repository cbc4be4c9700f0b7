"""What compression adds to the time to the first token: real prefills of random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from hkvprof.bench.gpu.machine import Machine
from hkvprof.bench.gpu.records import Prefill
from hkvprof.models.adapter import ModelView
from hkvprof.models.calls import last_row_only, with_cache
from hkvprof.models.outline import vocabulary
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply

ROUNDS = 3


@torch.no_grad()
def measure_prefill(
    model: Any,
    view: ModelView,
    machine: Machine,
    profiles: Mapping[str, Profile],
    budget: str,
    tokens: int,
) -> tuple[Prefill, ...]:
    """Medians of ROUNDS turns after a first one, all methods in each."""
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(3, vocabulary(model), (1, tokens), generator=random).to(model.device)
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *profiles)}

    def read(cache: Any) -> float:
        machine.wait()
        lap = machine.lap(
            lambda: model(input_ids=ids, **with_cache(model, cache), **last_row_only(model))
        )
        return lap.milliseconds() / 1e3

    for _ in range(ROUNDS + 1):
        seconds["dense"].append(read(DynamicCache(config=view.text_config)))
        for name, profile in profiles.items():
            with apply(model, profile, budget=budget, min_tokens=1) as handle:
                seconds[name].append(read(handle.new_cache(tokens)))
    medians = {name: median(times[1:]) for name, times in seconds.items()}
    return tuple(
        Prefill(tokens, f"{name} {budget}", medians[name], medians["dense"]) for name in profiles
    )
