"""The server over real sockets: what OpenAI's client sees, what HTTP sees, and how it ends."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import hkvprof
from hkvprof.runtime import apply
from hkvprof.testbed.generator import make_sample

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve (uvicorn is not installed)")
pytest.importorskip("starlette", reason="needs the extra serve (starlette is not installed)")

from hkvprof.serve import engine as engines  # noqa: E402
from hkvprof.serve.app import Address, make_app  # noqa: E402
from hkvprof.serve.engine import Engine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:out of domain")  # more images than usual
PROFILE = Path("profiles/tinyvl.hkv.safetensors")
BUDGET, MIN_TOKENS = 0.2, 64
WAIT = 120


@dataclass
class Served:
    """A running server, and how to talk to it."""

    engine: Engine
    server: Any
    port: int
    media: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Status and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            usual = {"Content-Type": "application/json"}
            connection.request(method, path, sent, {**usual, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        status, text = self.ask("POST", "/v1/chat/completions", {"model": "tinyvl", **body})
        return status, json.loads(text)

    def metric(self, name: str) -> float:
        status, text = self.ask("GET", "/metrics")
        assert status == 200
        return float(next(x.split()[-1] for x in text.splitlines() if x.startswith(f"{name} ")))


@pytest.fixture(scope="module")
def tinyvl() -> Any:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def served(tinyvl: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tinyvl, tmp_path_factory.mktemp("media"))


def serving(loaded: Any, media: Path) -> Iterator[Served]:
    """A server on a free port of loopback, until it has ended."""
    model, processor = loaded
    handle = apply(model, PROFILE, BUDGET, min_tokens=MIN_TOKENS, monitor=1.0)
    engine = Engine("tinyvl", handle, processor)
    app = make_app(engine, Address(allowed_media=media))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error",
                            timeout_graceful_shutdown=5)  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    yield Served(engine, server, server.servers[0].sockets[0].getsockname()[1], media)
    server.should_exit = True
    thread.join(WAIT)
    assert not thread.is_alive()


@dataclass
class Question:
    """Images and a text, as hkvprof's processor takes them and as a request holds them."""

    conversation: list[dict[str, Any]]
    images: list[Any]
    text: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": png(image)}} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


def png(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def question(seed: int, images: int = 8) -> Question:
    sample = make_sample("find", seed, images=images)
    conversation = hkvprof.open_images(sample)
    parts = conversation[-1]["content"]
    assert len(conversation) == 1
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    found = [part["image"] for part in parts if part["type"] == "image"]
    ordered = [{"type": "image", "image": image} for image in found]
    plain = [{"role": "user", "content": [*ordered, {"type": "text", "text": text}]}]
    return Question(plain, found, text)


def directly(loaded: Any, asked: Question, tokens: int, **options: Any) -> tuple[str, Any]:
    """The same reply without a server: text and receipt. The engine must have been closed."""
    model, processor = loaded
    prompt = processor.encode([asked.conversation])
    with apply(model, PROFILE, BUDGET, min_tokens=MIN_TOKENS) as handle:
        inputs = prompt.to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=tokens, **options)
        ids = out[0, prompt.tokens :]
        return processor.tokenizer.decode(ids, skip_special_tokens=True), handle.receipt()


def test_a_reply_is_what_generate_says(tinyvl: Any, tmp_path: Path) -> None:
    """And the model is given back: what follows applies the profile anew."""
    asked = [question(seed) for seed in (1, 2)]
    answers = []
    for served in serving(tinyvl, tmp_path):
        for one in asked:
            status, answer = served.chat(
                {"messages": one.messages, "temperature": 0, "max_tokens": 12}
            )
            assert status == 200, answer
            answers.append(answer)
    for one, answer in zip(asked, answers, strict=True):
        text, receipt = directly(tinyvl, one, 12, do_sample=False)
        assert answer["choices"][0]["message"]["content"] == text
        assert receipt.compressed_layers > 0
        usage = answer["usage"]["hkvprof"]
        assert usage["resident_bytes"] == receipt.resident_bytes
        assert usage["dense_bytes"] == receipt.dense_bytes
        assert usage["profile"] == PROFILE.name


