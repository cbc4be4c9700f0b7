"""Many threads, each with a model of its own: no cross-talk."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError
from hkvprof.models.calls import with_cache
from hkvprof.runtime import CompressedCache
from hkvprof.runtime.kernels import loading
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, random_llama, token_ids

PROFILE = Path(__file__).parents[2] / "profiles" / "tinyvl.hkv.safetensors"
THREADS = 8
BUDGETS = (0.1, 0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


def together(action: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `action` says in so many threads, which begin at once."""
    ready = threading.Barrier(count)

    def begin(number: int) -> Any:
        ready.wait(timeout=600)
        return action(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def answers(model: Any, processor: Any, number: int, calls: int) -> list[Any]:
    """Tokens and bytes of some requests of thread `number`: prompts, budgets, lengths differ."""
    said = []
    for call in range(calls):
        seed = 101 * number + call
        sample = make_sample("ocr", seed, images=5 + seed % 5)
        inputs = processor.encode([sample.messages]).to(model.device, model.dtype)
        with apply(model, PROFILE, budget=BUDGETS[seed % len(BUDGETS)]) as handle:
            out = model.generate(**inputs, max_new_tokens=3 + seed % 4, do_sample=False)
            receipt = handle.receipt()
        said.append((out.tolist(), receipt.resident_bytes, receipt.host_bytes))
    return said


def _check_models(tiny: tuple[Any, Any], calls: int) -> None:
    model, processor = tiny
    alone = [answers(model, processor, number, calls) for number in range(THREADS)]
    copies = [copy.deepcopy(model) for _ in range(THREADS)]
    at_once = together(lambda number: answers(copies[number], processor, number, calls))
    assert at_once == alone
    assert len({str(one) for one in alone}) == THREADS, "threads that say the same prove nothing"


def test_eight_models_in_eight_threads_say_what_they_say_alone(tiny: tuple[Any, Any]) -> None:
    _check_models(tiny, calls=1)


@pytest.mark.slow
def test_eight_models_in_eight_threads_for_long(tiny: tuple[Any, Any]) -> None:
    _check_models(tiny, calls=25)


def test_two_handles_taking_turns_do_not_disturb_each_other() -> None:
    """Steps of two models, two profiles and two budgets, interleaved token by token."""
    models = [random_llama(seed=0), random_llama(seed=1)]
    profiles = [uniform_profile(models[0], "static"), uniform_profile(models[1], "dynamic")]
    ids = [token_ids(1, 90, seed=seed) for seed in (1, 2)]

    def steps(turns: list[int]) -> list[torch.Tensor]:
        handles = [
            apply(m, p, budget=b) for m, p, b in zip(models, profiles, (0.3, 0.6), strict=True)
        ]
        caches = [handle.new_cache() for handle in handles]
        logits: list[list[torch.Tensor]] = [[], []]
        nxt = list(ids)
        for turn in turns:
            with torch.no_grad():
                out = models[turn](input_ids=nxt[turn], **with_cache(models[turn], caches[turn]))
            logits[turn].append(out.logits[:, -1])
            nxt[turn] = out.logits[:, -1:].argmax(-1)
        for handle in handles:
            handle.detach()
        return [torch.cat(one) for one in logits]

    alone = steps([0] * 8 + [1] * 8)
    in_turn = steps([0, 1] * 8)
    assert all(torch.equal(a, b) for a, b in zip(alone, in_turn, strict=True))


def test_hooking_models_at_once_registers_both_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever finds the attention function finds the mask function too."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    order = []
    for kind in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(kind, "_global_mapping", dict(kind._global_mapping))
        kind._global_mapping.pop("hkvprof_sdpa", None)
        register = kind.register
        monkeypatch.setattr(
            kind,
            "register",
            lambda name, function, kind=kind, register=register: (
                order.append(kind.__name__),
                register(name, function),
            ),
        )
    model = random_llama()
    apply(model, uniform_profile(model)).detach()
    assert order == ["AttentionMaskInterface", "AttentionInterface"]


def test_kernels_are_opened_once_whoever_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    state = loading._State()
    monkeypatch.setattr(loading, "STATE", state)
    monkeypatch.setattr(loading, "switched_off", lambda: "")
    opened = []

    def open_slowly(kind: int, group: int) -> Any:
        opened.append((kind, group))
        threading.Event().wait(0.05)
        return object()

    monkeypatch.setattr(loading, "_open", open_slowly)
    found = together(lambda number: loading.library(torch.float32, 1 + number % 2))
    assert sorted(opened) == [(0, 1), (0, 2)]
    assert len({id(library) for library in found}) == 2


def test_looking_for_a_kernel_while_others_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """`opened` walks a table that other threads add to."""
    state = loading._State()
    monkeypatch.setattr(loading, "STATE", state)
    state.libraries = {(9, group): None for group in range(3000)}

    def work(number: int) -> None:
        for step in range(300):
            if number % 2:
                state.libraries[9, 10_000 * number + step] = None
            else:
                assert loading.opened(torch.float32) is None

    together(work)


def test_a_profile_is_read_and_planned_by_many_threads() -> None:
    shared = hkvprof.load_profile(PROFILE)

    def plans(profile: Any, number: int) -> list[Any]:
        found: list[Any] = []
        for step in range(6):
            budget, tokens = BUDGETS[(number + step) % 4], 500 * (1 + number + step)
            try:
                plan = profile.plan(budget, tokens, rows=1 + step % 3)
            except BudgetError as error:
                found.append(str(error))
            else:
                chosen = profile.allocation(budget, tokens)
                found.append((plan.resident_bytes, plan.host_bytes, chosen.ratio.tobytes()))
        return found

    alone = [plans(shared, number) for number in range(THREADS)]
    assert together(lambda number: plans(shared, number)) == alone
    assert together(lambda number: plans(hkvprof.load_profile(PROFILE), number)) == alone
    assert not np.asarray(shared.loss).flags.writeable


def test_a_cache_belongs_to_the_thread_that_asked_for_it() -> None:
    """Receipts of several handles at once name their own bytes."""
    models = [random_llama(layers=1 + number % 3, seed=number) for number in range(THREADS)]

    def generate(number: int) -> tuple[int, int]:
        model = models[number]
        with apply(model, uniform_profile(model), budget=0.5) as handle:
            cache = handle.new_cache()
            assert isinstance(cache, CompressedCache)
            model.generate(
                token_ids(1, 80 + 10 * number), **with_cache(model, cache), max_new_tokens=4,
                do_sample=False, attention_mask=torch.ones(1, 80 + 10 * number),
            )  # fmt: skip
            receipt = handle.receipt()
        return receipt.resident_bytes, receipt.dense_bytes

    alone = [generate(number) for number in range(THREADS)]
    assert together(generate) == alone
