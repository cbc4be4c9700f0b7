"""One model with a profile applied, one request at a time, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hkvprof.errors import BudgetError, CompressionError, HkvError, SampleError, out_of_memory
from hkvprof.models.outline import context_limit
from hkvprof.models.processing import ChatProcessor
from hkvprof.runtime.handle import Handle
from hkvprof.serve.metrics import Metrics
from hkvprof.serve.request import ChatRequest, Ended, RefusedRequestError
from hkvprof.serve.text import GrowingText

MOST_WAITING = 64
"""Requests that may wait for their turn; more are sent away."""


class ServerFaultError(HkvError):
    """A request that the server failed, through no fault of the request."""


@dataclass(eq=False)
class Reply(BaseStreamer, StoppingCriteria):
    """What goes from the thread that generates to the one that answers: texts, then one `Ended`.

    An exception in the queue says why there is no more. transformers streams into it token by
    token, and asks it whether to stop; the first tokens that it is given are the prompt.
    """

    request: ChatRequest
    loop: asyncio.AbstractEventLoop
    text: GrowingText
    queue: asyncio.Queue[str | Ended | Exception] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(default_factory=list)
    _has_prompt: bool = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            self.send(self.text.add(token))

    def end(self) -> None:
        """All tokens were put: what was held back follows."""
        self.send(self.text.finish())

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether every row is to stop: one row, cancelled or past a stop text."""
        stops = self.cancelled.is_set() or self.text.ended
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device)

    def send(self, what: str | Ended | Exception) -> None:
        """Hand on from the generating thread; empty texts are not worth it."""
        if what != "":
            self.loop.call_soon_threadsafe(self.queue.put_nowait, what)


class Engine:
    """Answers chat requests; `name` is what the model is called outside."""

    def __init__(self, name: str, handle: Handle, processor: ChatProcessor) -> None:
        self.name = name
        self.metrics = Metrics()
        self._handle = handle
        self._model = handle.model
        self._processor = processor
        self._limit = context_limit(self._model)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._running: set[Reply] = set()

    async def answer(self, request: ChatRequest) -> AsyncIterator[str | Ended]:
        """The reply's texts, then how it ended. Closing the iterator stops the generation.

        Raises RefusedRequestError for a request that cannot be answered, ServerFaultError.
        """
        if len(self._running) > MOST_WAITING:
            self.metrics.count("refused")
            raise RefusedRequestError(f"{MOST_WAITING} requests are waiting: try later", None, 503)
        text = GrowingText(self._decode, request.stop)
        reply = Reply(request, asyncio.get_running_loop(), text)
        self._running.add(reply)
        self.metrics.waiting = len(self._running)
        done = self._thread.submit(self._run, reply)
        try:
            while True:
                item = await reply.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            reply.cancelled.set()
            if done.cancel():
                self.metrics.count("cancelled")
            self._running.discard(reply)
            self.metrics.waiting = len(self._running)

    def close(self) -> None:
        """Stop what runs, and give the model back as it was."""
        for reply in list(self._running):
            reply.cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._handle.detach()

    # -- on the thread that generates ------------------------------------------------------------

    def _run(self, reply: Reply) -> None:
        try:
            ended = self._generate(reply)
        except Exception as error:
            refused = _as_refusal(error)
            self.metrics.count("refused" if isinstance(refused, RefusedRequestError) else "failed")
            reply.send(refused)
            return
        self.metrics.account("cancelled" if reply.cancelled.is_set() else "answered", ended)
        reply.send(ended)

    def _generate(self, reply: Reply) -> Ended:
        encoded = self._processor.encode([reply.request.messages])
        if self._limit is not None and encoded.tokens + reply.request.max_tokens > self._limit:
            raise RefusedRequestError(
                f"{encoded.tokens} prompt tokens and {reply.request.max_tokens} new ones are more "
                f"than the {self._limit} that the model was made for: shorten the messages, or ask "
                "for fewer with max_tokens", "messages",
            )  # fmt: skip
        with torch.inference_mode(), _seeded(reply.request.seed, self._model.device):
            self._model.generate(
                **encoded.to(self._model.device, self._model.dtype),
                **_choices(reply.request),
                streamer=reply,
                stopping_criteria=StoppingCriteriaList([reply]),
            )
        ends = self._ends()
        whole = reply.text.ended or bool(reply.ids and reply.ids[-1] in ends)
        reason = "stop" if whole else "length"
        return Ended(reason, encoded.tokens, len(reply.ids), self._handle.receipt())

    def _ends(self) -> set[int]:
        named = self._model.generation_config.eos_token_id
        ids = named if isinstance(named, list) else [named]
        return {one for one in [*ids, self._processor.tokenizer.eos_token_id] if one is not None}

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.tokenizer.decode(ids, skip_special_tokens=True))


def _choices(request: ChatRequest) -> dict[str, Any]:
    """How to generate: the model's own way, or OpenAI's where temperature or top_p are given."""
    found: dict[str, Any] = {"max_new_tokens": request.max_tokens}
    if request.temperature == 0:
        return {**found, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if request.temperature is not None or request.top_p is not None:
        found |= {"do_sample": True, "top_k": 0}
        found["temperature"] = 1.0 if request.temperature is None else request.temperature
        found["top_p"] = 1.0 if request.top_p is None else request.top_p
    return found


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Any:
    """The random numbers of a seed, within; those of the process go on as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _as_refusal(error: Exception) -> Exception:
    """What a client is told of an exception: its own fault, or the server's."""
    if isinstance(error, RefusedRequestError):
        return error
    if isinstance(error, BudgetError | SampleError):
        return RefusedRequestError(str(error), "messages")
    if out_of_memory(error):
        return ServerFaultError("the server is out of memory: ask for less, or try later")
    if isinstance(error, CompressionError):
        return ServerFaultError(str(error))
    return ServerFaultError(f"unexpected {type(error).__name__}: {error}")