def test_a_stream_says_the_same(served: Served) -> None:
    body = {"messages": question(3).messages, "temperature": 0, "max_tokens": 12}
    _, whole = served.chat(body)
    status, text = served.ask(
        "POST", "/v1/chat/completions",
        {"model": "tinyvl", **body, "stream": True, "stream_options": {"include_usage": True}},
    )  # fmt: skip
    assert status == 200
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_openais_own_client(served: Served) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client (not installed)")
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tinyvl"]
        assert client.models.retrieve("tinyvl").id == "tinyvl"
        asked: dict[str, Any] = {"model": "tinyvl", "messages": question(4).messages, "seed": 1}
        answer = client.chat.completions.create(**asked, max_tokens=8, temperature=0)
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.completion_tokens <= 8
        assert (
            answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        )
        stream = client.chat.completions.create(
            **asked, max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer.choices[0].message.content
        assert chunks[-1].usage == answer.usage
        with pytest.raises(openai.BadRequestError, match="n=2 cannot be honoured") as caught:
            client.chat.completions.create(**asked, n=2)
        assert caught.value.param == "n"
        with pytest.raises(openai.NotFoundError, match="this server has 'tinyvl'"):
            client.chat.completions.create(**{**asked, "model": "gpt-4o"})
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(**asked, tools=[tool])
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings is not here"):
            client.embeddings.create(model="tinyvl", input="text")


def test_files_below_the_folder_alone(served: Served, tmp_path: Path) -> None:
    asked = question(5)
    (served.media / "inner").mkdir()
    names = [f"inner/{number} a.png" for number in range(len(asked.images))]
    for name, image in zip(names, asked.images, strict=True):
        image.save(served.media / name)
    asked.images[0].save(tmp_path / "secret.png")
    (served.media / "link.png").symlink_to(tmp_path / "secret.png")

    def body(urls: list[str]) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": asked.text}]
        messages = [{"role": "user", "content": content}]
        return {"messages": messages, "temperature": 0, "max_tokens": 4}

    _, expected = served.chat({"messages": asked.messages, "temperature": 0, "max_tokens": 4})
    for urls in (names, [f"file://{served.media}/{name.replace(' ', '%20')}" for name in names]):
        status, answer = served.chat(body(urls))
        assert status == 200, answer
        assert answer["choices"] == expected["choices"]
    for url, said in (
        ("../secret.png", "leads out"),
        (str(tmp_path / "secret.png"), "leads out"),
        (f"file://{tmp_path}/secret.png", "leads out"),
        ("link.png", "leads out"),
        ("none.png", "no image file"),
        ("http://127.0.0.1:1/x.png", "not fetched"),
        ("HTTPS://example.org/x.png", "not fetched"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64,!!", "valid base64"),
        ("data:image/png;base64,aGVsbG8=", "not a readable image"),
    ):
        status, answer = served.chat(body([url]))
        assert status == 400, url
        assert said in answer["error"]["message"], answer
        assert answer["error"]["param"] == "messages[0].content[0]"


def test_a_stop_text_ends_the_reply_before_it(served: Served) -> None:
    body = {"messages": question(6).messages, "temperature": 0, "max_tokens": 12}
    _, whole = served.chat(body)
    text = whole["choices"][0]["message"]["content"]
    assert len(text) >= 2
    stop = text[1:3]
    _, cut = served.chat({**body, "stop": [stop]})
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_the_length_ends_a_reply_and_bounds_a_request(served: Served) -> None:
    messages = question(8).messages
    _, answer = served.chat({"messages": messages, "temperature": 0, "max_tokens": 1})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1
    for stream in (False, True):
        status, answer = served.chat({"messages": messages, "max_tokens": 9000, "stream": stream})
        assert status == 400
        assert "more than the 8192" in answer["error"]["message"]


def test_what_is_counted(served: Served) -> None:
    names = ("resident_bytes", "host_bytes", "dense_bytes", "monitored", "prompt_tokens")
    before = {name: served.metric(f"hkvprof_{name}_total") for name in names}
    answered = served.metric('hkvprof_requests_total{outcome="answered"}')
    refused = served.metric('hkvprof_requests_total{outcome="refused"}')
    _, answer = served.chat({"messages": question(9).messages, "temperature": 0, "max_tokens": 6})
    assert served.chat({"messages": []})[0] == 400
    usage = answer["usage"]
    for name in ("resident_bytes", "host_bytes", "dense_bytes"):
        counted = served.metric(f"hkvprof_{name}_total") - before[name]
        assert counted == usage["hkvprof"][name] == served.metric(f"hkvprof_latest_{name}")
    assert (
        served.metric("hkvprof_prompt_tokens_total") - before["prompt_tokens"]
        == usage["prompt_tokens"]
    )
    assert served.metric("hkvprof_monitored_total") == before["monitored"] + 1
    assert served.metric('hkvprof_requests_total{outcome="answered"}') == answered + 1
    assert served.metric('hkvprof_requests_total{outcome="refused"}') == refused + 1
    assert 0 <= served.metric("hkvprof_hit_rate") <= 1


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"{", {}, 400, "not readable JSON"),
        (b'{"a": 1, "a": 2}', {}, 400, "not readable JSON"),
        (b"[]", {}, 400, "expected a JSON object"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"{}", {"Host": "evil.example"}, 400, "Invalid host"),
    ],
)
def test_what_is_no_request(
    served: Served, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    found, text = served.ask("POST", "/v1/chat/completions", body, headers)
    assert found == status
    assert said in text


def test_other_paths(served: Served) -> None:
    assert served.ask("GET", "/health") == (200, '{"status":"ok"}')
    assert served.ask("GET", "/v1/models/other")[0] == 404
    status, text = served.ask("POST", "/v1/completions", {})
    assert status == 404
    assert "expected /v1/chat/completions" in json.loads(text)["error"]["message"]
    assert served.ask("GET", "/v1/chat/completions")[0] == 405


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_reply(
    served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply would go on for thousands of tokens."""
    endless = {"min_new_tokens": 7000, "max_new_tokens": 7000, "do_sample": False}
    before = served.metric('hkvprof_requests_total{outcome="cancelled"}')
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=WAIT)
    body = {"model": "tinyvl", "messages": question(10).messages, "stream": stream}
    data = json.dumps(body).encode()
    with monkeypatch.context() as patched:
        patched.setattr(engines, "_choices", lambda _: endless)
        connection.request(
            "POST", "/v1/chat/completions", data, {"Content-Type": "application/json"}
        )
        if stream:
            connection.getresponse().read(10)
        wait_until(lambda: served.metric("hkvprof_waiting") == 1)
        connection.close()
        wait_until(lambda: served.metric("hkvprof_waiting") == 0)
        wait_until(lambda: served.metric('hkvprof_requests_total{outcome="cancelled"}') > before)
    assert served.chat({"messages": question(1).messages, "max_tokens": 2})[0] == 200


def wait_until(true: Callable[[], bool]) -> None:
    """Ask again and again; what never comes true fails by the deadline."""
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_requests_at_once_get_their_own_answers(served: Served) -> None:
    bodies = [
        {"messages": question(20 + n).messages, "temperature": 0, "max_tokens": 8} for n in range(4)
    ]
    alone = [served.chat(body)[1]["choices"] for body in bodies]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = served.chat(bodies[number])[1]["choices"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert [found[number] for number in range(4)] == alone
