"""Where tasks come from: names, sample folders, published layouts; and the command on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli import run
from hkvprof.errors import UsageError
from hkvprof.evaluate.tasks import load_tasks
from tests.evaluate.datasets.disk import docvqa, images_of, vatex


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


def test_layouts_are_named_before_a_colon(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    root = docvqa().write(tmp_path)
    tasks = load_tasks(f"docvqa:{root}", tiny[1], per_task=1)
    assert (tasks.name, len(tasks.samples)) == (f"docvqa:{root}", 1)
    disk = vatex()
    disk.images = [f"frames/abc_000001_000011/{number}.png" for number in range(30)]
    root = disk.write(tmp_path / "vatex")
    for options, frames in (({}, 16), ({"max_frames": 3}, 3)):
        (sample,) = load_tasks(f"vatex:{root}", tiny[1], per_task=1, **options).samples
        assert len(images_of(sample)) == frames


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("imagenet:/data", "LAYOUT:PATH with a layout among milebench, vatex, nextqa"),
        ("docvqa", "LAYOUT:PATH"),
        ("docvqa:", "no dataset at ''"),
        ("docvqa:/nowhere", "no dataset at '/nowhere'"),
    ],
)
def test_unknown_layouts_and_paths_are_refused(name: str, says: str, tiny: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match=says):
        load_tasks(name, tiny[1], per_task=1)


def test_a_number_of_samples_is_for_what_lies_on_disk(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = [
        {"id": str(n), "task": f"t{n % 2}", "reply": "x",
         "messages": [{"role": "user", "content": "?"}]}
        for n in range(10)
    ]  # fmt: skip
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    chosen = load_tasks(str(tmp_path), tiny[1], per_task=1, max_samples=4).samples
    assert sorted(sample.task for sample in chosen) == ["t0", "t0", "t1", "t1"]
    with pytest.raises(UsageError, match="takes --per-task, not --max-samples"):
        load_tasks("tinyvl", tiny[1], per_task=1, max_samples=4)
    with pytest.raises(UsageError, match="expected at least 1"):
        load_tasks(str(tmp_path), tiny[1], per_task=1, max_samples=0)


def test_the_command_takes_a_layout(
    tiny: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = vatex()
    disk.images = [f"frames/abc_000001_000011/{number}.png" for number in range(20)]
    root = disk.write(tmp_path / "data")
    profile = uniform_profile(tiny[0], "static", budget=0.4).save(tmp_path / "p.safetensors")
    command = ["eval", "--model", "tinyvl", "--dtype", "float32", "--device", "cpu",
               "--profile", str(profile), "--tasks", f"vatex:{root}", "--budget", "0.5",
               "--max-frames", "12", "--max-samples", "1", "-o", str(tmp_path / "out")]  # fmt: skip
    assert run(command) == 0, capsys.readouterr().err
    assert "captioning" in capsys.readouterr().out
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["method"] for a in answers] == ["full", "full", "hkvprof", "hkvprof"]
    assert [a["regime"] for a in answers] == ["inside", "after"] * 2
    assert {a["metric"] for a in answers} == {"rouge_l"}
    assert all(0 <= a["score"] <= 1 for a in answers)
    assert {a["expected"] for a in answers} == {"A man runs."}


def test_damaged_datasets_are_one_line(
    tiny: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = vatex()
    disk.images.clear()
    root = disk.write(tmp_path / "data")
    profile = uniform_profile(tiny[0], "static", budget=0.4).save(tmp_path / "p.safetensors")
    command = ["eval", "--model", "tinyvl", "--profile", str(profile), "--tasks", f"vatex:{root}"]
    assert run(command) == 1
    err = capsys.readouterr().err
    assert "field 'videoID': no frames of video abc_000001_000011" in err.splitlines()[-1]
