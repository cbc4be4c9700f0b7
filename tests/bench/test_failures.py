"""What fails is named and written, and all else is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hkvprof.bench import run as driver
from hkvprof.bench.contestant import FilledContestant
from hkvprof.bench.filled import FilledSetup
from hkvprof.bench.methods import Kind
from hkvprof.bench.run import bench_filled
from hkvprof.bench.table import render


def test_a_method_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, prepare = FilledContestant.decode, FilledContestant.prepare

    def failing_decode(self: Any, count: int, timed: bool = True) -> None:
        if timed and self.method.kind is Kind.DYNAMIC:
            raise RuntimeError("an illegal access\nand more")
        decode(self, count, timed)

    def failing_prepare(self: Any) -> None:
        if self.method.kind is Kind.WHOLE:
            raise torch.OutOfMemoryError("8 GiB were asked for")
        prepare(self)

    def no_prefill(*args: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB were asked for")

    monkeypatch.setattr(FilledContestant, "decode", failing_decode)
    monkeypatch.setattr(FilledContestant, "prepare", failing_prepare)
    monkeypatch.setattr(driver, "measure_prefill", no_prefill)
    setup = FilledSetup(
        shape="tiny", contexts=(256,), batches=(1,), budgets=("0.30",), device="cpu",
        dtype="float32", steps=4, rounds=2, link_megabytes=1,
    )  # fmt: skip
    path = tmp_path / "made.json"
    result = bench_filled(setup, path, lambda line: None)
    (context,) = result.contexts
    for row in context.rows:
        if "prefetch" in row.method:  # which no CPU does
            assert row.reason.startswith("prefetch overlaps")
        elif row.kind == "dynamic":
            assert row.reason == "failed: RuntimeError: an illegal access"
        elif row.kind == "whole":
            assert row.reason == "out of memory, though it seemed to fit: 8 GiB were asked for"
        else:
            assert not row.reason
            assert row.step_ms
    assert json.loads(path.read_text())["no_prefill"].startswith("out of memory")
    assert "no prefill times: out of memory" in render(result)
