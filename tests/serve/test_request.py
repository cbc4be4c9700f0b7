"""Chat requests: what is read, and what is refused by name."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkvprof.serve.request import USUAL_NEW_TOKENS, ChatRequest, RefusedRequestError

USER = [{"role": "user", "content": "hello"}]


def opened(url: str) -> str:
    if url == "bad":
        raise RefusedRequestError("no such image")
    return f"opened {url}"


def read(**fields: Any) -> ChatRequest:
    return ChatRequest.read({"model": "m", "messages": USER, **fields}, "m", opened)


def test_the_least_request() -> None:
    found = read()
    assert found == ChatRequest(USER, USUAL_NEW_TOKENS, None, None, None, (), False, False)


def test_everything_that_can_be_asked() -> None:
    found = read(
        max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=["a", "b"], stream=True,
        stream_options={"include_usage": True}, user="someone",
    )  # fmt: skip
    assert found == ChatRequest(USER, 3, 0.5, 0.9, 7, ("a", "b"), True, True)


def test_images_stand_where_they_were() -> None:
    content = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "x", "detail": "auto"}},
        {"type": "text", "text": "two"},
    ]
    found = read(messages=[{"role": "user", "content": content}]).messages
    assert found[0]["content"] == [
        {"type": "text", "text": "one"},
        {"type": "image", "image": "opened x"},
        {"type": "text", "text": "two"},
    ]


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1}, {"frequency_penalty": 0.0}, {"presence_penalty": 0}, {"logit_bias": {}},
        {"logprobs": False}, {"tools": []}, {"tool_choice": "none"}, {"store": False},
        {"response_format": {"type": "text"}}, {"top_logprobs": None}, {"anything": None},
        {"metadata": {"a": "b"}},
    ],
)  # fmt: skip
def test_fields_that_ask_for_nothing_are_taken(neutral: dict[str, Any]) -> None:
    assert read(**neutral) == read()


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"n": 2}, "n", "n=2 cannot be honoured"),
        ({"n": True}, "n", "cannot be honoured"),
        ({"logprobs": True}, "logprobs", "cannot be honoured"),
        ({"logprobs": 0}, "logprobs", "cannot be honoured"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "cannot be honoured"),
        ({"frequency_penalty": False}, "frequency_penalty", "cannot be honoured"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be honoured"),
        ({"tools": [{}]}, "tools", "cannot be honoured"),
        ({"tool_choice": "required"}, "tool_choice", "cannot be honoured"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "cannot be honoured"),
        ({"store": True}, "store", "cannot be honoured"),
        ({"audio": {}}, "audio", "leave it out"),
        ({"generation_config": "{}"}, "generation_config", "leave it out"),
        ({"temperature": 3}, "temperature", "a number from 0 to 2"),
        ({"temperature": "1"}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"seed": 1.5}, "seed", "must be a int"),
        ({"seed": 2**64}, "seed", "64 bits"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "must be a int"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [1]}, "stop", "texts"),
        ({"stop": {"a": 1}}, "stop", "texts"),
        ({"stream": 1}, "stream", "must be a bool"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "alone"),
        ({"messages": None}, "messages", "at least one message"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": ["x"]}, "messages[0]", "an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "role 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0]", "a list of parts"),
        ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "messages", "continued"),
        ({"messages": [{**USER[0], "name": "x"}]}, "messages[0]", "name cannot be honoured"),
        ({"messages": [{**USER[0], "tool_calls": [1]}]}, "messages[0]", "tool_calls cannot"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: Any, field: str, said: str) -> None:
    with pytest.raises(RefusedRequestError, match=said.replace("[", r"\[")) as caught:
        read(**fields)
    assert caught.value.field == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "part",
    [
        "x", {}, {"type": "text"}, {"type": "text", "text": 1}, {"type": "image_url"},
        {"type": "image_url", "image_url": "x"}, {"type": "image_url", "image_url": {"url": 1}},
        {"type": "image_url", "image_url": {"url": "bad"}}, {"type": "input_audio"},
        {"type": "image_url", "image_url": {"url": "x", "detail": "low"}},
        {"type": "video_url", "video_url": {"url": "x"}},
    ],
)  # fmt: skip
def test_parts_that_cannot_be_read_are_named(part: Any) -> None:
    content = [{"type": "text", "text": "a"}, part]
    with pytest.raises(RefusedRequestError) as caught:
        read(messages=[*USER, {"role": "user", "content": content}])
    assert caught.value.field == "messages[1].content[1]"
    assert "messages[1].content[1]" in str(caught.value)


def test_another_model_is_not_found() -> None:
    for name in ("other", None, 1):
        with pytest.raises(RefusedRequestError, match="this server has 'm'") as caught:
            read(model=name)
        assert (caught.value.status, caught.value.field) == (404, "model")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "stop", "n", "stream", "stream_options", "temperature", "tools", "seed"]
)


@given(body=st.dictionaries(FIELDS, JSON, max_size=4), message=JSON, part=JSON)
def test_anything_is_read_or_refused(body: dict[str, Any], message: Any, part: Any) -> None:
    for messages in ([message], [{"role": "user", "content": [part]}]):
        with suppress(RefusedRequestError):
            ChatRequest.read({"model": "m", "messages": messages, **body}, "m", opened)
    with suppress(RefusedRequestError):
        ChatRequest.read(message, "m", opened)
