"""The benchmark: equal bytes, honest figures; one run of it in the engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hkvprof.cli import app
from hkvprof.engines.vllm.bench import BLOCK, EngineSetup, contestant, render
from hkvprof.engines.vllm.crowd import Crowd
from hkvprof.errors import UsageError
from hkvprof.profile.blocks import plan_blocks
from tests.engines.vllm.tiny import GRID, profile, save_model


@pytest.fixture
def setup(tmp_path: Path) -> EngineSetup:
    path = profile().save(tmp_path / "p.safetensors")
    return EngineSetup("model", str(path), ("0.3",), context=500, new_tokens=12, pool=3)


def test_engines_get_equal_bytes(setup: EngineSetup) -> None:
    """A block of plain vLLM spans all heads, one of a group of heads its part; one is null."""
    plain = setup.options(None)["num_gpu_blocks_override"] - 1
    assert plain == 3 * 16
    for budget in ("0.3", "0.1", "1.0"):
        groups = plan_blocks(profile(), budget, BLOCK).groups
        blocks = setup.options(budget)["num_gpu_blocks_override"] - 1
        assert blocks * GRID.total // groups == plain * GRID.total


def test_prompts_of_a_crowd_share_what_they_are_to_share() -> None:
    made = Crowd(requests=3, tokens=50, new_tokens=1, shared=20).prompts(1000)
    assert {len(prompt) for prompt in made} == {50}
    assert len({tuple(prompt[:20]) for prompt in made}) == 1
    assert len({tuple(prompt[20:]) for prompt in made}) == 3
    other = Crowd(requests=1, tokens=50, new_tokens=1, shared=20, seed=2).prompts(1000)[0]
    assert other[:20] == made[0][:20]
    assert other[20:] != made[0][20:]


def test_the_table_compares_with_plain_vllm() -> None:
    crowd = {"most": 12, "mean": 8.0, "steps": 300, "tokens_out": 640, "cpu_seconds": 10.0,
             "preemptions": 3}  # fmt: skip
    row = {"prefix_hits": 0.75, "compaction_share": 0.0, "crowd": crowd}
    better = {**crowd, "most": 36, "mean": 32.0, "steps": 90, "cpu_seconds": 8.0}
    rows = [{"budget": None, **row}, {"budget": "0.2", **row, "crowd": better}]
    lines = render({"rows": rows, "overhead": 1.25}).splitlines()
    assert lines[1].split() == ["plain", "vLLM", "12", "8.0", "1.00", "300", "64.0", "1.00", "3",
                                "75.0%", "0.0%"]  # fmt: skip
    assert lines[2].split()[2:8] == ["36", "32.0", "4.00", "90", "80.0", "1.25"]
    assert lines[3].endswith("1.25")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "sglang"], "expected vllm"),
        (["--engine", "vllm", "--model", "m"], "needs --model"),
        (["--engine", "vllm", "--model", "m", "--profile", "p", "--context", "1,2"], "one prompt"),
    ],
)
def test_what_is_wrong_is_told_before_an_engine_starts(arguments: list[str], told: str) -> None:
    made = CliRunner().invoke(app, ["bench", *arguments])
    assert made.exit_code != 0
    assert told in str(made.exception) + made.output


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: make test-vllm")
def test_an_engine_is_measured(setup: EngineSetup, tmp_path: Path) -> None:
    setup = EngineSetup(str(save_model(tmp_path / "model")), setup.profile, ("0.3",), 500, 12)
    assert plan_blocks(profile(), "0.3", BLOCK, 4).at(500).frees, "there is nothing to compact"
    with contestant(setup, "0.3") as engine:
        made = engine.serve(Crowd(requests=4, tokens=500, new_tokens=12))
        assert made.tokens_out == 48
        assert made.most == 4
        assert 0 < made.compaction_seconds < made.cpu_seconds
        assert made.preemptions == made.cached == 0
    absent = EngineSetup(str(tmp_path / "absent"), setup.profile, ("0.3",))
    with contestant(absent, "0.3") as engine, pytest.raises(UsageError, match="vLLM ended"):
        engine.serve(Crowd(requests=1, tokens=500, new_tokens=12))
