"""The report in a real browser: no error, sliders change the plan, a click opens a head's curves.

Run by hand with `HKVPROF_CHROMIUM=/path/to/chromium pytest -m slow tests/report/test_browser.py`;
HKVPROF_CHROMIUM_FLAGS adds what a browser needs in its place, such as --single-process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from time import sleep
from typing import Any, BinaryIO

import pytest

from hkvprof.profile.record import load_profile
from hkvprof.report.page import page
from tests.profiles import GOLDEN, GOLDEN_V1

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRIVER = """
const said = () => byId("plan-said").textContent, first = said(), seen = {};
const move = (name, to) => {
  byId(name).value = to; byId(name).dispatchEvent(new Event("input")); return said();
};
seen.plans = [first, move("budget", 6), move("fetch", 1)];
const cells = document.querySelectorAll("#heads rect.cell");
cells[1].dispatchEvent(new Event("click"));
cells[1].dispatchEvent(new MouseEvent("mousemove", { clientX: 5, clientY: 5 }));
seen.tip = byId("tip").textContent;
seen.curves = byId("curves").textContent;
seen.now = document.querySelectorAll("#pareto circle.now").length;
seen.errors = errors;
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
"""
LISTENER = (
    'const errors = []; addEventListener("error", (e) => errors.push(String(e.message)));'
    'addEventListener("securitypolicyviolation", (e) => errors.push(e.blockedURI));'
)


def browser() -> str:
    found = os.environ.get("HKVPROF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
    if not found:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is found, HKVPROF_CHROMIUM is not set")
    return found


def driven(text: str) -> str:
    """The page with a listener before and a driver after its own script, which its policy allows;
    nothing else of the policy changes."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in (LISTENER, DRIVER)
    ]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    text = text.replace("script-src ", f"script-src {allowed} ")
    text = text.replace("<body>", f"<body><script>{LISTENER}</script>")
    return text.replace("</body>", f"<script>{DRIVER}</script></body>")


def watch(path: Path, folder: Path) -> dict[str, Any]:
    file = folder / "report.html"
    file.write_text(driven(page(load_profile(path), path.name)), encoding="utf-8")
    text = dump(file.as_uri(), folder)
    assert text, "the page's scripts did not end"
    seen: dict[str, Any] = json.loads(text)
    return seen


def dump(address: str, folder: Path) -> str:
    """What the driver found on a page, over the browser's debugging pipe."""
    flags = os.environ.get("HKVPROF_CHROMIUM_FLAGS", "").split()
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", *flags]
    command += [f"--user-data-dir={folder / 'user'}", "--remote-debugging-pipe"]
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    joined = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", joined, "bash", *command],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    guard = Timer(100, process.kill)
    guard.start()
    try:
        with os.fdopen(ours_out, "wb") as requests, os.fdopen(ours_in, "rb") as replies:
            return read_page(Pipe(requests, replies), address)
    finally:
        guard.cancel()
        process.kill()
        process.wait()


@dataclass
class Pipe:
    """Chrome's debugging protocol: JSON messages that end with a zero byte."""

    requests: BinaryIO
    replies: BinaryIO
    number: int = 0

    def ask(self, method: str, session: str = "", **given: Any) -> dict[str, Any]:
        self.number += 1
        told: dict[str, Any] = {"id": self.number, "method": method, "params": given}
        told |= {"sessionId": session} if session else {}
        self.requests.write(json.dumps(told).encode() + b"\0")
        self.requests.flush()
        while True:
            message = b"".join(iter(self._byte, b"\0"))
            found: dict[str, Any] = json.loads(message)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return dict(found["result"])

    def _byte(self) -> bytes:
        one = self.replies.read(1)
        assert one, "the browser closed its pipe"
        return one


def read_page(pipe: Pipe, address: str) -> str:
    target = pipe.ask("Target.createTarget", url=address)["targetId"]
    session = pipe.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    asked = "document.getElementById('seen')?.textContent ?? ''"
    for _ in range(100):
        found = pipe.ask("Runtime.evaluate", session, expression=asked)["result"]["value"]
        if found:
            return str(found)
        sleep(0.2)
    return ""


def test_sliders_and_clicks_work_without_an_error(tmp_path: Path) -> None:
    seen = watch(Path("profiles/tinyvl.hkv.safetensors"), tmp_path)
    assert seen["errors"] == []
    assert len(set(seen["plans"])) == 3
    assert "a step reads 0 B, at most 0 B" in seen["plans"][2]
    assert "Layer 0, head 1: loss of every strategy" in seen["curves"]
    assert "layer 0, head 1: " in seen["tip"]
    assert seen["now"] == 2


@pytest.mark.parametrize("path", [GOLDEN, GOLDEN_V1])
def test_small_and_old_profiles_draw_without_an_error(path: Path, tmp_path: Path) -> None:
    assert watch(path, tmp_path)["errors"] == []
