"""The eleven benchmarks in small, in their published folders, written by the tests themselves.

Every field that is published is there, read or not; the sources stand in docs/reproduce.md.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from PIL import Image

OPEN = ("ALFRED", "CLEVR-Change", "DocVQA", "IEdit")
CHOICE = ("ActionPrediction", "StateChange", "TQA")
NEEDLE = ("TextNeedleInAHaystack",)
IMAGE_TASKS = (*OPEN, *CHOICE, *NEEDLE)
WORDS = "how many discs are red and where is the square that you see first in all of these images"
VIDEO = "Ptf_2VRj-V0_000122_000132"


def write_benchmarks(data: Path, side: int = 168) -> Path:
    """All eleven, up to four questions each, pictures of `side` x `side` pixels."""
    for number, task in enumerate(IMAGE_TASKS):
        _milebench(data / "MileBench" / task, task, number, side)
    _vatex(data / "VATEX", side)
    _nextoe(data / "NExT-OE", side)
    _videochatgpt(data / "Video-ChatGPT", side)
    return data


def picture(path: Path, number: int, side: int) -> None:
    """A picture with a square somewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), (40 + 30 * (number % 7), 90, 200 - 20 * (number % 9)))
    at = 8 * (number % 6)
    image.paste((250, 20 * (number % 11), 30), (at, at, at + side // 3, at + side // 3))
    image.save(path)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _milebench(folder: Path, task: str, number: int, side: int) -> None:
    rows = []
    for sample in range(2 if task == OPEN[0] else 1):
        names = [f"{sample}_{i}.png" for i in range(4)]
        for i, name in enumerate(names):
            picture(folder / "images" / name, number + 3 * sample + i, side)
        instance: dict[str, Any] = {
            "context": f"{{image#1}} and then {{image#2}}, {{image#3}}{{image#4}}. {WORDS}?",
            "images_path": names,
            "combined_1_images": [f"combined_{sample}.png"],
        }
        if task in CHOICE:
            instance["choice_list"] = ["a red disc", "a blue square"]
        answer = "a blue square" if task in CHOICE else f"square {sample}"
        rows.append(
            {
                "sample_id": sample,
                "task_instruction_id": sample % 2,
                "task_instance": instance,
                "response": "7" if task in NEEDLE else answer,
                "image_quantity_level": "Few",
            }
        )
    meta = {
        "dataset": task, "split": "test", "num_sample": len(rows),
        "task_instruction": ["Look at the images.", "Answer the question."],
        "question_type": "multi-choice" if task in CHOICE else "open-ended",
    }  # fmt: skip
    _json(folder / f"{task}.json", {"meta_data": meta, "data": rows})


def _frames(folder: Path, count: int, seed: int, side: int) -> None:
    for number in range(count):
        picture(folder / f"{number:06d}.jpg", number + seed, side)


def _vatex(folder: Path, side: int) -> None:
    rows = []
    for number, name in enumerate((VIDEO, "abc_000001_000011")):
        captions = [f"A man runs after {n + number} dogs." for n in range(10)]
        rows.append({"videoID": name, "enCap": captions})
        _frames(folder / "frames" / name, 5, number, side)
    _json(folder / "vatex_public_test_english_v1.1.json", rows)


def _nextoe(folder: Path, side: int) -> None:
    header = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
    rows = [
        ["4924794333", "1058", "640", "360", f"is it {WORDS}", "no", "4", "DB"],
        ["3747890905", "1152", "640", "360", f"how {WORDS}", "uses the spoon", "8", "CH"],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    added = {row[0]: {row[6]: "with a spoon"} for row in rows}
    _json(folder / "add_reference_answer_test.json", added)
    for number, row in enumerate(rows):
        _frames(folder / "frames" / row[0], 5, number, side)


def _videochatgpt(folder: Path, side: int) -> None:
    one = {"Q": f"What happens, {WORDS}?", "A": "A man runs.", "video_name": "v_p1QGn0IzfW0"}
    both = {key: f"{WORDS}, {key}?" for key in ("Q1", "Q2")}
    two = {**both, "A": "A man.", "video_name": "v_p1QGn0IzfW0"}
    for name, row in (("generic", one), ("temporal", one), ("consistency", two)):
        _json(folder / "Benchmarking_QA" / f"{name}_qa.json", [row])
    _frames(folder / "Test_Videos" / "v_p1QGn0IzfW0", 5, 5, side)
