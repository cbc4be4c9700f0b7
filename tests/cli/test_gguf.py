"""A GGUF file as `--model`: from the file to a profile that knows it, and errors in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hkvprof import load_profile
from hkvprof.cli import run
from hkvprof.lazy import install_hint
from hkvprof.models.adapter import view_model
from tests.models import ggufs

if importlib.util.find_spec("gguf") is None:
    pytest.skip(f"gguf not installed: {install_hint('gguf')}", allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("HKVPROF_CACHE", str(tmp_path / "cache"))


def samples(folder: Path) -> Path:
    """One sample of text."""
    messages = [{"role": "user", "content": "the 12 the " * 20}]
    record = {"id": "a", "task": "t", "messages": messages, "reply": "the 12"}
    (folder / "samples.jsonl").write_text(json.dumps(record))
    return folder


def test_calibrate_inspect_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, profile = str(tmp_path / "x.gguf"), tmp_path / "p.hkv.safetensors"
    direct = ggufs.write(Path(file), "qwen2", "Q8_0")
    data = str(samples(tmp_path))
    said = ["calibrate", "--model", file, "--data", data, "--recipe", "paper", "-o", str(profile)]
    assert run(said) == 0, capsys.readouterr().err
    digest = view_model(direct).fingerprint.weights_digest
    assert load_profile(profile).fingerprint.weights_digest == digest
    capsys.readouterr()
    assert run(["inspect", str(profile)]) == 0
    assert f"weights: digest {digest}" in capsys.readouterr().out
    assert run(["validate", str(profile), file]) == 0


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.gguf"
    for content, words in ((b"PK", "is no GGUF file"), (b"GGUF\3\0\0\0", "cut short or damaged")):
        file.write_bytes(content)
        assert run(["validate", "profiles/tinyvl.hkv.safetensors", str(file)]) == 1
        told = capsys.readouterr().err.strip()
        assert words in told
        assert "\n" not in told
