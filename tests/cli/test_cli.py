"""The command line as a user meets it, without running a model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hkvprof
from hkvprof import load_profile
from hkvprof.cli import app, run
from hkvprof.cli.output import check_output, default_profile_path
from hkvprof.errors import UsageError
from hkvprof.models.coverage import COVERAGE
from tests.profiles import GOLDEN, make_profile

DATA = Path(__file__).parents[2] / "calibration" / "mini"
VERBS = ("bench", "calibrate", "certify", "eval", "inspect", "models", "plan")


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"  hkvprof {verb}" in result.output


def test_global_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"hkvprof {hkvprof.__version__}\n"


@pytest.mark.parametrize(
    "line",
    ["", "bogus", "calibrate", "calibrate --model x", "inspect", "inspect a b",
     "inspect p --layer x", "inspect p --context 0", "models --nope", "plan", "plan p --batch x",
     "calibrate --model x --data y --recipe z",
     "calibrate --model x --data y --max-samples 0", "calibrate --model x --data y --on-error no"],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_two(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert run(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "--help" in err


# models, inspect


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in out
    assert all(row.model_class in out for row in COVERAGE.values())
    assert run(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"tinyvl", "smollm2", "qwen2.5-vl-7b"} <= {row["name"] for row in found["aliases"]}
    assert found["architectures"] == [asdict(row) for row in COVERAGE.values()]


def test_inspect_starts_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(GOLDEN)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("67% of KV heads static; at 10% a 32,768-token prompt keeps ")
    assert out.isascii()
    assert "\x1b" not in out


def test_inspect_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(GOLDEN), "--json", "--context", "4096"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["memory"]["tokens"] == 4096
    assert summary["recipe"] == "measured"
    assert run(["inspect", str(GOLDEN), "--json", "--layer", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["heads"]) == 2


def test_inspect_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(GOLDEN), "--layer", "1"]) == 0
    assert "dynamic-mean-chunk16" in capsys.readouterr().out
    assert run(["inspect", str(GOLDEN), "--layer", "3"]) == 2
    assert "no layer 3: expected 0 to 2" in capsys.readouterr().err


def test_inspect_what_is_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise").write_bytes(b"\0" * 100)
    for path in (tmp_path / "noise", tmp_path / "none", tmp_path):
        assert run(["inspect", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_inspect_of_a_context_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(GOLDEN), "--context", "20"]) == 0
    assert "10% is too little for a 20-token prompt" in capsys.readouterr().out


def test_debug_may_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "inspect", "none"], ["inspect", "none", "--debug"]):
        assert run(arguments) == 1
        assert "Traceback" in capsys.readouterr().err


# calibrate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Calls of a calibration that runs no model; the working folder is empty."""
    made: list[dict[str, Any]] = []

    def calibrate(model: Any, processor: Any, samples: Any, recipe: Any, **options: Any) -> Any:
        made.append({"model": model, "samples": samples, "recipe": recipe, **options})
        list(options["track"](iter(samples), "measuring", len(samples)))
        return make_profile()

    import hkvprof.calibration.calibrate
    import hkvprof.models

    monkeypatch.setattr(hkvprof.calibration.calibrate, "calibrate", calibrate)
    monkeypatch.setattr(hkvprof.models, "load_model", lambda name, **_: (name, "processor"))
    monkeypatch.setattr("hkvprof.models.load.emulates_bfloat16", lambda _: False)
    monkeypatch.setattr("hkvprof.cli.output.quiet_transformers", lambda: None)
    monkeypatch.chdir(tmp_path)
    return made


def command(*more: str) -> list[str]:
    return ["calibrate", "--model", "tinyvl", "--data", str(DATA), "--max-samples", "8", *more]


