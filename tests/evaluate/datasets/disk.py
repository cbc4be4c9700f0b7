"""Small datasets in the published layouts, written by the tests themselves."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hkvprof.evaluate.datasets.layouts import load_layout
from hkvprof.evaluate.records import TaskSet
from hkvprof.samples.read import Sample


@dataclass
class Disk:
    """Annotation files by relative path, with their contents, and the images beside them."""

    layout: str
    files: dict[str, Any]
    images: list[str] = field(default_factory=list)

    def write(self, root: Path) -> Path:
        """All of it below `root`."""
        for number, name in enumerate(self.images):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(path)
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        return root

    def load(self, root: Path, **options: Any) -> TaskSet:
        """Written, and read back."""
        return load_layout(self.layout, str(self.write(root)), **options)


def write_file(path: Path, content: Any) -> None:
    """In the format that the name tells."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(content[0]) if content else ["video"])
            writer.writeheader()
            writer.writerows(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def text_of(sample: Sample) -> str:
    """The user's message, `<image>` in the place of images."""
    (message,) = sample.messages
    parts = message["content"]
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)


def images_of(sample: Sample) -> list[str]:
    """File names of the images, in order."""
    return [Path(p["path"]).name for p in sample.messages[0]["content"] if p["type"] == "image"]


def milebench() -> Disk:
    data = [
        {
            "sample_id": 0,
            "task_instruction_id": 1,
            "task_instance": {
                "context": "Before {image#1} after {image#2}. What moved?",
                "images_path": ["a.png", "b.png"],
            },
            "response": "the blue cube moved",
            "image_quantity_level": "Few",
        }
    ]
    meta = {
        "dataset": "CLEVR-Change",
        "num_sample": 1,
        "question_type": "open-ended",
        "task_instruction": ["Unused.", "Compare."],
    }
    choice = deepcopy(data)
    choice[0]["task_instance"]["choice_list"] = ["a red cube", "a blue ball"]  # type: ignore[index]
    choice[0]["response"] = "a blue ball"
    return Disk(
        "milebench",
        {
            "CLEVR-Change/CLEVR-Change.json": {"meta_data": meta, "data": data},
            "StateChange/StateChange.json": {
                "meta_data": {**meta, "question_type": "multi-choice"},
                "data": choice,
            },
        },
        [f"{task}/images/{n}.png" for task in ("CLEVR-Change", "StateChange") for n in "ab"],
    )


def vatex() -> Disk:
    rows = [{"videoID": "abc_000001_000011", "enCap": ["A man runs.", "Someone is running."]}]
    frames = [f"frames/abc_000001_000011/{n}.jpg" for n in range(4)]
    return Disk("vatex", {"vatex_validation_v1.0.json": rows}, frames)


def nextqa() -> Disk:
    common = {"video": "401", "frame_count": "9", "width": "8", "height": "8"}
    options = {f"a{i}": text for i, text in enumerate(("run", "jump", "sit", "eat", "sleep"))}
    mc = {**common, "question": "why", "answer": "2", "qid": "6", "type": "CW", **options}
    oe = {**common, "question": "where", "answer": "park", "qid": "1", "type": "DL"}
    return Disk(
        "nextqa",
        {
            "MC/val.csv": [mc],
            "OE/test.csv": [oe],
            "OE/add_reference_answer_test.json": {"401": {"1": "garden"}},
        },
        ["frames/401/1.png", "frames/401/2.png"],
    )


def videochatgpt() -> Disk:
    one = {"Q": "What happens?", "A": "A man runs.", "video_name": "v_1"}
    two = {"Q1": "Who runs?", "Q2": "Who is it that runs?", "A": "A man.", "video_name": "v_1"}
    files = {"generic_qa.json": [one], "temporal_qa.json": [one], "consistency_qa.json": [two]}
    return Disk("videochatgpt", files, ["Test_Videos/v_1/f1.png"])


def mmniah() -> Disk:
    def row(answer: Any, **meta: Any) -> dict[str, Any]:
        return {
            "id": 0,
            "images_list": ["obelisc/a.jpg", "needle.jpg"],
            "context": "Text <image> more text.",
            "question": "Is it <image>?",
            "answer": answer,
            "meta": {"choices": None, "choices_image_path": None, **meta},
        }

    return Disk(
        "mmniah",
        {
            "annotations/retrieval-text.jsonl": [row("blue cat")],
            "annotations/counting-text.jsonl": [row([1, 0, 2])],
            "annotations/retrieval-image.jsonl": [row(1, choices=["a cat", "a dog"])],
            "annotations/reasoning-image.jsonl": [row(0, choices_image_path=["x.jpg", "y.jpg"])],
        },
        [f"images/{name}.jpg" for name in ("obelisc/a", "needle", "x", "y")],
    )


def videomme() -> Disk:
    row = {
        "video_id": "001",
        "duration": "short",
        "domain": "Knowledge",
        "videoID": "fFjv93",
        "question_id": "001-1",
        "task_type": "Counting",
        "question": "How many?",
        "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "C",
    }
    return Disk("videomme", {"videomme/test-00000-of-00001.parquet": [row]}, ["data/fFjv93/1.png"])


def videomme_json() -> Disk:
    question = {
        "question_id": "001-1",
        "task_type": "Counting",
        "question": "How many?",
        "choices": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
        "answer": "C",
    }
    video = {"video_id": "001", "duration_category": "long", "url": "", "questions": [question]}
    return Disk("videomme", {"Video-MME.json": [video]}, ["frames/001/1.png"])


def docvqa() -> Disk:
    row = {
        "questionId": 49153,
        "question": "What is the date?",
        "question_types": ["handwritten", "form"],
        "image": "documents/p_1.png",
        "docId": 1,
        "answers": ["1/8/93", "January 8, 1993"],
        "data_split": "val",
    }
    top = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": [row]}
    return Disk("docvqa", {"val_v1.0_withQT.json": top}, ["documents/p_1.png"])


def ocrbench() -> Disk:
    plain = {
        "dataset_name": "IIIT5K",
        "id": 2843,
        "image_path": "IIIT5K/test/918_1.png",
        "question": "what is written in the image?",
        "answers": "CENTRE",
        "type": "Regular Text Recognition",
    }
    chart = {**plain, "dataset_name": "ChartQA", "answers": ["2,411", "2411"], "type": "Doc VQA"}
    formula = {**plain, "dataset_name": "HME100k", "answers": r"x ^ { 2 }", "type": "Formulas"}
    images = ["OCRBench_Images/IIIT5K/test/918_1.png"]
    return Disk("ocrbench", {"OCRBench.json": [plain, chart, formula]}, images)


BUILDERS: dict[str, Callable[[], Disk]] = {
    make.__name__: make
    for make in (
        milebench, vatex, nextqa, videochatgpt, mmniah, videomme, videomme_json, docvqa, ocrbench,
    )
}  # fmt: skip
