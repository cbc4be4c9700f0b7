"""Samples: what is read, what is refused and how the message reads."""

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples import hub as sample_hub
from hkvprof.samples import images
from hkvprof.samples import read as samples
from hkvprof.samples.hub import HubSource
from hkvprof.samples.read import LoadedSamples, Sample, choose, load_samples, open_images

SEARCH = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHIPPED = Path(__file__).parents[2] / "calibration" / "mini"


def record(number: int = 0, **changes: object) -> dict:
    """A sound line with one image."""
    parts = [{"type": "image", "path": "images/a.png"}, {"type": "text", "text": "what?"}]
    line = {"id": f"s{number}", "task": "t", "messages": [{"role": "user", "content": parts}]}
    return {**line, **changes}


def user(*parts: object) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def video(frames: list[str], fps: object = 2) -> dict:
    return {"type": "video", "frames": frames, "fps": fps}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one image and no samples yet."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "samples.jsonl").write_text("\n".join(texts), encoding="utf-8")
    return folder


def refusal(folder: Path, *lines: object) -> str:
    with pytest.raises(SampleError) as caught:
        load_samples(write(folder, *lines))
    return str(caught.value)


# What is read


def test_the_shipped_set_loads() -> None:
    loaded = load_samples(SHIPPED)
    assert len(loaded.samples) >= 96
    assert len(loaded.tasks) >= 8
    assert loaded.skipped == ()
    opened = open_images(loaded.samples[0])
    pictures = [part["image"] for part in opened[0]["content"] if part["type"] == "image"]
    assert pictures
    assert all(picture.mode == "RGB" for picture in pictures)


def test_every_field_arrives(folder: Path) -> None:
    line = record(
        reply="red",
        followups=[{"question": "and now?", "reply": "blue"}],
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "x", "modality": "context"}]},
            {"role": "assistant", "content": "ok"},
            {"role": "user", "content": "é漢\n"},
        ],
    )
    (sample,) = load_samples(write(folder, line)).samples
    assert (sample.id, sample.task, sample.reply) == ("s0", "t", "red")
    assert sample.followups[0].reply == "blue"
    assert [message["content"] for message in sample.messages][-1] == "é漢\n"
    assert sample.messages[1]["content"][0]["modality"] == "context"
    assert open_images(sample)[0]["content"] == "be brief"


def test_blank_lines_crlf_and_a_byte_order_mark_are_fine(folder: Path) -> None:
    text = "\ufeff" + json.dumps(record(0)) + "\r\n\r\n  \r\n" + json.dumps(record(1))
    (folder / "samples.jsonl").write_bytes(text.encode())
    assert [sample.id for sample in load_samples(folder).samples] == ["s0", "s1"]


def test_a_jsonl_file_by_another_name(folder: Path) -> None:
    write(folder, record()).joinpath("samples.jsonl").rename(folder / "other.jsonl")
    assert len(load_samples(folder / "other.jsonl").samples) == 1
    with pytest.raises(UsageError, match=r"holds no samples\.jsonl"):
        load_samples(folder)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16"])
def test_images_of_any_mode_open_as_rgb(folder: Path, mode: str) -> None:
    name = "b.tiff" if mode in ("CMYK", "I;16") else "b.png"
    Image.new(mode, (5, 2)).save(folder / "images" / name)
    line = record(**user({"type": "image", "path": f"images/{name}"}))
    (message,) = open_images(load_samples(write(folder, line)).samples[0])
    assert message["content"][0]["image"].mode == "RGB"
    assert message["content"][0]["image"].size == (5, 2)


def test_images_in_memory() -> None:
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, "png")
    for image in (Image.new("L", (2, 2)), stream.getvalue()):
        sample = Sample(
            "x", "t", ({"role": "user", "content": [{"type": "image", "image": image}]},)
        )
        assert open_images(sample)[0]["content"][0]["image"].mode == "RGB"


