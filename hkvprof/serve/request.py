"""What a chat request asks for, read exactly, and how it ended.

What cannot be honoured is refused by name. Fields and their meaning are those of OpenAI's
POST /v1/chat/completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hkvprof.errors import UsageError

if TYPE_CHECKING:
    from hkvprof.runtime.receipt import Receipt

USUAL_NEW_TOKENS = 1024
"""Of a reply, where a request names no number."""
MOST_STOPS, MOST_PARTS = 4, 4096
_LONGEST_STOP = 256
_ROLES = ("system", "user", "assistant")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that clients send, with the values that ask for nothing."""
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""Fields that change no answer."""
_READ = {
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "stream", "stream_options",
}  # fmt: skip


class RefusedRequestError(UsageError):
    """A request that is not answered: why, the field that is to blame, and the HTTP status."""

    def __init__(self, why: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(why)
        self.field = field
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """One chat request; `messages` hold opened images, as hkvprof's processors take them.

    `temperature` and `top_p` are None where the model's own way of generating is wanted.
    """

    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @classmethod
    def read(cls, body: Any, model: str, open_image: Callable[[str], Any]) -> ChatRequest:
        """From the JSON of a request for `model`; `open_image` opens the URL of an image.

        Raises RefusedRequestError.
        """
        if not isinstance(body, dict):
            raise RefusedRequestError("expected a JSON object")
        _refuse_fields(body)
        if body.get("model") != model:
            raise RefusedRequestError(
                f"the model {body.get('model')!r} is not here: this server has {model!r}",
                "model", 404,
            )  # fmt: skip
        stream = _kind(body, "stream", bool) or False
        return cls(
            messages=_messages(body.get("messages"), open_image),
            max_tokens=_max_tokens(body),
            temperature=_number(body, "temperature", 0, 2),
            top_p=_number(body, "top_p", 0, 1),
            seed=_seed(body),
            stop=_stops(body.get("stop")),
            stream=stream,
            include_usage=_include_usage(body, stream),
        )


@dataclass(frozen=True)
class Ended:
    """How a reply ended: `reason` is "stop" or "length"; `receipt` is of its cache."""

    reason: str
    prompt_tokens: int
    new_tokens: int
    receipt: Receipt | None


def _refuse_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _READ or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise RefusedRequestError(
                f"the field {name!r} is not supported here: leave it out", name
            )
        if not any(_same(value, one) for one in _NEUTRAL[name]):
            usual = " or ".join(map(repr, _NEUTRAL[name]))
            raise RefusedRequestError(
                f"{name}={value!r} cannot be honoured here: leave it out, or ask for {usual}", name
            )


def _same(value: Any, neutral: Any) -> bool:
    """Whether they are equal, and alike: 1 is not true, but 0.0 is 0."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _kind(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise RefusedRequestError(f"{name} must be a {kind.__name__}, found {value!r}", name)
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RefusedRequestError(
            f"{name} must be a number from {low} to {high}, found {value!r}", name
        )
    if name == "top_p" and value == 0:
        raise RefusedRequestError("top_p must be above 0; temperature 0 is greedy", name)
    return float(value)


def _seed(body: Mapping[str, Any]) -> int | None:
    seed = _kind(body, "seed", int)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise RefusedRequestError(f"seed must be an integer of 64 bits, found {seed}", "seed")
    return None if seed is None else int(seed)


def _max_tokens(body: Mapping[str, Any]) -> int:
    names = [name for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None]
    if len(names) == 2 and body[names[0]] != body[names[1]]:
        raise RefusedRequestError(
            "max_tokens and max_completion_tokens disagree: give one", names[1]
        )
    for name in names:
        if _kind(body, name, int) < 1:
            raise RefusedRequestError(f"{name} must be at least 1, found {body[name]}", name)
    return int(body[names[0]]) if names else USUAL_NEW_TOKENS


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    sound = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not sound or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP for s in stops):
        raise RefusedRequestError(
            f"stop must be a text or at most {MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters",
            "stop",
        )
    return tuple(stops)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = _kind(body, "stream_options", dict) or {}
    unknown = options.keys() - {"include_usage", "include_obfuscation"}
    if unknown or (options and not stream) or options.get("include_obfuscation"):
        raise RefusedRequestError(
            "stream_options may hold include_usage alone, with stream", "stream_options"
        )
    return bool(_kind(options, "include_usage", bool))


def _messages(value: Any, open_image: Callable[[str], Any]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RefusedRequestError("messages must be a list of at least one message", "messages")
    if len(value) > MOST_PARTS:
        raise RefusedRequestError(f"more than {MOST_PARTS} messages", "messages")
    messages = [_message(one, f"messages[{n}]", open_image) for n, one in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise RefusedRequestError(
            "the last message is the assistant's: a reply cannot be continued here", "messages"
        )
    return messages


def _message(value: Any, where: str, open_image: Callable[[str], Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RefusedRequestError(f"{where} must be an object with role and content", where)
    if value.get("role") not in _ROLES:
        raise RefusedRequestError(
            f"{where}.role {value.get('role')!r} is not supported here: expected one of "
            f"{', '.join(_ROLES)}", where,
        )  # fmt: skip
    for name, entry in value.items():
        if name not in ("role", "content") and entry not in (None, [], ""):
            raise RefusedRequestError(
                f"{where}.{name} cannot be honoured here: leave it out", where
            )
    content = value.get("content")
    if isinstance(content, str):
        return {"role": value["role"], "content": content}
    if not isinstance(content, list) or not 0 < len(content) <= MOST_PARTS:
        raise RefusedRequestError(f"{where}.content must be a text or a list of parts", where)
    parts = [_part(one, f"{where}.content[{n}]", open_image) for n, one in enumerate(content)]
    return {"role": value["role"], "content": parts}


def _part(value: Any, where: str, open_image: Callable[[str], Any]) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and isinstance(value.get("text"), str):
        return {"type": "text", "text": value["text"]}
    given = value.get("image_url") if kind == "image_url" else None
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        raise RefusedRequestError(
            f"{where} is no part that can be read here: expected "
            '{"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}',
            where,
        )
    if given.get("detail") not in (None, "auto"):
        raise RefusedRequestError(f"{where}: detail cannot be honoured here, but auto", where)
    try:
        return {"type": "image", "image": open_image(given["url"])}
    except RefusedRequestError as error:
        raise RefusedRequestError(f"{where}: {error}", where) from None
