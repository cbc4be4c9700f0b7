"""Requests leave nothing behind; `tools/studies/soak.py` is the long form."""

from __future__ import annotations

import gc
import random

import torch

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError
from hkvprof.runtime import CompressedCache, Handle
from tests.models_for_tests import apply, left_padded, random_llama

CALLS = 30


def alive() -> tuple[int, int, int]:
    """Live tensors, caches, handles; other tests may have left some."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    return (
        sum(issubclass(kind, torch.Tensor) for kind in kinds),
        sum(issubclass(kind, CompressedCache) for kind in kinds),
        sum(issubclass(kind, Handle) for kind in kinds),
    )


def test_thirty_mixed_requests_leave_nothing_behind() -> None:
    first = alive()
    model = random_llama()
    profiles = [uniform_profile(model, kind, chunk=4) for kind in ("static", "dynamic")]

    def request(number: int) -> str:
        draw = random.Random(number)
        lengths = [draw.randint(70, 200) for _ in range(draw.randint(1, 3))]
        ids, mask = left_padded(lengths, seed=number)
        budget = draw.choice((0.05, 0.3, 0.6, 1.0))
        with apply(model, profiles[number % 2], budget=budget, compress_every=4) as handle:
            try:
                model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
            except BudgetError:
                return "refused"
            return str(handle.receipt().resident_bytes)

    said = [request(number) for number in range(6)]
    before = alive()
    said += [request(number) for number in range(6, CALLS)]
    assert alive() == before
    assert before[1:] == first[1:], "caches and handles outlive their requests"
    assert 0 < said.count("refused") < CALLS / 2
    assert said[:6] == [request(number) for number in range(6)]
