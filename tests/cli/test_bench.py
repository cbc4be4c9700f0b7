"""`hkvprof bench`, on the embedded model and on a small shape."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from hkvprof.cli import run
from hkvprof.models import shapes
from tests.profiles import GOLDEN, make_profile

PROFILE = str(Path(__file__).parents[2] / "profiles" / "tinyvl.hkv.safetensors")
SHORT = ["--new-tokens", "36", "--rounds", "4"]
TINY = ["bench", "--model", "tinyvl", "--device", "cpu", "--profile", PROFILE, *SHORT]


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    whole = shapes.SHAPES["qwen2.5-vl-7b"]
    small = replace(whole, hidden=28 * 8, head_dim=8, mlp=64, mrope_section=(1, 1, 2), context=512)
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    return "small"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert "hkvprof bench --shape qwen2.5-vl-7b" in out


def test_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    files = ["--json", str(tmp_path / "new" / "b.json"), "--plot", str(tmp_path / "b.svg")]
    assert run([*TINY, "--context", "256", "--budget", "0.2", "--threads", "1", *files]) == 0
    out, err = capsys.readouterr()
    assert torch.get_num_threads() == threads
    assert "256 tokens x 1: 5 methods" in err
    data = json.loads((tmp_path / "new" / "b.json").read_text())
    (context,) = data["contexts"]
    rows = {row["method"]: row for row in context["rows"]}
    assert list(rows) == [
        "dense", "dense, preallocated", "static only, 0.2", "dynamic only, 0.2", "profile, 0.2",
    ]  # fmt: skip
    assert all(row["method"] in out for row in context["rows"])
    assert rows["profile, 0.2"]["dense_share"] <= 0.21
    assert rows["static only, 0.2"]["host_bytes"] == 0
    assert rows["dynamic only, 0.2"]["host_bytes"] > 0
    assert f"{rows['profile, 0.2']['step_ms']:.3f}" in out
    assert (data["regime"]["model"], data["regime"]["threads"]) == ("tinyvl", 1)
    drawn = ElementTree.parse(tmp_path / "b.svg").getroot().iter("{http://www.w3.org/2000/svg}g")
    curves = [group for group in drawn if group.get("id", "").startswith("curve ")]
    assert len(curves) == 2 * len(rows)


def test_a_shape_needs_no_file_and_prints_json_alone(
    small_shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bench", "--shape", small_shape, "--layers", "2", "--device", "cpu", "--batch", "2"]
    assert run([*line, *SHORT, "--context", "256,400", "--budget", "0.25", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [context["tokens"] for context in data["contexts"]] == [256, 400]
    assert {row["kind"] for row in data["contexts"][0]["rows"]} == {
        "dense", "preallocated", "static", "dynamic", "profile",
    }  # fmt: skip
    assert data["regime"]["dtype"] == "bfloat16"
    assert data["regime"]["profile"] == "uniform"


def test_the_crossover(small_shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "--shape", small_shape, "--layers", "1", "--device", "cpu", "--crossover"]
    assert run([*line, *SHORT, "--budget", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "crossover at budget 0.25: " in out
    assert "64 tokens (random token ids)" in out
    assert "512 tokens (random token ids)" in out
    assert "1,024 tokens" not in out
    assert "preallocated" not in out


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [(["--context", "9000"], 2, "9000 tokens is over the model's limit of 8192"),
     (["--context", "20", "--budget", "0.9"], 2, "at least --context"),
     (["--context", "256", "--budget", "0.01"], 2, "at a context of 256 tokens"),
     (["--device", "nowhere"], 2, "device 'nowhere' cannot be used"),
     (["--dtype", "int4"], 2, "unknown dtype")],
)  # fmt: skip
def test_what_the_model_cannot(
    capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    assert run([*TINY, *more]) == code
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [("", 2, "give --model or --shape"), ("--model a --shape b", 2, "one of them"),
     ("--model tinyvl", 2, "needs --profile"), ("--shape b --profile p", 2, "of its own"),
     ("--model tinyvl --profile none", 1, "no profile at none"),
     ("--model tinyvl --profile p --budget 1.0", 2, "compresses nothing"),
     ("--model tinyvl --profile p --budget 0.1,10%", 2, "a budget twice"),
     ("--model tinyvl --profile p --context 0", 2, "expected prompt lengths"),
     ("--model tinyvl --profile p --context 1k", 2, "expected prompt lengths"),
     ("--model tinyvl --profile p --crossover --context 64", 2, "its own contexts"),
     ("--model tinyvl --profile p --new-tokens 8", 2, "timed steps"),
     ("--model tinyvl --profile p --json folder", 2, "give --json a file"),
     ("--model tinyvl --profile p --plot file/x.svg", 2, "give --plot a file"),
     ("--shape none", 2, "unknown shape"), ("--shape none --methods odd", 2, "unknown method")],
)  # fmt: skip
def test_wrong_usage_is_one_line_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    words: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("hkvprof.models.load_model", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert run(["bench", *line.split()]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_a_profile_of_another_model_or_without_the_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["bench", "--model", "tinyvl", "--device", "cpu", "--profile", str(GOLDEN), *SHORT]
    assert run([*other, "--context", "1024", "--budget", "0.25"]) == 1
    assert "made for another model" in capsys.readouterr().err.splitlines()[-1]
    uniform = [*other[:5], "--profile", str(tmp_path / "p"), "--methods", "dynamic"]
    make_profile("uniform").save(tmp_path / "p")
    assert run(uniform) == 2
    assert "the types of a uniform profile are fixed" in capsys.readouterr().err.splitlines()[-1]


def test_a_shape_on_a_gpu_is_the_gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options arrive as `python -m hkvprof.bench` has them; unsaid ones are its defaults."""
    from hkvprof.bench import __main__ as entry
    from hkvprof.bench.filled import FilledSetup

    given: list[Any] = []
    monkeypatch.setattr(entry, "run", lambda setup, path: given.append((setup, path)))
    command = ["bench", "--device", "cuda", "--shape", "qwen2.5-vl-7b"]
    assert run([*command]) == 0
    more = ["--context", "8192,32768", "--batch", "1,8", "--budget", "0.1", "--layers", "2"]
    assert run([*command, *more, "--new-tokens", "8", "--rounds", "2", "--json", "-"]) == 0
    assert given[0] == (FilledSetup(), None)
    assert given[1] == (
        FilledSetup(
            contexts=(8192, 32768), batches=(1, 8), budgets=("0.1",), layers=2, steps=8, rounds=2
        ),
        "-",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--methods", "static"], "--methods is not for --shape on a GPU"),
        (["--device", "cuda", "--plot", "a.svg"], "--plot is not for --shape on a GPU"),
        (["--device", "cuda", "--batch", "1;8"], "--batch 1;8: expected numbers"),
        (["--device", "cuda", "--budget", "2GiB"], "budget 2GiB: expected shares"),
        (["--device", "cpu", "--batch", "1,8"], "--batch 1,8: expected a number of rows such as 1"),
        (["--device", "cpu", "--batch", "0"], "--batch 0: expected a number of rows"),
    ],
)
def test_options_of_the_other_benchmark_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--shape", "qwen2.5-vl-7b", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
