"""`hkvprof demo --engine vllm`: what is asked, how it is judged, what is shown."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hkvprof.calibration.uniform import uniform_profile
from hkvprof.cli import run
from hkvprof.cli.demo_engine import AskedCrowd, demonstrate, table
from hkvprof.engines.vllm import bench
from hkvprof.engines.vllm.crowd import Crowd, Served
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.records import TaskSet
from hkvprof.models.load import load_empty
from hkvprof.profile.blocks import plan_blocks
from hkvprof.samples.read import Sample
from tests.engines.curves import random_profile
from tests.models_for_tests import random_llama
from tests.plugins.checkpoints import CHAT, save_checkpoint, words


def served(said: list[list[int]], held: float = 96.0) -> Served:
    return Served(9, 3, 2.5, 48, 0, 7.4, 8.0, 0.1, 0, held, said)


@pytest.fixture
def crowd(tmp_path: Path) -> AskedCrowd:
    _, processor = load_empty(save_checkpoint(tmp_path / "model", CHAT))
    samples = [
        Sample(f"s{n}", "words", ({"role": "user", "content": words(9, n)},), reply=reply)
        for n, reply in enumerate(("w5 w6", None, "w7"))
    ]
    return AskedCrowd.of(TaskSet("words", tuple(samples), EXACT_MATCH, 4), processor)


def test_answers_are_judged_up_to_their_end(crowd: AskedCrowd) -> None:
    assert [sample.id for sample in crowd.tasks.samples] == ["s0", "s2"]
    tokens = crowd.processor.encode_text
    assert crowd.prompts == (tuple(tokens(words(9, 0))), tuple(tokens(words(9, 2))))
    end = crowd.processor.tokenizer.eos_token_id
    right, wrong = tokens("w5 w6"), tokens("w6 w5")
    assert crowd.right([[*right, end, *wrong], [*tokens("w7"), end]]) == 2
    assert crowd.right([[*right, *wrong], [*tokens("w7"), end]]) == 1
    assert crowd.right([wrong, wrong]) == 0


def test_the_table_counts_blocks_of_all_heads() -> None:
    rows = [(None, 2, served([], 32.0), 1), ("0.2", 1, served([], 96.0), 6)]
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table(rows, 2))
    text = shown.get()
    assert "plain vLLM" in text
    assert "2 of 2" in text
    assert "32.0" in text
    assert "16.0" in text


def test_plain_and_profiled_engines_are_asked_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The questions of the long-text tasks, in equal memory."""
    own = uniform_profile(random_llama(max_position_embeddings=512)).fingerprint
    asked: list[tuple[str | None, Crowd, int]] = []

    @contextmanager
    def pretended(setup: bench.EngineSetup, budget: str | None) -> Any:
        def serve(crowd: Crowd) -> Served:
            blocks = setup.options(budget)["num_gpu_blocks_override"] - 1
            asked.append((budget, crowd, blocks * own.grid.total // setup.groups(budget)))
            return served([[2]] * crowd.requests)

        yield SimpleNamespace(serve=serve)

    monkeypatch.setattr(bench, "contestant", pretended)
    monkeypatch.setattr(bench, "require_engine", lambda: None)
    model = save_checkpoint(tmp_path / "model", CHAT)
    measured = replace(random_profile(own.grid, 4), fingerprint=own)
    assert plan_blocks(measured, "0.2", bench.BLOCK, 4).groups > 1
    path = measured.save(tmp_path / "p.safetensors")
    demonstrate(path, str(model))
    assert [budget for budget, _, _ in asked] == [None, "0.2", "0.1"]
    assert len({crowd for _, crowd, _ in asked}) == 1
    assert len({room for _, _, room in asked}) == 1
    crowd = asked[0][1]
    assert crowd.requests == len(crowd.given) == 12
    assert max(map(len, crowd.given)) == crowd.tokens
    assert "0 of 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--engine", "sglang"], "expected vllm"),
        (["--engine", "vllm"], "needs --long-text"),
    ],
)
def test_what_is_wrong_is_told(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["demo", *words]) != 0
    assert told in capsys.readouterr().err
