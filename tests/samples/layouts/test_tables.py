"""Questions and answers, in files and datasets, after the schemas that are published:
visualqa.org/download.html, textvqa.org/dataset, rrc.cvc.uab.es (DocVQA),
github.com/vis-nlp/ChartQA, github.com/tatsu-lab/stanford_alpaca, huggingface.co/datasets/MMMU/MMMU,
huggingface.co/datasets/HuggingFaceM4/the_cauldron."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkvprof.errors import SampleError, UsageError
from hkvprof.samples.layouts import parquet, tables
from hkvprof.samples.read import LoadedSamples, load_samples, open_images
from tests.samples.layouts.shown import base64_of, encoded, load, paint, picture, shown, write


def all_shown(loaded: LoadedSamples) -> list[str]:
    return [shown(sample) for sample in loaded.samples]


# VQA, TextVQA, DocVQA, ChartQA: files


def test_vqa_joins_questions_and_annotations(tmp_path: Path) -> None:
    paint(tmp_path / "val2014" / "COCO_val2014_000000458755.jpg", "red")
    top = {"info": {}, "task_type": "Open-Ended", "data_subtype": "val2014"}
    asked = {"image_id": 458755, "question": "What colour?", "question_id": 458755000}
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}]
    given = {"question_type": "what", "multiple_choice_answer": "red", "answers": answers,
             "image_id": 458755, "answer_type": "other", "question_id": 458755000}  # fmt: skip
    path = write(
        tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {**top, "questions": [asked]}
    )
    assert all_shown(load_samples(path)) == ["user: [red]What colour?"]
    write(tmp_path / "v2_mscoco_train2014_annotations.json", {"annotations": []})
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {**top, "annotations": [given]})
    for source in (path, tmp_path):
        loaded = load_samples(source)
        assert all_shown(loaded) == ["user: [red]What colour?\n= red"]
        assert loaded.samples[0].id == "458755000"
    with pytest.raises(SampleError, match="'data' or 'questions'; found one with info"):
        load_samples(tmp_path / "v2_mscoco_val2014_annotations.json")


def test_textvqa_and_docvqa(tmp_path: Path) -> None:
    paint(tmp_path / "train_images" / "0054c91397f2fe05.jpg", "blue")
    paint(tmp_path / "documents" / "xnbl0037_1.png", "green")
    row = {"question": "Which brand?", "image_id": "0054c91397f2fe05", "question_id": 34602,
           "image_classes": [], "answers": ["a", "nokia", "b", "nokia"]}  # fmt: skip
    top = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    path = write(tmp_path / "TextVQA_0.5.1_train.json", {**top, "data": [row]})
    loaded = load_samples(path)
    assert all_shown(loaded) == ["user: [blue]Which brand?\n= nokia"]
    assert "answers      reply; of several the commonest" in "\n".join(loaded.recognised.lines())
    row = {"questionId": 337, "question": "The date?", "image": "documents/xnbl0037_1.png",
           "docId": 279, "answers": ["1/8/93"], "data_split": "train"}  # fmt: skip
    path = write(tmp_path / "train_v1.0.json", {"dataset_name": "docvqa", "data": [row]})
    (sample,) = load_samples(path).samples
    assert (sample.id, shown(sample)) == ("337", "user: [green]The date?\n= 1/8/93")


def test_chartqa(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "png" / "10095.png", "red")
    row = {"imgname": "10095.png", "query": "How many?", "label": "3"}
    loaded = load_samples(write(tmp_path / "train" / "train_human.json", [row]))
    assert all_shown(loaded) == ["user: [red]How many?\n= 3"]
    assert loaded.recognised.name == "chartqa"


# Alpaca, and tables of one's own


def test_alpaca(tmp_path: Path) -> None:
    paint(tmp_path / "1.jpg", "blue")
    rows = [
        {"instruction": "Sort.", "input": "b, a", "output": "a, b"},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"instruction": "<image>What?", "input": "", "output": "Blue.", "images": ["1.jpg"],
         "system": "Be brief.", "history": [["Hi.", "Ho."]]},
    ]  # fmt: skip
    loaded = load_samples(write(tmp_path / "alpaca.json", rows))
    assert loaded.recognised.name == "alpaca"
    assert all_shown(loaded) == [
        "user: Sort.\nb, a\n= a, b",
        "user: Say hi.\n= Hi.",
        "system: Be brief.\nuser: Hi.\nassistant: Ho.\nuser: [blue]What?\n= Blue.",
    ]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_and_tsv(tmp_path: Path) -> None:
    paint(tmp_path / "images" / "1.png", "red")
    rows = [{"id": "a", "image": "1.png", "question": 'So, "what"?\nYes?', "answer": "red"},
            {"id": "b", "image": "", "question": "No picture?", "answer": ""}]  # fmt: skip
    wanted = ['user: [red]So, "what"?\nYes?\n= red', "user: No picture?"]
    assert all_shown(load_samples(write_csv(tmp_path / "own.csv", rows))) == wanted
    encoded_ = [{**rows[0], "image": base64_of("red").ljust(300, "\n")}, rows[1]]
    assert all_shown(load_samples(write_csv(tmp_path / "own.tsv", encoded_, "\t"))) == wanted
    (tmp_path / "bad.csv").write_text("question,answer\na,b,c\n")
    with pytest.raises(SampleError, match=r"bad.csv:2: more cells than the header has names"):
        load_samples(tmp_path / "bad.csv")
    rows[1]["question"] = ""
    with pytest.raises(SampleError, match=r"own.csv:4: field 'question' is missing; there are: id"):
        load_samples(write_csv(tmp_path / "own.csv", rows))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not a readable JSON file"),
        ("3", "expected a list of objects, found 3"),
        ('{"a": 1}', "an object with 'data' or 'questions'; found one with a"),
        ('[{"a": 1}]', "odd has the fields a: expected those of a known layout"),
        ("[]", "odd has the fields none: expected"),
        ('[{"question": "x", "image": "1.png"}]', "record 0: field 'image': no image file"),
        ('[{"question": 1.5}, {"question": []}]', "record 1: field 'question': expected text"),
        ('[{"question": "x", "answers": [{"a": 1}]}]', "field 'answers[0]': expected a text, or"),
        ('[{"question": "x"}, 7]', "record 1: expected an object, found '7'"),
        ('[{"question": "x <image> y"}]', "found 1 places <image> and 0 pictures"),
        ('[{"instruction": "x", "output": "y", "history": ["a"]}]', "field 'history[0]': expected"),
        ('[{"question": "x", "video": "a.mp4"}]', "field 'video': no video file a.mp4 in"),
        ('[{"question": "\\ud800"}]', "half a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_cannot_be_taken_say_why(tmp_path: Path, content: str, expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        load_samples(write(tmp_path / "odd.json", content))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 900


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    lines = '{"question": "a"}\n{"question": "b"}\n'
    assert len(load_samples(write(tmp_path / "lines.json", lines)).samples) == 2


def test_files_are_read_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", [{"question": "x"}] * 50)
    monkeypatch.setattr(tables, "MAX_MARKS", 20)
    with pytest.raises(SampleError, match=r"20 commas and opening brackets\); take a part"):
        load_samples(path)
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 20)
    with pytest.raises(SampleError, match="has more than 20 bytes; take a part of it"):
        load_samples(path)
    (tmp_path / "b.csv").write_bytes(b"question\n\xff\n")
    with pytest.raises(SampleError, match=r"b.csv: expected UTF-8, found other bytes at byte 10"):
        load_samples(tmp_path / "b.csv")


def test_a_layout_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"question": "x", "conversations": []}])
    with pytest.raises(SampleError, match="a list of turns"):
        load_samples(path)
    assert load(path, "questions").recognised.name == "questions"
    with pytest.raises(SampleError, match="field 'instruction' is missing; there are: question"):
        load(path, "alpaca")
    with pytest.raises(UsageError, match="--data-format vqa: expected one of hkvprof, milebench"):
        load(path, "vqa")
    with pytest.raises(UsageError, match="--question is for pictures and texts without questions"):
        load(path, "questions", question="x")
    with pytest.raises(UsageError, match="no such folder"):
        load(path, image_folder=tmp_path / "none")


# Parquet and datasets


@pytest.fixture
def datasets() -> Any:
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def mmmu(**more: Any) -> dict[str, Any]:
    row = {
        "id": "validation_Art_1", "question": "Is <image 1> like <image 2>?",
        "options": "['yes', 'no: <image 1>', \"it's\"]", "explanation": "", "answer": "B",
        "image_1": picture("red"), "image_2": picture("blue"), "image_3": None,
        "img_type": "['Paintings']", "topic_difficulty": "Easy", "question_type": "multiple-choice",
        "subfield": "Drawing",
    }  # fmt: skip
    return {**row, **more}


def test_mmmu_shows_its_pictures(tmp_path: Path, datasets: Any) -> None:
    """Rows, a dataset in memory, one that is saved, and its Parquet files are the same samples."""
    wanted = "user: Is [red] like [blue]?\n(A) yes\n(B) no: [red]\n(C) it's\n= B"
    dataset = datasets.Dataset.from_list([mmmu(image_3=picture("red"), explanation="<image 3>")])
    dataset = dataset.remove_columns("image_3")
    dataset.save_to_disk(tmp_path / "saved")
    for split in ("dev", "validation"):
        dataset.to_parquet(tmp_path / "MMMU" / "Art" / f"{split}-00000-of-00001.parquet")
    one = tmp_path / "MMMU" / "Art" / "dev-00000-of-00001.parquet"
    folder = tmp_path / "MMMU"
    for source in ([mmmu()], dataset, datasets.DatasetDict({"dev": dataset}), one, folder,
                   tmp_path / "saved"):  # fmt: skip
        loaded = load_samples(source)
        assert all_shown(loaded) == [wanted]
        assert (loaded.samples[0].id, loaded.samples[0].task) == ("validation_Art_1", "Drawing")
        assert loaded.recognised.name == "mmmu"
    assert "split: dev; left out: validation" in load_samples(folder).recognised.lines()[-1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"image_2": None}, "field 'image_2': no picture for <image 2>"),
        ({"question": "Is <image 1>?"}, "field 'image_2': a picture without a place: expected"),
        ({"options": "['a'"}, "field 'options': expected a list of texts"),
        ({"options": "__import__('os')"}, "field 'options': expected a list of texts"),
        ({"options": "['a'] * 10000000"}, "field 'options': expected a list of texts"),
        ({"options": "(" * 10_000}, "field 'options': expected a list of texts"),
        ({"options": "{'a': 1}"}, "field 'options': expected a list of at most 26"),
        ({"options": [[1]]}, "field 'options[0]': expected text"),
        ({"image_1": b"no picture"}, "field 'image_1': the picture is not a readable image"),
        ({"image_1": "/etc/hostname"}, "field 'image_1': /etc/hostname leads out of no folder"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_mmmu_says_what_is_wrong(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(SampleError) as caught:
        load_samples([mmmu(**more)])
    assert "samples: record 0: " in str(caught.value)
    assert expected in str(caught.value)


@given(st.lists(st.integers(1, 3), max_size=6), st.sets(st.integers(1, 3)))
@settings(max_examples=100, deadline=None)
def test_mmmu_places_equal_pictures_or_it_is_refused(marks: list[int], given_: set[int]) -> None:
    colours = {1: "red", 2: "green", 3: "blue"}
    row = mmmu(question="".join(f"<image {n}>" for n in marks) or "?", options="[]")
    row |= {f"image_{n}": encoded(colours[n]) if n in given_ else None for n in colours}
    if set(marks) != given_:
        with pytest.raises(SampleError, match="field 'image_"):
            load_samples([row])
        return
    wanted = "".join(f"[{colours[n]}]" for n in marks) or "?"
    assert all_shown(load_samples([row])) == [f"user: {wanted}\n= B"]


def cauldron(datasets: Any) -> Any:
    turn = {"user": "What?", "assistant": "Red.", "source": "vqav2"}
    later = {**turn, "user": "And?", "assistant": "Blue."}
    pictures = [picture("red"), picture("blue")]
    return datasets.Dataset.from_dict(
        {"images": [pictures, pictures[:1]], "texts": [[turn, later], [turn]]}
    )


def test_the_cauldron(tmp_path: Path, datasets: Any) -> None:
    cauldron(datasets).to_parquet(tmp_path / "ai2d" / "train-00000-of-00001.parquet")
    loaded = load_samples(tmp_path / "ai2d")
    assert all_shown(loaded) == ["user: [red][blue]What?\n= Red.", "user: [red]What?\n= Red."]
    assert [(turn.question, turn.reply) for turn in loaded.samples[0].followups] == [
        ("And?", "Blue.")
    ]
    assert loaded.samples[1].followups == ()
    assert (loaded.samples[0].id, loaded.recognised.name) == ("ai2d-000000", "cauldron")


def test_chartqa_and_vqa_of_the_hub(datasets: Any) -> None:
    chart = {"image": picture("red"), "query": "How many?", "label": ["3"], "human_or_machine": 0}
    assert all_shown(load_samples(datasets.Dataset.from_list([chart]))) == [
        "user: [red]How many?\n= 3"
    ]
    answers = [{"answer": "net", "answer_id": 1}, {"answer": "a net", "answer_id": 2}]
    vqa = {"image": picture("blue"), "question": "What?", "question_id": 5, "answers": answers,
           "multiple_choice_answer": "net"}  # fmt: skip
    loaded = load_samples(datasets.Dataset.from_list([vqa]))
    assert all_shown(loaded) == ["user: [blue]What?\n= net"]
    assert loaded.samples[0].id == "5"


def test_conversations_of_the_hub(datasets: Any) -> None:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Green."}]
    rows = [{"id": "a", "image": picture("green"), "conversations": said, "data_source": "x"}]
    assert all_shown(load_samples(datasets.Dataset.from_list(rows))) == [
        "user: [green]\nWhat?\n= Green."
    ]
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Green."}]
    rows = [{"messages": messages, "images": [picture("green")]}]
    assert all_shown(load_samples(datasets.Dataset.from_list(rows))) == ["user: [green]?\n= Green."]


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch, datasets: Any) -> None:
    """Recognised as one in memory is; what is asked of the hub is as before."""
    dataset = datasets.DatasetDict({"validation": datasets.Dataset.from_list([mmmu()] * 2)})
    asked: list[object] = []

    def load_dataset(*names: object, **_: object) -> Any:
        asked.append(names)
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_samples("MMMU/MMMU:Art:validation")
    assert asked == [("MMMU/MMMU", "Art")]
    assert loaded.recognised.name == "mmmu"
    assert [sample.id for sample in loaded.samples] == ["MMMU/MMMU-000000", "MMMU/MMMU-000001"]
    assert all_shown(loaded)[0].startswith("user: Is [red] like [blue]?")


def test_a_streamed_dataset_says_what_to_do(datasets: Any) -> None:
    streamed = datasets.Dataset.from_list([{"question": "?"}] * 3).to_iterable_dataset()
    with pytest.raises(UsageError, match=r"of a streamed one: list\(dataset.take\(128\)\)"):
        load_samples(streamed)
    assert len(load_samples(list(streamed.take(2))).samples) == 2


def test_own_columns_stay_own(datasets: Any) -> None:
    rows = [{"question": "What?", "answer": ["b", "a", "a"], "image": picture("red")}]
    loaded = load_samples(datasets.Dataset.from_list(rows))
    assert (loaded.recognised.name, loaded.samples[0].reply) == ("hkvprof", "b")


def test_a_subset_opens_no_other_picture(tmp_path: Path) -> None:
    """Rows are chosen by their ids, as everywhere, before a picture is looked for."""
    rows = [{"id": str(i), "question": "?", "image": "none.png"} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(SampleError, match=r"holds no usable sample \(3 skipped"):
        load_samples(path, max_samples=3, on_error="skip")
    sound = [{"id": str(i), "question": "?"} for i in range(20)]
    first = load_samples(write(tmp_path / "b.jsonl", sound), max_samples=5, seed=1)
    again = load_samples(write(tmp_path / "b.jsonl", sound[::-1]), max_samples=5, seed=1)
    assert first.digest == again.digest
    assert {s.id for s in first.samples} == {s.id for s in again.samples}


def test_parquet_is_read_a_row_group_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{i}?"} for i in range(10)]
    for name in "ab":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet", row_group_size=3)
    loaded = load_samples(tmp_path)
    assert all_shown(loaded) == [f"user: {i}?" for i in range(10)] * 2
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(SampleError, match=r"a.parquet: row group 0 has \d+ bytes: expected"):
        load_samples(tmp_path)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1" + b"\0" * 20 + b"PAR1")
    with pytest.raises(SampleError, match=r"bad.parquet is not a readable Parquet file"):
        load_samples(bad)


def test_what_is_no_source() -> None:
    with pytest.raises(UsageError, match="samples of type int are not taken"):
        load_samples(3)
    with pytest.raises(SampleError, match="has the fields none"):
        load_samples([])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_pictures_in_memory_are_kept_to_the_pixel(mode: str) -> None:
    given_ = picture("red").convert(mode)
    (sample,) = load_samples([{"question": "?", "image": given_}]).samples
    image = open_images(sample)[0]["content"][0]["image"]
    assert image.tobytes() == given_.convert("RGB").tobytes()
