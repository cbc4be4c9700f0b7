"""`hkvprof serve` as a process: it says where it is, answers, and ends when told to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from hkvprof.cli import run

TINYVL = "profiles/tinyvl.hkv.safetensors"


@pytest.fixture(autouse=True)
def _needs_the_extra() -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve (uvicorn is not installed)")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_served_model(how: signal.Signals, code: int) -> None:
    line = ["serve", "tinyvl", "--profile", TINYVL, "--budget", "0.2", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hkvprof", *line], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        said = next(line for line in process.stderr if line.startswith("serving"))
        found = re.fullmatch(r"serving tinyvl at (http://127\.0\.0\.1:\d+/v1) .*\n", said)
        assert found, said
        with urllib.request.urlopen(f"{found[1]}/models", timeout=60) as answer:
            assert [one["id"] for one in json.load(answer)["data"]] == ["tinyvl"]
        process.send_signal(how)
        assert process.wait(timeout=120) == code
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["serve", "no-such-model", "--profile", TINYVL]
    assert run([*line, "--allowed-media", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run([*line, "--port", str(taken.getsockname()[1])]) == 2
        assert "choose others with --host and --port" in capsys.readouterr().err
    assert run([*line, "--monitor", "2"]) == 2
    assert "monitor is a share" in capsys.readouterr().err
