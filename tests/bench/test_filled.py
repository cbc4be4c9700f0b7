"""The whole driver on a CPU with a tiny shape: everything but the clock."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from hkvprof.bench import run as driver
from hkvprof.bench.__main__ import main, numbers
from hkvprof.bench.filled import (
    WALK,
    FilledSetup,
    Keys,
    RecordedSteps,
    dense_cache,
    drifting_tokens,
    filled_profiles,
    weight_bytes,
)
from hkvprof.bench.machine import machine_for
from hkvprof.bench.methods import Kind, filled_methods
from hkvprof.bench.records import BenchResult, Row
from hkvprof.bench.run import bench_filled
from hkvprof.errors import HkvError, UsageError
from hkvprof.models.adapter import view_model
from hkvprof.models.shapes import build_shape

TINY = FilledSetup(
    shape="tiny", contexts=(1024,), batches=(1, 2), budgets=("0.20", "0.10"), dtype="float32",
    device="cpu", steps=4, rounds=2, prefill_tokens=256, link_megabytes=0.5,
)  # fmt: skip
DENSE = 1024 * 2 * 2 * 2 * 16 * 4
"""Bytes of a dense cache: tokens, layers, KV heads, K and V, width, float32."""


def tiny_model() -> Any:
    return build_shape("tiny", 2, "float32", "cpu", 8192)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, dict[str, Any], list[str]]:
    """A finished run, its file, and what it said."""
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    said: list[str] = []
    result = bench_filled(TINY, path, said.append)
    return result, json.loads(path.read_text()), said


def test_every_cell_and_method_is_there(
    done: tuple[BenchResult, dict[str, Any], list[str]],
) -> None:
    result, data, _ = done
    assert [(context.tokens, context.batch) for context in result.contexts] == [
        (1024, 1),
        (1024, 2),
    ]
    names = [method.name for method in filled_methods(TINY.budgets)]
    for context in result.contexts:
        assert [row.method for row in context.rows] == names
        refused = {row.method for row in context.rows if row.reason}
        assert refused == {name for name in names if "prefetch" in name}
        assert all("nothing would overlap" in row.reason for row in context.rows if row.reason)
        for row in context.rows:
            if not row.reason:
                check_row(row, DENSE * context.batch)
    assert {one.method for one in result.prefill} == {
        "static only, 0.10",
        "dynamic only, 0.10",
        "profile, 0.10",
    }
    assert data["complete"] is True
    assert "no prompt was read" in data["filled_with"]


def check_row(row: Row, dense: int) -> None:
    """Figures that do not depend on a clock."""
    control = "items on the device" in row.method
    assert row.step_ms is not None
    assert row.attend_ms is not None
    assert row.ceiling is not None
    assert (row.held_share is None) == control
    if row.kind in ("static", "dynamic", "profile"):
        assert row.resident_bytes is not None
        share = float(row.budget)
        assert 0.9 * share < row.resident_bytes / dense <= share
        if not control:
            assert row.held_bytes == row.resident_bytes
        weights = weight_bytes(tiny_model())
        assert row.ceiling == pytest.approx((weights + dense) / (weights + row.resident_bytes))
    moving = row.kind in ("dynamic", "profile")
    assert (row.hit_rate is not None) == (row.link_ms is not None) == moving
    if moving:
        assert 0.3 < row.hit_rate < 1  # type: ignore[operator]
        assert row.moved_bytes > 0  # type: ignore[operator]
        assert row.host_bytes > 0  # type: ignore[operator]
    if row.kind == "dense":
        assert (row.resident_bytes, row.speedup_over_dense) == (dense, 1.0)


def test_the_file_tells_all_that_the_result_does(
    done: tuple[BenchResult, dict[str, Any], list[str]],
) -> None:
    result, data, _ = done
    assert BenchResult.from_json(data) == result
    assert set(data["contexts"][0]["rows"][0]) == {field.name for field in fields(Row)}
    assert data["regime"]["weight_bytes"] == weight_bytes(tiny_model())
    assert data["regime"]["token_bytes"] == DENSE / 1024
    assert all(data["links"][name] > 0 for name in ("copy", "from_host", "to_host"))


def test_a_step_reads_no_embedding_and_no_vision() -> None:
    """Two layers, the last norm and the head of 8,192 tokens, float32."""
    attention = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64  # biases of q, k, v
    layer = attention + 3 * 64 * 96 + 2 * 64
    assert weight_bytes(tiny_model()) == 4 * (2 * layer + 64 + 8192 * 64)


def test_a_run_goes_on_where_it_ended(
    done: tuple[BenchResult, dict[str, Any], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result, _, _ = done
    path, ran = tmp_path / "figures.json", []

    def measure(run: Any) -> Any:
        ran.append((run.tokens, run.batch))
        return next(c for c in result.contexts if c.batch == run.batch)

    monkeypatch.setattr(driver.FilledRun, "measure", measure)
    ticks = iter([0.0, 1.0, 2.0, 302.0, 400.0, 401.0])
    said: list[str] = []
    short = replace(TINY, minutes=10.0)
    first = bench_filled(short, path, said.append, clock=lambda: next(ticks))
    assert ran == [(1024, 1)]  # 300 s for the first: half as much again is not left
    assert first.left == ((1024, 2),)
    assert json.loads(path.read_text())["complete"] is False
    assert any("run again for the rest" in line for line in said)
    monkeypatch.setattr(driver, "measure_links", None)  # is not measured again
    second = bench_filled(short, path, said.append)
    assert ran == [(1024, 1), (1024, 2)]
    assert second.left == ()
    third = bench_filled(replace(short, batches=(2, 1)), path, said.append)
    assert len(ran) == 2
    assert third.contexts == second.contexts
    with pytest.raises(UsageError, match=r"another benchmark \(steps 4 there, 6 now\)"):
        bench_filled(replace(short, steps=6), path, said.append)
    path.write_text('{"format": 1}')
    with pytest.raises(UsageError, match="is no benchmark of a GPU to go on with"):
        bench_filled(short, path, said.append)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "none"}, "unknown shape 'none': expected qwen2.5-vl-7b or tiny"),
        ({"budgets": ("4096",)}, "budget 4096: expected shares"),
        ({"budgets": ("1.0",)}, "compresses nothing"),
        ({"contexts": (8,)}, "at least 64 tokens"),
        ({"batches": ()}, "at least 1 row"),
        ({"steps": 7}, "7 steps in 2 rounds: expected at least 2 in each"),
        ({"steps": 200, "rounds": 4}, "reach into the next compression"),
        ({"minutes": 0.0}, "minutes above 0"),
    ],
)
def test_what_cannot_be_asked_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HkvError, match=message):
        replace(TINY, **changes)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert numbers("8, 16", "--context") == (8, 16)
    assert main(["--context", "8k"]) == 2
    assert "--context 8k: expected numbers such as 8192,32768" in capsys.readouterr().err
    assert main(["--device", "mps"]) == 2
    assert "expected cuda, or cpu to try" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--json", str(tmp_path / "none.json")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: torch finds no CUDA device")
        assert error.count("\n") == 1
        assert not (tmp_path / "none.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 5])
def test_a_preallocated_cache_holds_what_the_stock_cache_does(steps: int) -> None:
    """With room for one token, all of it is a token's at the only step: the same logits."""
    model = tiny_model()
    view, rows, tokens = view_model(model), 2, 50
    machine, keys = machine_for(torch.device("cpu")), Keys(view, torch.float32, torch.device("cpu"))
    stock = dense_cache(view.text_config, 2, None)
    ours = dense_cache(view.text_config, 2, steps)
    for number in range(2):
        key, value = keys.layer(number, rows, tokens)
        stock.layers[number].update(key.clone(), value.clone())
        ours.layers[number].fill(key, value)
    eager = RecordedSteps(model, stock, tokens, rows, None)
    graph = RecordedSteps(model, ours, tokens, rows, machine.recorder())
    for _, ids in zip(range(steps), drifting_tokens(model, rows), strict=False):
        expected, got = eager(ids), graph(ids)
    assert torch.allclose(got, expected, atol=1e-5) == (steps == 1)
    # The first layer's depend on tokens and positions alone, not on attention.
    torch.testing.assert_close(ours.layers[0].keys, stock.layers[0].keys)


