"""`hkvprof plan` as a user meets it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hkvprof.cli import run
from hkvprof.profile.record import Profile
from hkvprof.profile.sizes import KEY, ModelSizes
from tests.profiles import GOLDEN, make_profile, with_certificate
from tests.report.evaluations import write_evaluation

SMOLLM2 = Path(__file__).parents[2] / "profiles" / "smollm2.hkv.safetensors"


def ask(capsys: pytest.CaptureFixture[str], *more: str, profile: Path = GOLDEN) -> str:
    assert run(["plan", str(profile), *more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_budgets_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    out = ask(capsys, "--context", "4096")
    assert out.startswith("A prompt of 4,096 tokens needs 768 KiB of dense keys and values")
    assert out.isascii()
    assert [line.split()[0] for line in out.splitlines()[3:7]] == ["0.05", "0.10", "0.20", "0.50"]
    assert "At 10% of dense bytes:" in out


def test_the_issues_question(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--gpu", "24GiB", "--weights", "15.2GiB", "--context", "8192", "--batch", "16"]
    out = ask(capsys, *line, profile=SMOLLM2)
    assert out.startswith(
        "16 prompts of 8,192 tokens need 2.81 GiB of dense keys and values in bfloat16; with 15.2 "
        "GiB of weights and 1 GiB in reserve that is 19 GiB of 24 GiB: it fits."
    )
    record = json.loads(ask(capsys, *line, "--json", profile=SMOLLM2))
    assert record["dense_bytes"] == 16 * 8192 * 23040
    assert record["fit"]["dense_fits"] is True
    assert record["fit"]["left_bytes"] == 24 * 2**30 - int(15.2 * 2**30) - 2**30
    assert len(record["plan"]["layers"]) == 30


def test_the_largest_budget_that_fits_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--gpu", "3GiB", "--weights", "257MiB", "--batch", "16"]
    record = json.loads(ask(capsys, *line, "--json", profile=SMOLLM2))
    best = record["fit"]["largest_budget"]
    assert best["peak_bytes"] <= record["fit"]["left_bytes"] < record["dense_bytes"]
    assert record["plan"]["share"] == best["share"]
    out = ask(capsys, *line, profile=SMOLLM2)
    assert f"The largest budget that fits is {100 * best['share']:.4g}%" in out
    drawn = json.loads(ask(capsys, *line, "--json", "--budget", "10%,0.3", profile=SMOLLM2))
    assert drawn["plan"]["share"] == 0.1
    assert [row["share"] for row in drawn["budgets"]] == [0.1, 0.3]


def test_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        json.loads(ask(capsys, "--json", "--dtype", dtype))["dense_bytes"]
        for dtype in ("float16", "bfloat16", "float32")
    ]
    assert sizes == [32768 * 192, 32768 * 192, 32768 * 384]


def test_short_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """The golden profile keeps 4 + 8 + 1 tokens: of 20, a half is less."""
    out = ask(capsys, "--context", "20", "--budget", "0.5,0.8")
    assert "Prompts below 256 tokens stay dense at run time" in out
    assert "0.5: budget 0.5 is too small" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--gpu 24GiB", "--gpu needs --weights SIZE, which this profile does not tell"),
        ("--weights 15GiB", "--weights without --gpu"),
        ("--reserve 0", "--reserve without --gpu"),
        ("--gpu 24 --weights 15GiB", "--gpu is a size in bytes, found '24'"),
        ("--gpu 24GiB --weights big", "--weights is a size in bytes, found 'big'"),
        ("--gpu 24GiB --weights 1GiB --reserve -1", "--reserve is a size in bytes, found '-1'"),
        ("--gpu 0 --weights 0", "--gpu 0 holds nothing"),
        ("--dtype int8", "--dtype 'int8' is not known here: expected one of bfloat16, "),
        ("--budget 2TB", "budget '2TB' is not understood"),
        ("--budget ,", "--budget ',' lists nothing"),
        ("--budget 0.1 --context 20", "budget 0.1 is too small"),
        ("--context 0", "--context"),
        ("--batch 0", "--batch"),
    ],
)
def test_wrong_usage_is_one_line(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert run(["plan", str(GOLDEN), *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_wrong_usage_comes_before_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "none", "--weights", "24GiB"]) == 2
    assert run(["plan", "none", "--gpu", "24GiB"]) == 1
    assert "no profile at none" in capsys.readouterr().err


def test_profiles_that_measured_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_profile("uniform").save(tmp_path / "p.safetensors")
    line = ["--context", "4096", "--gpu", "1.001GiB", "--weights", "1MiB", "--batch", "8"]
    out = ask(capsys, *line, "--budget", "0.5", profile=path)
    assert "unknown" in out


def told(profile: Profile, path: Path, longest: int | None = 4096) -> Path:
    """The profile, saved, with the sizes of a model of a million numbers."""
    sizes = ModelSizes(2_000_000, 4_000_000, longest).to_json()
    made = replace(profile, provenance={**profile.provenance, KEY: sizes})
    return made.save(path / "told.safetensors")


def test_weights_and_longest_context_are_the_profile_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = told(make_profile(), tmp_path)
    record = json.loads(ask(capsys, "--gpu", "1GiB", "--reserve", "0", "--json", profile=path))
    assert record["tokens"] == 4096, "the usual 32,768 are more than the model has"
    assert record["fit"]["weights_bytes"] == 2_000_000
    assert record["fit"]["longest_context"] == record["fit"]["dense_longest_context"] == 4096
    whole = ["--gpu", "1GiB", "--json", "--dtype", "fp32"]
    assert json.loads(ask(capsys, *whole, profile=path))["fit"]["weights_bytes"] == 4_000_000
    given = [*whole, "--weights", "3MiB"]
    assert json.loads(ask(capsys, *given, profile=path))["fit"]["weights_bytes"] == 3 * 2**20
    mute = told(make_profile(), tmp_path, None)
    assert json.loads(ask(capsys, "--gpu", "1GiB", "--json", profile=mute))["tokens"] == 32768


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_contexts_that_the_model_does_not_have_are_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = told(make_profile(), tmp_path)
    assert run([verb, str(path), "--context", "4096"]) == 0
    capsys.readouterr()
    assert run([verb, str(path), "--context", "4097"]) == 2
    assert capsys.readouterr().err == (
        "error: --context 4097: this model's longest context has 4,096 tokens: give --context "
        "4096 or less\n"
    )


def test_a_certificate_speaks_in_place_of_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_certificate(make_profile()).save(tmp_path / "p.safetensors")
    line = ["--context", "4096", "--fetch", "unlimited", "--budget", "0.5,0.3,0.05,0.04"]
    out = ask(capsys, *line, "--gpu", "2GiB", "--weights", "0", profile=path)
    assert "loss" not in out.partition("Layers, times the mean")[0]
    rows = [row for row in out.splitlines() if row.startswith("0.")]
    assert [re.split(" {2,}", row.strip())[-2] for row in rows] == [
        "0 of 150 worse", "at 20%: 0 of 150 worse", "1 of 75 worse", "not measured",
    ]  # fmt: skip
    assert "quality: of held-out, held out, the samples one of whose answers is worse" in out
    assert "at 20%, with 95% confidence, at most 2% of samples" in out
    record = json.loads(ask(capsys, *line, "--json", profile=path))
    assert record["budgets"][1]["quality"] == "at 20%: 0 of 150 worse"
    assert [level["share"] for level in record["quality"]["levels"]] == [0.05, 0.2, 0.5]
    other = ask(capsys, "--context", "4096", "--fetch", "0", profile=path)
    assert "expected loss" in other
    assert "quality: measured with other reads than these (0 of dense bytes a step): unl" in other


def test_an_evaluation_speaks_in_place_of_the_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_certificate(make_profile()).save(tmp_path / "p.safetensors")
    write_evaluation(tmp_path / "out", path)
    line = ["--context", "4096", "--eval", str(tmp_path / "out"), "--budget", "0.2,0.1"]
    out = ask(capsys, *line, profile=path)
    assert "-50.0 points [-100.0, 0.0]" in out
    assert "not measured" in out
    assert run(["plan", str(GOLDEN), *line]) == 2
    assert "holds an evaluation of another profile than" in capsys.readouterr().err
