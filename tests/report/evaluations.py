"""Folders of evaluations, as `hkvprof eval -o` writes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hkvprof.evaluate.belonging import file_digest
from hkvprof.evaluate.records import FULL, OURS, Answer


def answer(sample: str, method: str, text: str, score: float, budget: str = "0.10") -> Answer:
    return Answer(
        sample=sample, task="colours", regime="inside", turn=0, method=method,
        budget="" if method == FULL else budget, text=text, expected="red", metric="exact_match",
        score=score, kl=0.1, agreement=0.9, nll=0.2, steps=4, prompt_tokens=100,
        resident_bytes=100 if method == FULL else 10, storage_bytes=10, host_bytes=0,
        dense_bytes=100, compress_seconds=0.0, hit_rate=None,
    )  # fmt: skip


def write(folder: Path, text: str = "blue") -> None:
    told = [
        one
        for sample in ("a", "b")
        for one in (answer(sample, FULL, "red", 1.0), answer(sample, OURS, text, 0.0))
    ]
    lines = [json.dumps(asdict(one)) + "\n" for one in told]
    (folder / "answers.jsonl").write_text("".join(lines))


def write_evaluation(folder: Path, profile: Path) -> None:
    """Of a profile's file: at 20%, one of two answers is wrong."""
    folder.mkdir()
    told = [answer(sample, FULL, "red", 1.0) for sample in ("a", "b")]
    told += [answer("a", OURS, "red", 1.0, "20%"), answer("b", OURS, "blue", 0.0, "20%")]
    lines = [json.dumps(asdict(one)) + "\n" for one in told]
    (folder / "answers.jsonl").write_text("".join(lines))
    conditions = {"profile": file_digest(profile), "tasks": "colours"}
    (folder / "conditions.json").write_text(json.dumps(conditions))