def test_embeddings_drift_and_rows_do_not_share() -> None:
    model = tiny_model()
    ids = torch.cat(list(drifting_tokens(model, 3)), dim=1)
    assert ids.shape == (3, WALK)
    assert ids.unique().numel() == ids.numel()
    walk = model.get_input_embeddings().weight.detach()[ids]
    near = torch.nn.functional.cosine_similarity(walk[:, 1:], walk[:, :-1], dim=-1).mean()
    assert near == pytest.approx(0.95, abs=0.02)
    assert walk.std() == pytest.approx(0.02, rel=0.1)


def test_layers_come_out_the_same_each_time() -> None:
    model = tiny_model()
    view = view_model(model)
    keys = Keys(view, torch.float32, torch.device("cpu"))
    first, again, other = (keys.layer(number, 2, 100) for number in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])
    made = filled_profiles(model, view, keys)
    assert {kind: p.head_types.mean() for kind, p in made.items()} == {
        Kind.STATIC: 0.0, Kind.DYNAMIC: 1.0, Kind.PROFILE: 0.5
    }  # fmt: skip


def bare_site(folder: Path) -> Path:
    """torch, transformers and what they require, by links: what a bare machine has."""
    wanted, found = ["torch", "transformers"], set()
    while wanted:
        name = wanted.pop()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for other platforms
        if package.metadata["Name"] in found:
            continue
        found.add(package.metadata["Name"])
        needed = [Requirement(one) for one in package.requires or () if "extra ==" not in one]
        wanted += [one.name for one in needed if one.marker is None or one.marker.evaluate()]
        for top in {str(file).split("/")[0] for file in package.files or ()}:
            source = Path(str(package.locate_file(top)))
            if source.exists() and top not in ("..", "__pycache__", "bin"):
                target = folder / top
                if not target.exists():
                    target.symlink_to(source)
    return folder


def test_a_bare_machine_can_run_it(tmp_path: Path) -> None:
    """No package of our own, jaxtyping, accelerate, scipy, datasets: none of them is there."""
    site = tmp_path / "site"
    site.mkdir()
    bare_site(site)
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(site)!r}];"
        "from importlib.util import find_spec;"
        "missing = [n for n in ('jaxtyping', 'accelerate', 'scipy', 'datasets') if find_spec(n)];"
        "assert not missing, missing;"
        "from hkvprof.bench.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = "--device cpu --shape tiny --layers 1 --context 512 --batch 1 --budget 0.2 " \
        "--prefill 64 --steps 2 --rounds 1 --dtype float32 --json"  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, *arguments.split(), str(tmp_path / "made.json")],
        capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    contexts = json.loads((tmp_path / "made.json").read_text())["contexts"]
    assert sum(not row["reason"] for row in contexts[0]["rows"]) >= 10
