"""MM-NIAH, DocVQA and OCRBench: prompts, gold, and where files are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets.layouts import load_layout
from tests.evaluate.datasets.disk import Disk, docvqa, images_of, mmniah, ocrbench, text_of

LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
DOCUMENT = "Text <image> more text.\nIs it <image>?"


def test_mm_niah_puts_images_where_the_document_has_them(tmp_path: Path) -> None:
    tasks = mmniah().load(tmp_path)
    samples = {sample.task: sample for sample in tasks.samples}
    assert {task: (text_of(s), s.reply) for task, s in samples.items()} == {
        "counting-text": (DOCUMENT + PHRASE, "[1, 0, 2]"),
        "reasoning-image": (f"{DOCUMENT}\nA. <image>\nB. <image>{LETTER}", "A"),
        "retrieval-image": (f"{DOCUMENT}\nA. a cat\nB. a dog{LETTER}", "B"),
        "retrieval-text": (DOCUMENT + PHRASE, "blue cat"),
    }
    assert images_of(samples["retrieval-text"]) == ["a.jpg", "needle.jpg"]
    assert images_of(samples["reasoning-image"]) == ["a.jpg", "needle.jpg", "x.jpg", "y.jpg"]
    gold = {task: tasks.gold[sample.id] for task, sample in samples.items()}
    assert gold["counting-text"].score("[1, 0, 3]") == pytest.approx(2 / 3)
    assert gold["retrieval-text"].score("It is a blue cat.") == 1
    assert gold["retrieval-image"].score("a dog") == 1
    assert gold["reasoning-image"].score("A") == 1


@pytest.mark.parametrize(("count", "says"), [(1, "at least 2"), (27, "at most 26 options")])
@pytest.mark.parametrize("key", ["choices", "choices_image_path"])
def test_mm_niah_has_2_to_26_options(key: str, count: int, says: str, tmp_path: Path) -> None:
    disk = mmniah()
    meta = {"choices": None, "choices_image_path": None, key: ["x.jpg"] * count}
    disk.files["annotations/retrieval-image.jsonl"][0]["meta"] = meta
    with pytest.raises(SampleError, match=f"meta: field '{key}': expected {says}"):
        disk.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (
            "retrieval-text",
            {"images_list": ["needle.jpg"]},
            "field 'images_list': expected as many",
        ),
        ("retrieval-text", {"context": "no image"}, "field 'images_list': expected as many"),
        ("retrieval-text", {"answer": 3}, "field 'answer': expected text"),
        ("retrieval-text", {"meta": None}, "field 'meta' is missing"),
        ("counting-text", {"answer": "many"}, "field 'answer': expected a list of whole numbers"),
        ("counting-text", {"answer": []}, "field 'answer': expected a list of whole numbers"),
        ("counting-text", {"answer": [1, "2"]}, "field 'answer': expected a list of whole"),
        ("retrieval-image", {"answer": 2}, "field 'answer': expected a whole number from 0 to 1"),
        (
            "retrieval-image",
            {"images_list": ["needle.jpg", "no.jpg"]},
            r"field 'images_list\[1\]': no image",
        ),
    ],
)
def test_mm_niah_names_what_is_wrong(
    file: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    disk = mmniah()
    disk.files[f"annotations/{file}.jsonl"][0] |= changes
    with pytest.raises(SampleError, match=rf"{file}\.jsonl:1: {says}"):
        disk.load(tmp_path)


def test_mm_niah_counts_may_be_written_as_text(tmp_path: Path) -> None:
    disk = mmniah()
    disk.files["annotations/counting-text.jsonl"][0]["answer"] = "[1,0,2]"
    sample = next(s for s in disk.load(tmp_path).samples if s.task == "counting-text")
    assert sample.reply == "[1, 0, 2]"


def test_docvqa_takes_the_best_of_its_answers(tmp_path: Path) -> None:
    tasks = docvqa().load(tmp_path)
    (sample,) = tasks.samples
    assert (sample.id, sample.task, sample.reply) == ("49153", "handwritten", "1/8/93")
    assert text_of(sample) == f"<image>What is the date?{PHRASE}"
    gold = tasks.gold["49153"]
    assert gold.references == ("1/8/93", "January 8, 1993")
    assert gold.score("january 8, 1993") == 1
    assert gold.score("January 9, 1993") == pytest.approx(1 - 1 / 15)


@pytest.mark.parametrize(
    ("annotations", "image"),
    [
        ("val_v1.0.json", "documents/p_1.png"),
        ("val/val_v1.0.json", "val/documents/p_1.png"),
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images/p_1.png"),
        ("qas/val_v1.0_withQT.json", "images/p_1.png"),
    ],
)
def test_docvqa_comes_in_several_folders(annotations: str, image: str, tmp_path: Path) -> None:
    content = docvqa().files["val_v1.0_withQT.json"]
    disk = Disk("docvqa", {annotations: content}, [image])
    assert images_of(disk.load(tmp_path).samples[0]) == ["p_1.png"]


def test_docvqa_without_answers_or_types(tmp_path: Path) -> None:
    disk = docvqa()
    row = disk.files["val_v1.0_withQT.json"]["data"][0]
    del row["question_types"]
    assert disk.load(tmp_path / "a").samples[0].task == "docvqa"
    del row["answers"]
    with pytest.raises(SampleError, match=r"data\[0\]: field 'answers' is missing; there are: que"):
        disk.load(tmp_path / "b")


def test_ocrbench_scores_by_containment(tmp_path: Path) -> None:
    tasks = ocrbench().load(tmp_path)
    plain, chart, formula = tasks.samples
    assert [s.id for s in tasks.samples] == ["0000", "0001", "0002"]
    assert plain.task == "Regular Text Recognition"
    assert text_of(plain) == "<image>what is written in the image?"
    assert tasks.gold[plain.id].score("The image says 'centre'.") == 1
    assert tasks.gold[chart.id].references == ("2,411", "2411")
    assert tasks.gold[chart.id].score("It was 2411.") == 1
    assert tasks.gold[formula.id].score("$x^{2}$") == 1
    assert tasks.gold[formula.id].score("$X^{2}$") == 0


@pytest.mark.parametrize("folder", ["images", "."])
def test_ocrbench_images_may_lie_elsewhere(folder: str, tmp_path: Path) -> None:
    disk = ocrbench()
    disk.images = [f"{folder}/IIIT5K/test/918_1.png"]
    disk.files = {"json_files/OCRBench.json": disk.files["OCRBench.json"]}
    assert len(disk.load(tmp_path).samples) == 3
    file = tmp_path / "json_files" / "OCRBench.json"
    assert len(load_layout("ocrbench", str(file)).samples) == 3