def test_calibrate_writes_and_says_what_is_next(
    calls: list, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = "--recipe paper --theta 0.8 --coefficient 2 --chunk 32 --budget 20% --seed 7"
    assert run(command(*options.split())) == 0
    out, err = capsys.readouterr()
    assert "67% of KV heads static" in out
    assert "Next:    hkvprof inspect tinyvl.profile.safetensors" in out
    assert "measuring: 8/8" in err
    (call,) = calls
    recipe = call["recipe"]
    assert (recipe.name, recipe.theta, recipe.budget, recipe.seed) == ("paper", 0.8, 0.2, 7)
    constants = [recipe.coefficient, recipe.chunk, recipe.kappa, recipe.text_prior]
    assert constants == [2.0, 32, 0.1, 0.5]
    assert len(call["samples"]) == 8
    profile = load_profile(tmp_path / "tinyvl.profile.safetensors")
    assert profile.provenance["data"] == str(DATA)
    assert len(profile.provenance["data_digest"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["tinyvl.profile.safetensors"]


def test_calibrate_never_overwrites_unasked(
    calls: list, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "p.safetensors"
    assert run(command("-o", str(target))) == 0
    target.write_bytes(b"mine")
    assert run(command("-o", str(target))) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert len(calls) == 1
    assert run(command("-o", str(target), "--force")) == 0
    assert load_profile(target).grid.layers == 3


def test_skipped_samples_are_counted(
    calls: list, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = {"id": "a", "task": "t", "messages": [{"role": "user", "content": "hi"}]}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(line) + "\n{broken\n")
    arguments = ["calibrate", "--model", "tinyvl", "--data", str(data), "-o", "p"]
    assert run(arguments) == 1
    assert "data.jsonl:2: expected one JSON object" in capsys.readouterr().err
    assert calls == []
    assert run([*arguments, "--on-error", "skip"]) == 0
    assert "skipped: " in capsys.readouterr().err
    assert load_profile("p").provenance["skipped"] == 2  # one here, one of the model's


@pytest.mark.parametrize(
    ("more", "code", "expected"),
    [
        (["--budget", "2GiB"], 2, "is not a share"),
        (["--budget", "much"], 2, "not understood"),
        (["--recipe", "paper", "--theta", "0"], 2, "theta must lie in (0, 1], found 0"),
        (["--recipe", "paper", "--theta", "nan"], 2, "theta must lie in (0, 1], found nan"),
        (["--recipe", "paper", "--coefficient", "0"], 2, "coefficient must lie in"),
        (["--recipe", "paper", "--chunk", "0"], 2, "chunk is 0"),
        (["--recipe", "paper", "--text-prior", "2"], 2, "text_prior is 2"),
        (["--recipe", "paper", "--replies", "own"], 2, "paper judges no replies"),
        (["--theta", "0.8", "--chunk", "32"], 2, "chunk, theta belong to recipe 'paper'"),
        (["--device", "cpu", "--device-map", "auto"], 2, "exclude each other"),
        (["-o", "folder"], 2, "is a folder"),
        (["-o", "file/p"], 2, "cannot write into"),
        (["--data", "none.jsonl"], 2, "no such folder or file: none.jsonl"),
        (["--data", "folder"], 2, "holds no samples.jsonl"),
        (["--data", "empty.jsonl"], 1, "holds no usable sample"),
    ],
)
def test_bad_input_stops_before_the_model(
    calls: list,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    code: int,
    expected: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "empty.jsonl").touch()
    assert run(command(*more)) == code
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert calls == []
    assert len(list(tmp_path.iterdir())) == 3


def failing(error: BaseException) -> Callable[..., Any]:
    def calibrate(*_: object, **__: object) -> None:
        raise error

    return calibrate


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt(), 130, "interrupted; nothing was written"),
     (MemoryError(), 1, "error: out of memory")],
)  # fmt: skip
def test_nothing_is_left_when_calibration_stops(
    calls: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr("hkvprof.calibration.calibrate.calibrate", failing(error))
    assert run(command()) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(
    calls: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(command()) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "name"),
    [("tinyvl", "tinyvl"), ("Qwen/Qwen2-VL-2B", "Qwen2-VL-2B"), ("/a/b/my model/", "my-model"),
     ("..", "model"), ("/", "model"), ("./x:y", "x-y")],
)  # fmt: skip
def test_default_names_are_safe(model: str, name: str) -> None:
    assert default_profile_path(model) == Path(f"{name}.profile.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write into"):
        check_output(tmp_path / "p", force=False)


# The real program


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    script = shutil.which("hkvprof", path=str(Path(sys.executable).parent))
    assert script, "hkvprof is not installed beside this Python"
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, timeout=600, check=False, **options
    )


def test_the_program_fails_in_one_line(tmp_path: Path) -> None:
    result = program("inspect", "none.safetensors", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no profile at none.safetensors")
    assert result.stderr.count("\n") == 1
    result = program("calibrate", "--model", "tinyvl", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--data" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_program_shows_a_profile_in_any_locale() -> None:
    result = program("inspect", str(GOLDEN), env={**os.environ, "LC_ALL": "C", "TERM": "dumb"})
    assert result.returncode == 0
    assert result.stdout.isascii()
    assert result.stderr == ""


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        script = shutil.which("hkvprof", path=str(Path(sys.executable).parent))
        result = subprocess.run(
            [str(script), "models"], stdout=writer, stderr=subprocess.PIPE, timeout=600, check=False
        )
    finally:
        os.close(writer)
    assert result.stderr == b""
