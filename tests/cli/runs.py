"""Calibrations of a tiny random model, for what may happen to a run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.plugins.checkpoints import CHAT, save_checkpoint, words
from tests.warm import Warm


def save_samples(path: Path, count: int = 4, short: int | None = None) -> Path:
    """Samples of two tasks as a file; number `short` is too short to calibrate on."""
    lines = [
        {"id": f"s{i}", "task": "ab"[i % 2], "reply": words(4, i + 9),
         "messages": [{"role": "user", "content": words(2 if i == short else 40 + i, i)}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


class Bed:
    """A folder with a checkpoint and samples, and a warm process to run commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_checkpoint(folder / "model", CHAT)
        self.data = save_samples(folder / "data.jsonl")
        self.warm = Warm(folder / "warm", self.calibrate())

    def calibrate(self, *more: str, data: Path | None = None) -> list[str]:
        """Arguments of a calibration."""
        return ["calibrate", "--model", str(self.model), "--data", str(data or self.data),
                "--device", "cpu", "--budget", "0.3", *more]  # fmt: skip
