"""The whole reproduction: a tiny Qwen2.5-VL on all eleven benchmarks in small.

Where torchvision works, videos are the model's own video input, elsewhere images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import transformers

import hkvprof
from hkvprof.cli import run
from hkvprof.evaluate.journal import read_answers
from hkvprof.evaluate.reproduce import benchmarks
from hkvprof.evaluate.reproduce import run as running
from hkvprof.evaluate.reproduce.published import BUDGETS, METHODS
from hkvprof.evaluate.scorers import wups
from hkvprof.models.sources import TINYVL_FOLDER
from hkvprof.models.vision import torchvision_works
from hkvprof.samples.read import Sample
from tests.evaluate.reproduce.folders import IMAGE_TASKS, VIDEO, write_benchmarks
from tests.evaluate.reproduce.judges import LoopbackJudge
from tests.models.conversations import picture, user

ROWS = 1 + len(BUDGETS) * (1 + len(METHODS))
"""The full cache; the profile and every method at every budget."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL's own class with two layers of random weights, and a profile of it."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.from_pretrained(TINYVL_FOLDER)
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for file in TINYVL_FOLDER.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    network, processor = hkvprof.load_model(str(folder), dtype="float32", device="cpu")
    asked = [user(picture(168, 168, n), "how many disc") for n in range(2)]
    samples = [Sample(str(n), "t", (message,), reply="two") for n, message in enumerate(asked)]
    hkvprof.calibrate(network, processor, samples).save(folder / "profile.safetensors")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The eleven benchmarks."""
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers of three tokens; words are their own lemmas, and only equal ones are near."""
    monkeypatch.setattr(running, "STEPS", 2)
    for name in ("VATEX", "NEXT_OE", "VIDEO_CHATGPT"):
        one = getattr(benchmarks, name)
        layout = replace(one.layout, max_new_tokens=3)
        monkeypatch.setattr(benchmarks, name, replace(one, layout=layout))
    mine = replace(benchmarks.milebench.PUBLISHED, max_new_tokens=3)
    monkeypatch.setattr(benchmarks.milebench, "PUBLISHED", mine)
    monkeypatch.setattr(wups, "_nltk", lambda: None)
    monkeypatch.setattr(wups, "_lemmas", str.split)
    monkeypatch.setattr(wups, "_first_sense", lambda word: None)
    return iter([None])


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(model), "--profile", str(model / "profile.safetensors")]
    where = ["--device", "cpu", "--dtype", "fp32", "-o", str(out)]
    shown = () if torchvision_works() else ("--frames",)
    return ["reproduce", "hybridkv", str(data), *given, *where, *shown, *more]


def test_all_eleven(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = command(model, data, out)
    assert run([*line, "--shard", "1/2"]) == 0, capsys.readouterr().err
    assert "not complete yet: " in capsys.readouterr().out
    with LoopbackJudge(score=4) as judge:
        asked = ["--judge", judge.url, "--judge-model", "tiny"]
        assert run([*line, "--shard", "2/2", *asked]) == 0, capsys.readouterr().err
    answers = {folder.name: read_answers(folder) for folder in out.iterdir() if folder.is_dir()}
    assert len(answers) == 11
    conditions = json.loads((out / "vatex" / "conditions.json").read_text())
    assert conditions["as_video"] == torchvision_works()
    questions = {name: len({a.sample for a in given}) for name, given in answers.items()}
    two = ("milebench-alfred", "vatex", "next-oe")
    assert questions == {n: 4 if n == "video-chatgpt" else 1 + (n in two) for n in answers}
    for name, given in answers.items():
        assert len(given) == ROWS * questions[name]
        assert all(a.resident_bytes < a.dense_bytes for a in given if a.budget)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    by = {(s["benchmark"], s["method"], s["budget"]): s for s in scores}
    assert len(by) == ROWS * 12, "eleven, and the mean of the images"
    full = [by[f"MileBench/{task}", "full", ""]["value"] for task in IMAGE_TASKS]
    assert by["images", "full", ""]["value"] == pytest.approx(fmean(full))
    assert by["Video-ChatGPT", "hkvprof", "0.10"]["value"] == 4
    assert by["Video-ChatGPT", "hkvprof", "0.10"]["share"] < 0.105
    report = (out / "report.md").read_text()
    assert "66.68" not in report, "published figures are of another model"
    assert "| MileBench/ALFRED | hybridkv | 0.20 |" in report

    judge_asked = len(judge.asked)
    with LoopbackJudge(score=1) as judge:
        again = ["--judge", judge.url, "--judge-model", "tiny"]
        assert run([*line, *again]) == 0, capsys.readouterr().err
    assert judge_asked
    assert judge.asked == [], "what is judged is not judged again"
    kept = {folder.name: read_answers(folder) for folder in out.iterdir() if folder.is_dir()}
    assert sum(map(len, kept.values())) == sum(map(len, answers.values())), "nothing asked anew"


def test_missing_files_are_listed_before_anything_loads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    (broken / "MileBench/ALFRED/images/0_1.png").unlink()
    (broken / "MileBench/ALFRED/images/1_1.png").unlink()
    shutil.rmtree(broken / "VATEX/frames" / VIDEO)
    (broken / "VATEX/frames" / f"{VIDEO}.mp4").touch()
    (broken / "Video-ChatGPT/Benchmarking_QA/generic_qa.json").write_text("[")
    shutil.rmtree(broken / "NExT-OE")
    line = ["reproduce", "hybridkv", str(broken), "--model", "no/such-model"]
    assert run([*line, "--check"]) == 1
    said = capsys.readouterr().out
    assert "MileBench/ALFRED: 0 of 2 questions can be asked" in said
    for name in ("0_1.png", "1_1.png"):
        assert f"missing: no image file at {broken}/MileBench/ALFRED/images/{name}" in said
    assert "VATEX: 1 of 2 questions can be asked" in said
    assert f"{VIDEO}.mp4 is a video file, and hkvprof takes frames" in said
    assert "ffmpeg -i" in said
    assert f"missing: no folder {broken}/NExT-OE" in said
    assert "generic_qa.json: invalid JSON" in said
    assert "missing: no profile such-model.profile.safetensors" in said

    assert run([*line, "--check", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    whole = [one["benchmark"] for one in told["benchmarks"] if not one["missing"]]
    assert whole == [f"MileBench/{task}" for task in sorted(IMAGE_TASKS) if task != "ALFRED"]

    assert run(line) == 2, "and without --check nothing loads either"
    assert "files are missing: MileBench/ALFRED: no image file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--only", "vatex,nothing"], "no benchmark nothing: expected some of MileBench/ALFRED, "),
        (["--judge", "gpt-4o"], "--judge gpt-4o: expected an address"),
        (["--shard", "3/2"], "--shard 3/2: expected I/N"),
        (["--image-tasks", "Alfred"], "MileBench/Alfred: no folder "),
        (["--only", "tqa"], "make one on samples that are none of these benchmarks', hkvprof "
         "calibrate --model no/model --data"),
    ],
)  # fmt: skip
def test_wrong_usage(
    more: list[str], says: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reproduce", "hybridkv", str(data), "--model", "no/model", *more]) == 2
    assert says in capsys.readouterr().err


def test_videos_need_a_processor_that_takes_them(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torchvision_works():
        pytest.skip("torchvision works here: the processor takes videos")
    line = [
        part for part in command(model, data, tmp_path, "--only", "vatex") if part != "--frames"
    ]
    assert run(line) == 2
    said = capsys.readouterr().err
    assert "video input needs torchvision" in said
    assert "(--frames does)" in said
    assert "loading" not in said