def test_the_frames_of_a_video_are_opened_in_order(folder: Path) -> None:
    Image.new("RGB", (4, 3), (0, 0, 255)).save(folder / "images" / "b.png")
    frames = ["images/b.png", "images/a.png", "images/b.png"]
    loaded = load_samples(
        write(folder, record(**user(video(frames), {"type": "text", "text": "?"})))
    )
    part = open_images(loaded.samples[0])[0]["content"][0]
    assert [frame.getpixel((0, 0))[2] for frame in part["frames"]] == [255, 0, 255]
    assert part["fps"] == 2.0
    others = (video(frames, 3), video(frames[::-1][:2]))
    digests = [load_samples(write(folder, record(**user(other)))).digest for other in others]
    assert len({loaded.digest, *digests}) == 3, "rate and frames are part of the digest"


# What is refused, and how

CONTENT = "messages[0].content"
BAD_LINES = [
    ("{", "invalid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("[1]", "field 'sample': expected an object"),
    ('"text"', "field 'sample': expected an object"),
    ('{"id": NaN}', "NaN is not a JSON number"),
    ('{"id": -Infinity}', "-Infinity is not a JSON number"),
    ('{"id": "a", "id": "b"}', "key 'id' occurs twice"),
    ('{"id": ' + "9" * 5000 + "}", "invalid JSON"),
    ({}, "field 'id' is missing"),
    ({"id": "a", "task": "t"}, "field 'messages' is missing"),
    (record(id=3), "field 'id': expected a string, found 3"),
    (record(id=""), "field 'id': expected 1 to 256 printable"),
    (record(id="a\nb"), r"field 'id': expected 1 to 256 printable characters, found a\nb"),
    (record(id="x" * 300), "field 'id': expected 1 to 256"),
    (record(task=None), "field 'task': expected a string, found None"),
    (record(mesages=[]), "field 'mesages' is not known: expected only id, task, messages"),
    (record(messages=[]), "field 'messages': expected at least 1 entry"),
    (record(messages={}), "field 'messages': expected a list"),
    (record(messages=["hi"]), "field 'messages[0]': expected an object"),
    (record(messages=[{"role": "user"}]), "field 'messages[0].content' is missing"),
    (record(messages=[{"role": "tool", "content": "x"}]), "field 'messages[0].role': expected one"),
    (record(messages=[{"role": "assistant", "content": "x"}]), "the answer"),
    (record(messages=[{"role": "user", "content": []}]), f"field '{CONTENT}': expected at least"),
    (record(messages=[{"role": "user", "content": 5}]), f"field '{CONTENT}': expected a list"),
    (record(messages=[{"role": "user", "content": "x", "name": "y"}]), "'messages[0].name' is not"),
    (record(**user("text")), f"field '{CONTENT}[0]': expected a part"),
    (record(**user({"type": "audio"})), f"field '{CONTENT}[0]': expected a part"),
    (record(**user({"type": "video", "path": "v.mp4"})), f"'{CONTENT}[0].path': no video file and"),
    (record(**user(video([]))), f"field '{CONTENT}[0].frames': expected at least 1 entry"),
    (record(**user(video(["no.png"]))), f"field '{CONTENT}[0].frames[0]': no image file at"),
    (record(**user(video(["../a.png"]))), f"field '{CONTENT}[0].frames[0]': ../a.png leads out"),
    (record(**user(video([], fps=0))), f"field '{CONTENT}[0].fps': expected a number above 0"),
    (record(**user(video([], fps=True))), f"field '{CONTENT}[0].fps': expected a number above 0"),
    (record(**user(video([], fps="2"))), f"field '{CONTENT}[0].fps': expected a number above 0"),
    (record(**user(video([], fps=1e9))), f"{CONTENT}[0].fps': expected a number above 0, at most"),
    (record(**user({"type": "text"})), f"field '{CONTENT}[0].text' is missing"),
    (record(**user({"type": "text", "text": 1})), f"field '{CONTENT}[0].text': expected a string"),
    (record(**user({"type": "text", "text": "x", "modality": "image"})), "[0].modality': expected"),
    (record(**user({"type": "text", "text": "\ud800"})), "half a character"),
    (record(**user({"type": "image", "url": "http://x"})), f"'{CONTENT}[0].path' is missing"),
    (record(**user({"type": "image", "path": "a", "b": 1})), f"'{CONTENT}[0].b' is not known"),
    (record(**user({"type": "image", "path": 7})), f"field '{CONTENT}[0].path': expected a string"),
    (record(**user({"type": "image", "path": "a\0b"})), f"field '{CONTENT}[0].path': expected 1"),
    (record(**user(*[{"type": "text", "text": ""}] * 5000)), "at most 4096 parts"),
    (record(reply=5), "field 'reply': expected a string"),
    (record(followups="x"), "field 'followups': expected a list"),
    (record(followups=[{"question": "x"}]), "field 'followups[0].reply' is missing"),
    (record(followups=[{"question": "x", "reply": 1}]), "field 'followups[0].reply': expected"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES, ids=[e for _, e in BAD_LINES])
def test_bad_lines_name_file_line_and_field(folder: Path, line: object, expected: str) -> None:
    expected = "expected answer" if expected == "the answer" else expected
    message = refusal(folder, record(), "", line)
    assert message.startswith(f"{folder / 'samples.jsonl'}:3: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 600


def test_bytes_that_are_no_utf8(folder: Path) -> None:
    (folder / "samples.jsonl").write_bytes(json.dumps(record()).encode() + b'\n{"id": "\xff"}')
    with pytest.raises(SampleError, match=r"samples\.jsonl:2: expected UTF-8, found .* byte 9"):
        load_samples(folder)


def test_a_line_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_LINE_BYTES", 1000)
    assert ":2: the line has over 1,000 bytes" in refusal(folder, record(), "x" * 2000)


def test_ids_that_occur_twice(folder: Path) -> None:
    message = refusal(folder, record(0), record(1), record(0))
    assert "samples.jsonl:3: field 'id': 's0' occurs already at" in message
    assert "samples.jsonl:1" in message


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_set(folder: Path, lines: tuple) -> None:
    assert "holds no usable sample" in refusal(folder, *lines)


def test_places_without_data(tmp_path: Path) -> None:
    for place in (
        tmp_path / "no.jsonl",
        tmp_path / "no" / "folder",
        "./none",
        "a b",
        "x\0y",
        "hf:a b",
    ):
        with pytest.raises(UsageError, match="no such folder or file: "):
            load_samples(str(place))


def test_options_out_of_range(folder: Path) -> None:
    write(folder, record())
    with pytest.raises(UsageError, match="max_samples is 0"):
        load_samples(folder, max_samples=0)
    with pytest.raises(UsageError, match="on_error"):
        load_samples(folder, on_error="ignore")  # type: ignore[arg-type]


# Images


def image_refusal(folder: Path, path: str) -> str:
    return refusal(folder, record(**user({"type": "image", "path": path})))


def test_images_that_cannot_be_read(folder: Path) -> None:
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    assert "no image file at" in image_refusal(folder, "images/none.png")
    assert "no image file at" in image_refusal(folder, "images")
    assert "not a readable image" in image_refusal(folder, "text.png")
    message = image_refusal(folder, "empty.png")
    assert f"samples.jsonl:1: field '{CONTENT}[0].path'" in message
    assert str(folder / "empty.png") in message


@pytest.mark.parametrize("path", ["../secret.png", "images/../../secret.png", "link.png", "/etc/x"])
def test_images_outside_the_folder(tmp_path: Path, path: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    message = image_refusal(inner, path)
    assert "leads out of" in message or "is absolute" in message


def test_a_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "images" / "a.png")
    line = record(**user({"type": "image", "path": "link.png"}))
    assert len(load_samples(write(folder, line)).samples) == 1


def test_too_many_pixels_are_refused_by_the_header(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 11)
    assert "is 4 x 3: expected 1 to 11 pixels" in image_refusal(folder, "images/a.png")


def test_a_decompression_bomb_costs_nothing(folder: Path) -> None:
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    message = image_refusal(folder, "bomb.png")
    assert "bomb.png" in message
    assert "pixels" in message or "DecompressionBomb" in message


def test_a_damaged_image_names_file_and_sample(folder: Path) -> None:
    noise = Image.effect_noise((64, 64), 90)
    noise.save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    line = record(**user({"type": "image", "path": "cut.png"}))
    for share in (0.2, 0.5, 0.9):
        (folder / "cut.png").write_bytes(whole[: int(len(whole) * share)])
        (sample,) = load_samples(write(folder, line)).samples
        with pytest.raises(SampleError, match=r"sample 's0': image .*cut\.png is damaged"):
            open_images(sample)


def test_an_image_that_vanishes_names_the_sample(folder: Path) -> None:
    (sample,) = load_samples(write(folder, record())).samples
    (folder / "images" / "a.png").unlink()
    with pytest.raises(SampleError, match=r"sample 's0': cannot read image .*a\.png"):
        open_images(sample)


# Skipping, subsets, digest


def test_skipping_counts_and_names_what_it_left_out(folder: Path) -> None:
    write(folder, record(0), "{", record(1), record(0), record(2, extra=1))
    loaded = load_samples(folder, on_error="skip")
    assert [sample.id for sample in loaded.samples] == ["s0", "s1"]
    assert len(loaded.skipped) == 3
    assert [":2:" in loaded.skipped[0], ":4:" in loaded.skipped[1]] == [True, True]
    write(folder, "{", "{")
    with pytest.raises(SampleError, match=r"no usable sample \(2 skipped; the first: .*:1:"):
        load_samples(folder, on_error="skip")


def many(folder: Path, order: int = 1) -> LoadedSamples:
    lines = [record(i, task=f"t{i % 3 if i < 27 else 3}") for i in range(30)]
    return load_samples(write(folder, *lines[::order]), max_samples=8, seed=5)


def test_subsets_are_balanced_and_do_not_depend_on_order(folder: Path) -> None:
    forward, backward = many(folder, 1), many(folder, -1)
    assert forward.tasks == {"t0": 2, "t1": 2, "t2": 2, "t3": 2}
    assert {s.id for s in forward.samples} == {s.id for s in backward.samples}
    assert forward.digest == backward.digest


def test_other_seeds_choose_others(folder: Path) -> None:
    names = [("t", str(i)) for i in range(100)]
    assert choose(names, 10, 0) != choose(names, 10, 1)
    assert choose(names, 1000, 0) == list(range(100))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_no_task_gets_two_more_than_another_that_has_some_left(tasks: list, count: int) -> None:
    names = [(task, str(i)) for i, task in enumerate(tasks)]
    chosen = choose(names, count, 0)
    assert len(chosen) == len(set(chosen)) == min(count, len(names))
    taken = {task: sum(names[i][0] == task for i in chosen) for task in set(tasks)}
    for task in taken:
        if taken[task] < tasks.count(task):
            assert max(taken.values()) <= taken[task] + 1


def test_the_digest_sees_text_and_pixels_but_not_file_names(folder: Path) -> None:
    first = load_samples(write(folder, record())).digest
    (folder / "images" / "a.png").rename(folder / "b.png")
    parts = [{"type": "image", "path": "b.png"}, {"type": "text", "text": "what?"}]
    moved = load_samples(write(folder, record(**user(*parts)))).digest
    Image.new("RGB", (4, 3), (254, 0, 0)).save(folder / "b.png")
    repainted = load_samples(folder).digest
    assert first == moved != repainted
    assert load_samples(write(folder, record(**user(*parts), reply="x"))).digest != repainted


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    | st.sampled_from(["user", "text", "image", "images/a.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "task", "messages", "role", "content", "type", "text", "path"]),
        inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_other_json_is_refused(folder: Path, value: object) -> None:
    with pytest.raises(SampleError, match=r"samples\.jsonl:1: "):
        load_samples(write(folder, json.dumps(value)))


# Hugging Face datasets


@pytest.fixture
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def test_a_saved_dataset_of_questions(tmp_path: Path, datasets) -> None:
    image = Image.new("RGB", (8, 8))
    rows = {"image": [image] * 6, "question": ["what?"] * 6, "answer": [["red", "rot"]] * 6,
            "task": ["a", "b"] * 3, "unused": [1] * 6}  # fmt: skip
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "set"
    )
    loaded = load_samples(tmp_path / "set", max_samples=4)
    assert loaded.tasks == {"a": 2, "b": 2}
    sample = loaded.samples[0]
    assert sample.reply == "red"
    assert [part["type"] for part in open_images(sample)[0]["content"]] == ["image", "text"]
    assert "PIL" in sys.modules


def test_a_saved_dataset_of_messages(tmp_path: Path, datasets) -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]  # fmt: skip
    rows = {"messages": [messages, messages], "images": [[Image.new("L", (2, 2))], []]}
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.List(part)}
            ),
            "images": datasets.List(datasets.Image()),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "set")
    loaded = load_samples(tmp_path / "set", on_error="skip")
    (sample,) = loaded.samples
    assert (sample.id, sample.reply, len(sample.messages)) == ("set-000000", "yes", 1)
    assert "set: row 1: field 'images': fewer images" in loaded.skipped[0]


