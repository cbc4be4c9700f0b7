"""Many short runs of the command line, in processes that need not import anything first.

A warm process, in which one calibration has run, forks a child for each run: a start takes
milliseconds in place of seconds, and the child can be killed at any moment of its work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (KILLED if so), what it printed, and seconds."""

    code: int
    out: str
    err: str
    seconds: float


class Warm:
    """A warm process; `arguments` is the calibration that warms it."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(folder), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
        )  # fmt: skip
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "warm\n"

    def run(self, *runs: dict[str, Any]) -> list[Ended]:
        """Runs at the same time: `arguments`, and maybe `environment`, `kill_after` seconds,
        `kill_when` the first one has printed that, `loop` (write profiles from two files in turn,
        to a third), `file_limit` in bytes."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(runs) + "\n")
        self._server.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._server.stdout.readline())]

    def command(self, *arguments: str, **options: Any) -> Ended:
        """One run."""
        return self.run({"arguments": list(arguments), **options})[0]

    def close(self) -> None:
        """End the warm process."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=600)
        self._server.stdout.close()


def _child(run: dict[str, Any], output: tuple[int, int]) -> None:
    """In the child: never returns."""
    from hkvprof.cli import run as command

    code = 70
    with contextlib.suppress(BaseException):
        os.dup2(output[0], 1)
        os.dup2(output[1], 2)
        os.environ.update(run.get("environment", {}))
        if limit := run.get("file_limit"):
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if files := run.get("loop"):
            _write_for_ever(*map(Path, files))
        code = command(run["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _write_for_ever(first: Path, second: Path, target: Path) -> None:
    import hkvprof

    profiles = [hkvprof.load_profile(path) for path in (first, second)]
    while True:
        for profile in profiles:
            profile.save(target)


def _start(run: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
    files = [folder / f"{number}.{stream}" for stream in ("out", "err")]
    output = [os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for file in files]
    started = time.monotonic()
    if (process := os.fork()) == 0:
        _child(run, (output[0], output[1]))
    for descriptor in output:
        os.close(descriptor)
    return {"process": process, "files": files, "started": started, "run": run, "ended": None}


def _watch(started: list[dict[str, Any]]) -> None:
    """Until all have ended; kill those whose time has come."""
    while any(child["ended"] is None for child in started):
        for child in (child for child in started if child["ended"] is None):
            process, status = os.waitpid(child["process"], os.WNOHANG)
            now = time.monotonic() - child["started"]
            if process:
                child["ended"] = now
                child["code"] = os.waitstatus_to_exitcode(status)
            elif now >= child["run"].get("kill_after", 120) or _is_due(child, started[0]):
                os.kill(child["process"], signal.SIGKILL)
        time.sleep(0.001)


def _is_due(child: dict[str, Any], first: dict[str, Any]) -> bool:
    text = child["run"].get("kill_when")
    return text is not None and text in first["files"][1].read_text()


def _serve(folder: Path) -> None:
    for line in sys.stdin:
        started = [_start(run, folder, number) for number, run in enumerate(json.loads(line))]
        _watch(started)
        ended = [
            {
                "code": child["code"],
                "out": child["files"][0].read_text(),
                "err": child["files"][1].read_text(),
                "seconds": child["ended"],
            }
            for child in started
        ]
        _say(json.dumps(ended))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _warm_up(folder: Path, arguments: list[str]) -> None:
    from hkvprof.cli import run

    with contextlib.redirect_stdout(sys.stderr):
        code = run([*arguments, "-o", str(folder / "warm.safetensors")])
    assert code == 0, arguments
    sys.stderr.flush()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    _warm_up(place, sys.argv[2:])
    _say("warm")
    _serve(place)
    os._exit(0)  # no need to take down what is warm
