"""`hkvprof certify` as a user meets it: refusals before a model is loaded, exit codes, files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hkvprof import load_profile
from hkvprof.cli import certify as verb
from hkvprof.cli import options, run
from hkvprof.evaluate import certify as core
from hkvprof.evaluate.baselines.ablations import only
from hkvprof.heads import HeadType
from hkvprof.testbed.calibration_set import png_bytes, sample_record
from hkvprof.testbed.generator import make_sample
from tests.profiles import make_certificate, make_profile

SHIPPED = Path("profiles/tinyvl.hkv.safetensors")


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    """A folder of four held-out samples."""
    folder = tmp_path / "heldout"
    (folder / "images").mkdir(parents=True)
    lines = []
    for seed in range(4):
        sample = make_sample("find", 70 + seed, images=4, split="heldout", followups=1)
        record, images = sample_record(sample)
        lines.append(json.dumps(record))
        for path, image in images.items():
            (folder / path).write_bytes(png_bytes(image))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return only(load_profile(SHIPPED), HeadType.STATIC).save(tmp_path / "p.safetensors")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(options, "open_model", refuse)


def call(profile: Path, *more: object) -> int:
    return run(["certify", str(profile), "--model", "tinyvl", *map(str, more)])


@pytest.mark.usefixtures("no_model")
def test_what_is_refused_before_a_model_is_loaded(
    heldout: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = profile.read_bytes()
    cases: list[tuple[list[object], str]] = [
        (["--data", heldout], "4 samples of .* are too few: .* at least 149, even if none"),
        (["--tasks", "tinyvl", "--per-task", 1], "15 samples of tinyvl are too few"),
        (["--data", heldout, "--tasks", "tinyvl"], "exclude each other"),
        (["--data", heldout, "--alpha", 2], "alpha is 2: expected a share"),
        (["--data", heldout, "--loss", "x"], "unknown loss 'x': expected answers"),
        (["--data", heldout, "--budgets", "4096"], "expected shares of dense bytes"),
        (["--data", heldout, "-o", SHIPPED], "already exists and nothing was written"),
        (["--tasks", "longtext", "--per-task", 1], "9 samples of longtext are too few"),
    ]
    for arguments, said in cases:
        assert call(profile, *arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        *notes, error = err.splitlines()
        assert all("left out" in note for note in notes), err
        assert re.search(said, error), err
    assert profile.read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_the_calibration_s_own_samples_are_refused(
    heldout: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hkvprof.samples.read import load_samples

    loaded = load_profile(profile)
    digest = load_samples(heldout).digest
    replace(loaded, provenance={**loaded.provenance, "data_digest": digest}).save(profile)
    assert call(profile, "--data", heldout, "--alpha", 0.5, "--delta", 0.2) == 2
    assert "calibrated on these very samples" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_dry_run_says_what_would_be_tested(
    heldout: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = ("--alpha", 0.5, "--delta", 0.2, "--loss", "agreement", "--dry-run")
    assert call(profile, "--data", heldout, *claim) == 0
    out = capsys.readouterr().out
    assert "with 80% confidence, at most 50% of samples like these get another answer" in out
    assert f"4 samples of {heldout} (at least 3 needed)" in out
    assert "at most 0 degraded" in out
    assert "0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05." in out


def test_a_certificate_is_written_and_shown(
    heldout: Path, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with as few samples as a weak claim takes."""
    before, claim = profile.read_bytes(), ("--alpha", 0.5, "--delta", 0.2, "--budgets", "0.9,0.1")
    new = tmp_path / "new.safetensors"
    assert call(profile, "--data", heldout, *claim, "-o", new, "--json", "--dtype", "float32") == 0
    shown = json.loads(capsys.readouterr().out)
    assert profile.read_bytes() == before
    found = load_profile(new).certificate
    assert found is not None
    assert found.to_json() == shown
    assert (found.certified, found.samples, found.dtype) == (0.9, 4, "float32")
    assert found.data == str(heldout)
    assert not list(tmp_path.glob("*.answers"))
    assert run(["inspect", str(new)]) == 0
    assert "Certificate: 90%: with 80% confidence, at most 50%" in capsys.readouterr().out
    assert load_profile(new).provenance["data"] == load_profile(profile).provenance["data"]


def test_nothing_certified_has_an_exit_code_of_its_own(
    heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    profile = make_profile()
    path = profile.save(tmp_path / "p")
    found = make_certificate(profile)
    level = replace(found.levels[0], degraded=9, p_value=0.9)
    failed = replace(found, levels=(level,), certified=None, reason="9 degraded")
    monkeypatch.setattr(verb, "_certified", lambda *_: failed)
    for name in ("open_empty", "open_model"):
        monkeypatch.setattr(options, name, lambda *_: (None, None))
    monkeypatch.setattr(verb, "_check_answers", lambda *_: None)
    assert call(path, "--data", heldout, "--alpha", 0.5, "--delta", 0.2) == verb.NOT_CERTIFIED == 3
    assert "nothing certified" in capsys.readouterr().out
    written = load_profile(path).certificate
    assert written is not None
    assert written.reason == "9 degraded"


def test_answers_that_were_made_are_kept_when_a_run_stops(
    heldout: Path, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    claim = ("--data", heldout, "--alpha", 0.5, "--delta", 0.2, "--budgets", "0.9,0.01")
    before = profile.read_bytes()
    assert call(profile, *claim, "--dtype", "float32") == 2
    err = capsys.readouterr().err
    assert "a budget cannot be met" in err.splitlines()[-1]
    folder = tmp_path / "p.safetensors.answers"
    assert (folder / "answers.jsonl").read_text().count("\n") >= 2
    assert profile.read_bytes() == before
    monkeypatch.setattr(core, "_STEPS", 2)
    assert call(profile, *claim, "--dtype", "float32") == 2
    assert "answers of other conditions (steps: 1 there, 2 now)" in capsys.readouterr().err
