"""Chat messages of OpenAI (platform.openai.com/docs/guides/vision), of qwen-vl-utils
(github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils), and of LLaMA-Factory (data/README.md)."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hkvprof.errors import SampleError
from hkvprof.samples import images
from hkvprof.samples.read import load_samples
from tests.samples.layouts.shown import base64_of, load, paint, shown, write


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def words(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def at(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "green", "blue"):
        paint(tmp_path / f"{colour}.png", colour)
    return tmp_path


def only(folder: Path, *messages: Any, **more: Any) -> str:
    path = write(folder / "chat.jsonl", [{"messages": list(messages), **more}])
    (sample,) = load_samples(path).samples
    return shown(sample)


def test_openai(folder: Path) -> None:
    """No ids; the assistant's last message becomes the reply."""
    rows = [
        {"messages": [
            {"role": "developer", "content": "Be brief."},
            user(words("Which?"), at("red.png", detail="low"),
                 at(f"data:image/jpeg;base64,{base64_of('blue', 'JPEG')}")),
            {"role": "assistant", "content": "Red and blue.", "weight": 1}]},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."},
                      {"role": "user", "content": "And?"}]},
    ]  # fmt: skip
    loaded = load_samples(write(folder / "chat.jsonl", rows))
    assert [shown(sample) for sample in loaded.samples] == [
        "system: Be brief.\nuser: Which?[red][blue]\n= Red and blue.",
        "user: Hi.\nassistant: Ho.\nuser: And?",
    ]
    assert loaded.samples[0].id == "chat-000000"
    assert loaded.recognised.name == "chat"
    assert load_samples(write(folder / "chat.json", rows)).digest == loaded.digest


def test_qwen_vl_utils(folder: Path) -> None:
    """Files by address, absolute and inside the folder; messages without an object around them."""
    picture = {"type": "image", "image": f"file://{folder / 'green.png'}", "max_pixels": 99}
    data = {"type": "image", "image": f"data:image;base64,{base64_of('red')}"}
    film = {"type": "video", "video": ["file://red.png", "blue.png"], "fps": 4.0}
    messages = [user(picture, data, film, words("Describe."))]
    for content in (messages, [messages], [{"messages": messages}]):
        (sample,) = load_samples(write(folder / "qwen.json", content)).samples
        assert shown(sample) == "user: [green][red][red blue@4.0]Describe."


def test_what_others_write(folder: Path) -> None:
    assert only(
        folder,
        {"role": "user", "content": "<image>Which?<image>"},
        {"role": "assistant", "content": "Both."},
        images=["red.png", "blue.png"],
    ) == "user: [red]Which?[blue]\n= Both."  # fmt: skip
    parts = user({"type": "image"}, words("?"), {"type": "image", "text": None})
    assert only(folder, parts, images=["green.png", "red.png"]) == "user: [green]?[red]"
    parts = user({"type": "image", "path": "red.png"}, {"type": "image", "url": "blue.png"},
                 {"type": "image", "base64": base64_of("green")}, {"image": "red.png"},
                 {"text": "?"})  # fmt: skip
    assert only(folder, parts) == "user: [red][blue][green][red]?"
    parts = user({"type": "input_text", "text": "?"},
                 {"type": "input_image", "image_url": "red.png"})  # fmt: skip
    assert only(folder, parts) == "user: ?[red]"


def test_a_path_may_have_escapes_or_blanks(folder: Path) -> None:
    paint(folder / "a b.png", "blue")
    assert (
        only(folder, user(at(f"file://{folder}/a%20b.png"), at("a b.png"))) == "user: [blue][blue]"
    )


def test_own_lines_stay_own(folder: Path) -> None:
    """Lines of samples.jsonl have the errors of samples.jsonl, by any name."""
    part = {"type": "image", "path": "red.png"}
    own = {"id": "a", "task": "t", "messages": [user(part)]}
    assert load_samples(write(folder / "x.jsonl", [own])).recognised.name == "hkvprof"
    with pytest.raises(SampleError, match="field 'mesages' is not known"):
        load_samples(write(folder / "x.jsonl", [{**own, "mesages": []}]))
    with pytest.raises(SampleError, match=r"content\[0\].url' is not known"):
        load_samples(write(folder / "x.jsonl", [{**own, "messages": [user({**part, "url": "x"})]}]))
    foreign = {**own, "messages": [user(at("red.png"))], "reply": "x"}
    (sample,) = load_samples(write(folder / "x.jsonl", [foreign])).samples
    assert (sample.id, sample.task, sample.reply) == ("a", "t", "x")
    with pytest.raises(SampleError, match="expected a part of"):
        load(write(folder / "x.jsonl", [foreign]), "hkvprof")


