"""The address: routes, the shapes of OpenAI's answers and errors, limits of what comes in."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkvprof.files import strict_json
from hkvprof.lazy import require_extra
from hkvprof.serve.engine import Engine, ServerFaultError
from hkvprof.serve.media import ImageReader
from hkvprof.serve.request import ChatRequest, Ended, RefusedRequestError

require_extra("starlette", "serve")

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MOST_BYTES = 64 * 2**20
"""Of a request; images are a third larger in base64 than in a file."""
LOOPBACK = ("127.0.0.1", "localhost")
_LOCAL_NAMES = ["127.0.0.1", "localhost"]
_POLL_SECONDS = 0.5
_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the folder whose images it may read."""

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_media: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can reach it."""
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        """What clients take as their base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


def make_app(engine: Engine, address: Address) -> Starlette:
    """The application; it closes the engine when it ends.

    A server on loopback answers to its own names alone: a page that a browser shows could else
    reach it through a name that leads here.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    async def chat(request: Request) -> Response:
        return await _chat(engine, address, request)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(engine)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != engine.name:
            raise HTTPException(404, f"this server has the model {engine.name!r} alone")
        return JSONResponse(_model(engine))

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL_NAMES)]
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        middleware=guards if address.is_local else [],
        exception_handlers={
            RefusedRequestError: _refused,
            ServerFaultError: _failed,
            HTTPException: _http_error,
        },
        lifespan=lifespan,
    )


async def _chat(engine: Engine, address: Address, request: Request) -> Response:
    body = await _body(request)
    try:
        asked = await run_in_threadpool(
            ChatRequest.read, body, engine.name, ImageReader(address.allowed_media)
        )
    except RefusedRequestError:
        engine.metrics.count("refused")
        raise
    items = engine.answer(asked)
    name = f"chatcmpl-{uuid.uuid4().hex}"
    if asked.stream:
        first = await anext(items)  # what is refused is refused with its status
        sse = _stream(engine.name, name, asked, first, items)
        return StreamingResponse(sse, media_type="text/event-stream")
    return await _unless_gone(request, _whole(engine.name, name, items))


async def _body(request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedRequestError(
            f"expected the content type application/json, found {kind or 'none'}", None, 415
        )
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise RefusedRequestError(f"a request of more than {MOST_BYTES:,} bytes", None, 413)
    try:
        return await run_in_threadpool(lambda: strict_json.loads(data.decode("utf-8")))
    except ValueError as error:
        raise RefusedRequestError(f"the request is not readable JSON: {error}") from None


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """The answer; where the client leaves before it is there, its generation stops."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)  # nobody reads it
        return task.result()
    finally:
        task.cancel()


async def _whole(model: str, name: str, items: AsyncIterator[str | Ended]) -> Response:
    texts: list[str] = []
    async with aclosing(items):  # type: ignore[type-var]
        async for item in items:
            if isinstance(item, Ended):
                ended = item
            else:
                texts.append(item)
    message = {"role": "assistant", "content": "".join(texts), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": ended.reason, "logprobs": None}
    head = _head("chat.completion", model, name)
    return JSONResponse({**head, "choices": [choice], "usage": _usage(ended)})


async def _stream(
    model: str, name: str, asked: ChatRequest, first: str | Ended, items: AsyncIterator[str | Ended]
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI's clients read them."""
    head = _head("chat.completion.chunk", model, name)

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**head, "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    async with aclosing(items):  # type: ignore[type-var]
        try:
            item = first
            while not isinstance(item, Ended):
                yield event({"content": item})
                item = await anext(items)
        except (RefusedRequestError, ServerFaultError) as error:
            yield _event(_error(str(error), "server_error", None))
            return
    yield event({}, item.reason)
    if asked.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(item)})
    yield _DONE


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _head(kind: str, model: str, name: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def _usage(ended: Ended) -> dict[str, Any]:
    """OpenAI's counts, and under `hkvprof` what the request's cache held."""
    found: dict[str, Any] = {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.new_tokens,
        "total_tokens": ended.prompt_tokens + ended.new_tokens,
    }
    if ended.receipt is not None:
        names = ("profile", "resident_bytes", "host_bytes", "dense_bytes", "compressed_layers")
        found["hkvprof"] = {name: getattr(ended.receipt, name) for name in names}
    return found


def _model(engine: Engine) -> dict[str, Any]:
    return {"id": engine.name, "object": "model", "created": 0, "owned_by": "hkvprof"}


def _error(why: str, kind: str, field: str | None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": why, "type": kind, "param": field, "code": code}}


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedRequestError)
    code = "model_not_found" if error.status == 404 else None
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return JSONResponse(_error(str(error), kind, error.field, code), error.status)


def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(_error(str(error), "server_error", None), 500)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = error.detail
    if error.status_code == 404 and why == "Not Found":
        why = (
            f"{request.url.path} is not here: expected /v1/chat/completions, /v1/models, /health "
            "or /metrics"
        )
    return JSONResponse(_error(why, "invalid_request_error", None), error.status_code)
