"""One engine without a server: sampling, cancelling, refusals, faults, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import SampleError
from hkvprof.models.processing import TextProcessor
from hkvprof.serve import engine as engines
from hkvprof.serve.engine import Engine, ServerFaultError
from hkvprof.serve.request import ChatRequest, Ended, RefusedRequestError
from tests.models_for_tests import apply, random_llama

LONG = "look at the picture and say what it holds " * 20


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama(vocab_size=512, eos_token_id=None, max_position_embeddings=1024)


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    tokenizer = AutoTokenizer.from_pretrained("hkvprof/testbed/tinyvl")
    assert len(tokenizer) <= 512
    handle = apply(model, uniform_profile(model, "static"), budget=0.3)
    made = Engine("llama", handle, TextProcessor(tokenizer, model.config))
    yield made
    made.close()


def request(text: str = LONG, **changed: Any) -> ChatRequest:
    fields: dict[str, Any] = {
        "max_tokens": 8, "temperature": 0.0, "top_p": None, "seed": None, "stop": (),
        "stream": False, "include_usage": False,
    }  # fmt: skip
    return ChatRequest(messages=[{"role": "user", "content": text}], **{**fields, **changed})


async def whole(engine: Engine, asked: ChatRequest) -> tuple[str, Ended]:
    items = [item async for item in engine.answer(asked)]
    *texts, ended = items
    assert isinstance(ended, Ended)
    return "".join(str(text) for text in texts), ended


def run(answer: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(answer, 120))


def counted(engine: Engine, outcome: str) -> int:
    wanted = f'hkvprof_requests_total{{outcome="{outcome}"}} '
    lines = engine.metrics.text().splitlines()
    return int(next(line for line in lines if line.startswith(wanted)).removeprefix(wanted))


def test_a_seed_repeats_a_sampled_reply_and_leaves_no_trace(engine: Engine) -> None:
    state = torch.random.get_rng_state()
    said = {}
    for seed in (1, 2, 3):
        asked = request(temperature=1.0, seed=seed)
        said[seed] = {run(whole(engine, asked))[0] for _ in range(2)}
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(len(texts) == 1 for texts in said.values())
    assert len(set.union(*said.values())) == 3


def test_greedy_needs_no_seed_and_nucleus_is_a_choice(engine: Engine) -> None:
    greedy = run(whole(engine, request()))[0]
    assert run(whole(engine, request(seed=5)))[0] == greedy
    narrow = run(whole(engine, request(temperature=None, top_p=1e-6, seed=5)))[0]
    assert narrow == greedy, "the most probable token alone is left"


def test_the_receipt_is_of_this_request(engine: Engine) -> None:
    _, long = run(whole(engine, request()))
    _, short = run(whole(engine, request("hello")))
    assert long.receipt.compressed_layers == 3
    assert long.receipt.resident_share < 0.4
    assert short.receipt.compressed_layers == 0
    assert (long.reason, long.new_tokens) == ("length", 8)


def test_who_stops_reading_stops_the_generation(engine: Engine) -> None:
    async def leave() -> None:
        items = engine.answer(request(max_tokens=500))
        assert isinstance(await anext(items), str)
        await items.aclose()
        text, ended = await whole(engine, request())
        assert text
        assert ended.new_tokens == 8

    run(leave())
    assert counted(engine, "cancelled") == 1
    assert counted(engine, "answered") == 1


def test_who_leaves_before_its_turn_is_not_run(engine: Engine) -> None:
    async def leave() -> None:
        first = engine.answer(request(max_tokens=200))
        await anext(first)
        second = asyncio.ensure_future(whole(engine, request()))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await first.aclose()
        await whole(engine, request())

    run(leave())
    assert counted(engine, "cancelled") == 2


def test_requests_beyond_the_queue_are_sent_away(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MOST_WAITING", 0)

    async def both() -> None:
        first = engine.answer(request(max_tokens=100))
        await anext(first)
        with pytest.raises(RefusedRequestError, match="try later") as caught:
            await whole(engine, request())
        assert caught.value.status == 503
        await first.aclose()

    run(both())


def test_what_does_not_fit_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(RefusedRequestError, match="more than the 1024 that the model was made for"):
        run(whole(engine, request(max_tokens=1000)))
    assert counted(engine, "refused") == 1


def test_a_prompt_that_the_budget_cannot_hold_is_refused(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("hkvprof/testbed/tinyvl")
    handle = apply(model, uniform_profile(model, "static"), budget=0.02)
    engine = Engine("llama", handle, TextProcessor(tokenizer, model.config))
    try:
        with pytest.raises(RefusedRequestError, match="too small"):
            run(whole(engine, request()))
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("raised", "told", "said"),
    [
        (RuntimeError("a fault\nof mine"), ServerFaultError, "unexpected RuntimeError"),
        (MemoryError(), ServerFaultError, "out of memory"),
        (SampleError("no such thing"), RefusedRequestError, "no such thing"),
    ],
)
def test_faults_are_told_apart(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, raised: Exception, told: Any, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    with monkeypatch.context() as patched:
        patched.setattr(engine._model, "generate", fail)
        with pytest.raises(told, match=said):
            run(whole(engine, request()))
    assert run(whole(engine, request()))[0], "the next request is answered"
    assert counted(engine, "failed") == (told is ServerFaultError)


def test_closing_gives_the_model_back(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained("hkvprof/testbed/tinyvl")
    handle = apply(model, uniform_profile(model, "static"), budget=0.3)
    engine = Engine("llama", handle, TextProcessor(tokenizer, model.config))

    async def end() -> None:
        items = engine.answer(request(max_tokens=500))
        await anext(items)
        await asyncio.to_thread(engine.close)
        ended = [item async for item in items][-1]
        assert ended.new_tokens < 500

    run(end())
    with apply(model, uniform_profile(model, "static"), budget=0.3):
        pass