PART = "messages[0].content[0]"


def bomb(width: int) -> str:
    """A picture of very many pixels in a few kilobytes."""
    stream = io.BytesIO()
    Image.new("1", (width, 6_000)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (user(at("data:image/png;base64,@@@@")), f"'{PART}.image_url.url': the base64 is broken"),
        (user(at("data:image/png;base64,iVBOR")), "the base64 is broken"),
        (user(at("data:image/png;base64,AAAA")), "the picture is not a readable image"),
        (user(at("data:image/png;base64,")), "the picture is not a readable image"),
        (user(at("data:image/png,abc")), "expected a data: address with base64"),
        (user(at(f"data:;base64,{bomb(7_000)}")), "7000 x 6000: expected 1 to 36,000,000 pixels"),
        (user(at(f"data:;base64,{bomb(90_000)}")), "DecompressionBombError"),
        (user(at("https://example.com/a.png")), "is a web address, and pictures are not fetched"),
        (user(at("file:///etc/hostname")), "/etc/hostname leads out of"),
        (user(at("file://../x.png")), "../x.png leads out of"),
        (user(at("none.png")), f"field '{PART}.image_url.url': no image file none.png"),
        (user(at(None)), f"'{PART}.image_url.url': expected a picture: its bytes, path or url"),
        (user({"type": "image"}), f"field '{PART}': no picture is given, here or in 'images'"),
        (user({"type": "image", "base64": "!"}), f"field '{PART}.base64': the base64 is broken"),
        (user({"type": "video", "video": "file:///a.mp4"}), ".video': /a.mp4 leads out of"),
        (user({"type": "video", "video": ["none.png"]}), f"'{PART}.video[0]': no image file"),
        (user({"type": "video", "video": ["red.png"], "fps": "x"}), "'fps': expected"),
        (user({"type": "video", "video": ["red.png"], "fps": 0}), "'fps': expected a number"),
        (user({"type": "input_audio"}), f"field '{PART}.type': expected text, image, image_url"),
        (user(7), f"field '{PART}': expected a part of a message, found 7"),
        (user(*[words("")] * 5000), "field 'messages': expected at most 4096 parts"),
        ({"role": "tool", "content": "x"}, "field 'messages[0].role': expected one of system"),
        ({"role": "assistant", "content": "x"}, "the last message to be the user's"),
        ({"role": "assistant", "content": None, "tool_calls": [1]},
         "field 'messages[0].tool_calls': calls of tools are not taken"),
        ({"role": "user"}, "field 'messages[0].content' is missing"),
        ("x", "field 'messages[0]': expected an object"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_taken_says_why(folder: Path, message: Any, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        only(folder, message)
    told = str(caught.value)
    assert told.startswith(f"{folder / 'chat.jsonl'}:1: ")
    assert expected in told
    assert told.isprintable()
    assert len(told) < 900


def test_pictures_without_a_place(folder: Path) -> None:
    with pytest.raises(SampleError, match=r"'images\[0\]': more pictures than places"):
        only(folder, user(words("?")), images=["red.png"])
    with pytest.raises(SampleError, match="found 1 places <image> and 2 pictures"):
        only(folder, {"role": "user", "content": "<image>"}, images=["red.png", "blue.png"])


def test_base64_is_bounded_before_it_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 30)
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(SampleError, match="a picture of at most 30 bytes"):
        only(folder, user(at(f"data:image/png;base64,{base64_of('red')}")))


def test_a_line_that_is_no_json(folder: Path) -> None:
    path = write(folder / "chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n{\n')
    with pytest.raises(SampleError, match=r"chat.jsonl:2: expected one JSON object per line"):
        load_samples(path)
    loaded = load_samples(path, on_error="skip")
    assert (len(loaded.samples), len(loaded.skipped)) == (1, 1)
