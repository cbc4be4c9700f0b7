"""What a plan foretells is what a cache then holds: bytes and tokens, head by head, exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.heads import HeadType, KeepRule, Strategy
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import with_cache
from hkvprof.profile.costs import TOO_SHORT
from hkvprof.profile.forecast import Forecast
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply
from hkvprof.runtime.receipt import Receipt
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import random_llama, token_ids
from tests.profiles import index_tables, make_profile

FOLDER = Path(__file__).parents[2] / "profiles"
RATIOS = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], dtype=np.float32)
STATIC = Strategy(HeadType.STATIC, pool=7)
STATIC8 = Strategy(HeadType.STATIC, pool=7, resident_bits=8)
STATIC4 = Strategy(HeadType.STATIC, pool=5, resident_bits=4)
MEAN = Strategy(HeadType.DYNAMIC, index="mean", chunk=16)
MINMAX = Strategy(HeadType.DYNAMIC, index="minmax", chunk=8)
SHORT = Strategy(HeadType.DYNAMIC, index="projected", bits=16)
LONG = Strategy(HeadType.DYNAMIC, index="projected", bits=32, rerank=8)
MENUS = {
    "static": (STATIC,),
    "bits": (STATIC8, STATIC4, *(replace(one, resident_bits=8) for one in (MEAN, LONG))),
    "mean": (STATIC, MEAN),
    "minmax": (STATIC, MINMAX),
    "projected": (STATIC, SHORT, LONG),
    "all": (STATIC, MEAN, MINMAX, SHORT, LONG),
}
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_llama()


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32")


def measured(model: Any, menu: tuple[Strategy, ...], seed: int = 0) -> Profile:
    """A profile of the model with random falling curves, dynamic ones lower in most heads."""
    view = view_model(model)
    shape = (len(menu), view.grid.layers, view.grid.kv_heads)
    rng = np.random.default_rng(seed)
    steepness = rng.uniform(0.5, 4, size=(*shape, 1))
    better = np.where([s.head_type == HeadType.STATIC for s in menu], 1.0, 0.7)
    loss = rng.lognormal(0, 1, size=(1, *shape[1:], 1)) * better[:, None, None, None]
    loss = (loss * (1 - RATIOS) ** steepness).astype(np.float32)
    sparsity = np.zeros((1, view.grid.layers, view.grid.query_heads), dtype=np.float32)
    return replace(
        make_profile(grid=view.grid),
        fingerprint=view.fingerprint,
        keep=KeepRule(2, 4, 16),
        strategies=menu,
        kappas=(0.1,),
        ratios=RATIOS.copy(),
        strategy=np.zeros(shape[1:], dtype=np.uint8),
        budget=np.full(shape[1:], 0.1, dtype=np.float32),
        sparsity_mean=sparsity,
        sparsity_std=sparsity.copy(),
        lengths=np.array([1000]),
        loss=loss[None],
        output_error=loss[None].copy(),
        static_margin=None,
        index=index_tables(view.grid),
    )


@torch.no_grad()
def receipt_of(model: Any, profile: Profile, budget: Any, inputs: Any) -> Receipt:
    """What a cache holds after the prompt."""
    with apply(model, profile, budget=budget, min_tokens=1) as handle:
        cache = handle.new_cache()
        model(**inputs, **with_cache(model, cache))
        return cache.receipt()


def check(plan: Forecast, receipt: Receipt) -> None:
    """Equality, which is within the 2% that are promised."""
    assert plan.dense_bytes == receipt.dense_bytes
    assert plan.resident_bytes == receipt.resident_bytes
    assert plan.host_bytes == receipt.host_bytes
    assert plan.table_bytes == receipt.shared_bytes
    assert plan.resident_share == receipt.resident_share
    assert plan.peak_bytes == receipt.peak_bytes + receipt.shared_bytes
    assert plan.is_dense == (receipt.compressed_layers == 0)
    for layer, account in zip(plan.layers, receipt.layers, strict=True):
        for seen in account.heads:
            head = layer.heads[seen.head]
            assert (head.strategy, head.resident_tokens) == (seen.strategy, seen.tokens_resident)
            assert head.resident_bytes == seen.resident_bytes * plan.rows
            assert head.host_bytes == seen.host_bytes * plan.rows


@pytest.mark.parametrize("menu", MENUS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [60, 333, 700])
def test_bytes_of_a_random_model(llama: Any, menu: str, rows: int, tokens: int) -> None:
    profile = measured(llama, MENUS[menu])
    inputs = {"input_ids": token_ids(rows, tokens)}
    for budget in (0.15, 0.3, 0.9, 1.0, 59, f"{rows * 90}KiB"):
        plan = profile.plan(budget, tokens, itemsize=4, rows=rows)
        check(plan, receipt_of(llama, profile, budget, inputs))


def test_bytes_in_half_precision() -> None:
    model = random_llama().to(torch.bfloat16)
    profile = measured(model, MENUS["all"], seed=1)
    for budget in (0.2, 0.5):
        plan = profile.plan(budget, 500, rows=2)
        check(plan, receipt_of(model, profile, budget, {"input_ids": token_ids(2, 500)}))


def test_the_cases_above_are_of_every_kind(llama: Any) -> None:
    profile = measured(llama, MENUS["all"])
    kinds = {
        head.strategy
        for budget in (0.15, 0.3, 0.9)
        for layer in profile.plan(budget, 700, itemsize=4).layers
        for head in layer.heads
    }
    assert kinds >= {"whole", "static-pool7"}
    assert len([name for name in kinds if name.startswith("dynamic")]) >= 3


def test_a_prompt_too_short_for_an_index_is_static(llama: Any) -> None:
    profile = measured(llama, (STATIC, MEAN))
    plan = profile.plan(0.4, 20, itemsize=4)
    assert {head.kind for layer in plan.layers for head in layer.heads} == {"static"}
    assert plan.host_bytes == 0
    check(plan, receipt_of(llama, profile, 0.4, {"input_ids": token_ids(1, 20)}))


def test_a_hot_item_without_room_for_its_score(llama: Any) -> None:
    """Room for an item and its number, not for its smoothed score: planned, but not to be had."""
    profile = uniform_profile(llama, "dynamic", chunk=8, keep=KeepRule(2, 4, 16))
    tokens, unit = 150, 2 * 16 * 4
    items = (tokens - 6) // 8
    least = 6 * unit + items * 16 * 4 + 8 * unit + 4
    for room, name in ((least + 1, TOO_SHORT), (least + 5, "dynamic-mean-chunk8")):
        budget = room / (tokens * unit)
        plan = profile.plan(budget, tokens, itemsize=4)
        assert {head.strategy for layer in plan.layers for head in layer.heads} == {name}
        check(plan, receipt_of(llama, profile, budget, {"input_ids": token_ids(1, tokens)}))


@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_of_tinyvl_with_its_profile(tinyvl: tuple[Any, Any], rows: int) -> None:
    model, processor = tinyvl
    sample = make_sample("list", 1, images=12, split="calibration")
    encoded = processor.encode([sample.messages] * rows)
    inputs = encoded.to(model.device, model.dtype)
    profile = hkvprof.load_profile(FOLDER / "tinyvl.hkv.safetensors")
    for budget in (0.05, 0.1, 0.2, 0.5, 0.95, 64, "100KiB"):
        plan = profile.plan(budget, encoded.tokens, itemsize=4, rows=rows)
        check(plan, receipt_of(model, profile, budget, inputs))


@pytest.mark.parametrize("types", ["static", "dynamic"])
@pytest.mark.parametrize("index", ["mean", "minmax"])
def test_bytes_of_uniform_profiles(llama: Any, types: str, index: str) -> None:
    profile = uniform_profile(llama, types, index=index, chunk=8)
    for rows, budget in ((1, 0.3), (2, 0.5), (2, 0.999)):
        plan = profile.plan(budget, 400, itemsize=4, rows=rows)
        check(plan, receipt_of(llama, profile, budget, {"input_ids": token_ids(rows, 400)}))
        assert plan.expected_loss is None