def test_a_dataset_with_other_columns(tmp_path: Path, datasets) -> None:
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(SampleError, match="has the columns text: expected 'messages'"):
        load_samples(tmp_path / "set")


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, datasets) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SampleError, match=r"'owner/set' cannot be had.*no network"):
        load_samples("owner/set:validation")


def test_a_split_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, datasets) -> None:
    whole = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"question": ["x"]})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: whole)
    with pytest.raises(UsageError, match="no split 'train': expected one of test"):
        load_samples("owner/set:train")
    assert load_samples("owner/set:default:test").samples[0].task == "set"


@pytest.mark.parametrize(
    "name",
    ["calibration-mini", "data/validation", "data/x:train", "owner/set.jsonl", "owner/set.json",
     "a/b/c", "./owner/set", "../owner/set", "~/owner-set", "hf:", "hf:a/b/c", "hf:./set"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_not_looked_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else learns of a mistyped folder: `data` is one here."""
    monkeypatch.setattr(sample_hub, "open_hub", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="no such folder or file: "):
        load_samples(name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("owner/set", HubSource("owner/set")),
        ("owner/set:test", HubSource("owner/set", split="test")),
        ("owner/set:a:test", HubSource("owner/set", "a", "test")),
        ("hf:owner/set", HubSource("owner/set")),
        ("hf:squad", HubSource("squad")),
        ("hf:squad:test", HubSource("squad", split="test")),
        ("hf:data/validation", HubSource("data/validation")),
        ("hf:here", HubSource("here")),
    ],
)
def test_what_is_looked_up(
    name: str, wanted: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[HubSource] = []

    def refuse(source: HubSource) -> None:
        asked.append(source)
        raise SampleError("asked")

    monkeypatch.setattr(sample_hub, "open_hub", refuse)
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "here"):
        (tmp_path / folder).mkdir()
    with pytest.raises(SampleError, match="asked"):
        load_samples(name)
    assert asked == [wanted]


def test_what_is_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_hub, "open_hub", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    write(folder, {**record(), **user({"type": "text", "text": "what?"})})
    assert len(load_samples("owner/set").samples) == 1
