"""MileBench: placeholders, choices, and the metric of every kind of task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hkvprof.errors import SampleError
from hkvprof.evaluate.datasets.layouts import load_layout
from tests.evaluate.datasets.disk import Disk, images_of, milebench, text_of


def one(task: str, question_type: str = "open-ended", **instance: Any) -> Disk:
    """A dataset with one task of one question."""
    disk = milebench()
    content = disk.files.pop("CLEVR-Change/CLEVR-Change.json")
    content["meta_data"]["question_type"] = question_type
    content["data"][0]["task_instance"] |= instance
    return Disk(
        "milebench", {f"{task}/{task}.json": content}, [f"{task}/images/{n}.png" for n in "ab"]
    )


def test_images_stand_where_the_context_names_them(tmp_path: Path) -> None:
    disk = milebench()
    change, state = disk.load(tmp_path).samples
    assert (change.id, change.task) == ("CLEVR-Change-0", "CLEVR-Change")
    assert text_of(change) == "Compare.\nBefore <image> after <image>. What moved?"
    assert images_of(change) == ["a.png", "b.png"]
    assert change.reply == "the blue cube moved"
    assert text_of(state).endswith(
        "What moved?\nChoice list:\nA. a red cube\nB. a blue ball\nYour answer is:"
    )
    assert state.reply == "B"


def test_metrics_follow_the_reference_implementation(tmp_path: Path) -> None:
    tasks = milebench().load(tmp_path)
    assert {id_: gold.metric.name for id_, gold in tasks.gold.items()} == {
        "CLEVR-Change-0": "rouge_l",
        "StateChange-0": "multiple_choice",
    }
    assert tasks.gold["StateChange-0"].score("B. a blue ball") == 1
    assert tasks.gold["StateChange-0"].score("It is a red cube") == 0
    for task, metric in (("TextNeedleInAHaystack", "words"), ("MMCoQA", "substring")):
        loaded = one(task).load(tmp_path / task)
        assert loaded.gold[f"{task}-0"].metric.name == metric


@pytest.mark.parametrize(
    ("context", "text", "names"),
    [
        ("{table#2} then {image#1}", "<image> then <image>", ["b.png", "a.png"]),
        ("{image#1} and {image#1}{image#2}", "<image> and <image><image>",
         ["a.png", "a.png", "b.png"]),
        ("no mark", "<image><image>no mark", ["a.png", "b.png"]),
        ("only {image#2}", "<image>only <image>", ["a.png", "b.png"]),
        ("{image#1}{image#2}{image#3}{image#0}", "<image><image>{image#3}{image#0}",
         ["a.png", "b.png"]),
    ],
)  # fmt: skip
def test_marks_and_images_need_not_agree(
    context: str, text: str, names: list[str], tmp_path: Path
) -> None:
    (sample,) = one("ALFRED", context=context).load(tmp_path).samples
    assert text_of(sample) == f"Compare.\n{text}"
    assert images_of(sample) == names


def test_one_task_may_be_the_dataset(tmp_path: Path) -> None:
    root = milebench().write(tmp_path)
    (sample,) = load_layout("milebench", str(root / "StateChange")).samples
    assert sample.task == "StateChange"


def test_more_options_than_letters_have_none(tmp_path: Path) -> None:
    choices = [f"image {number}" for number in range(30)]
    disk = one("GPR1200", "multi-choice", choice_list=choices)
    disk.files["GPR1200/GPR1200.json"]["data"][0]["response"] = "image 29"
    tasks = disk.load(tmp_path)
    (sample,) = tasks.samples
    assert "\nimage 0\nimage 1\n" in text_of(sample)
    assert sample.reply == "image 29"
    assert tasks.gold[sample.id].score("I think image 29.") == 1
    assert tasks.gold[sample.id].score("image 2") == 0


def test_numbers_may_be_answers(tmp_path: Path) -> None:
    disk = one("ImageNeedleInAHaystack")
    disk.files["ImageNeedleInAHaystack/ImageNeedleInAHaystack.json"]["data"][0]["response"] = 4711
    (sample,) = disk.load(tmp_path).samples
    assert sample.reply == "4711"


@pytest.mark.parametrize(
    ("question_type", "instance", "says"),
    [
        ("essay", {}, r"meta_data: field 'question_type': expected 'open-ended' or 'multi-choice'"),
        ("multi-choice", {}, r"data\[0\]: task_instance: field 'choice_list' is missing"),
        ("multi-choice", {"choice_list": ["x", "y"]}, r"data\[0\]: field 'response': expected one"),
        ("multi-choice", {"choice_list": ["x"]}, r"field 'choice_list': expected at least 2"),
        (
            "open-ended",
            {"images_path": ["a.png", "../../../x.png"]},
            r"'images_path\[1\]': .*leads",
        ),
        ("open-ended", {"images_path": "a.png"}, r"'images_path': expected a list"),
    ],
)
def test_what_is_wrong_is_named(
    question_type: str, instance: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SampleError, match=says):
        one("Task", question_type, **instance).load(tmp_path)


def test_an_unknown_instruction_is_named(tmp_path: Path) -> None:
    disk = one("Task")
    disk.files["Task/Task.json"]["data"][0]["task_instruction_id"] = 2
    with pytest.raises(SampleError, match=r"'task_instruction_id': expected a whole number from 0"):
        disk.load(tmp_path)
