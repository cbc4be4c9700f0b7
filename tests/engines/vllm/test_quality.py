"""Replies that follow a script, and `hkvprof eval --engine vllm` in the running engine."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hkvprof.cli import app
from hkvprof.evaluate.journal import read_answers
from hkvprof.evaluate.records import FULL, OURS
from tests.engines.vllm.tiny import VOCABULARY, profile, save_model

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"
)


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows))


@needs_vllm
def test_scripts_are_followed_and_heard_by_the_rows_that_bring_them() -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from hkvprof.engines.vllm.forcing import ARGUMENT, SCRIPTS, Recital, ScriptedReplies
    from hkvprof.engines.vllm.script import ReplyScript

    made = ScriptedReplies(SimpleNamespace(), "cpu", False)
    assert not made.is_argmax_invariant()
    SCRIPTS["a"] = recital = Recital(ReplyScript([1, 2], [3, 4], heard=1, path="there"))
    scripted = SimpleNamespace(extra_args={ARGUMENT: "a"})
    said: list[int] = []
    added: list[Any] = [(0, SimpleNamespace(extra_args=None), [], []), (1, scripted, [], said)]
    made.update_state(BatchUpdate(2, removed=[], added=added, moved=[]))
    own = logits_of(2)
    for token, row in ((3, 1), (4, 1), (None, 0)):
        if token is None:
            swap = [(0, 1, MoveDirectionality.SWAP)]
            made.update_state(BatchUpdate(2, removed=[], added=[], moved=swap))
        given = own.clone()
        # A prompt in chunks is heard after each; what its last chunk says counts.
        made.apply(logits_of(2) * 9)
        assert made.apply(given) is given
        assert torch.equal(given[1 - row], own[1 - row])
        if token is None:
            assert torch.equal(given[row], own[row])
        else:
            assert int(given[row].argmax()) == token
            assert int(given[row].isfinite().sum()) == 1
        said.append(int(given[row].argmax()))
    assert said[:2] == [3, 4]
    assert torch.equal(recital.rows(), torch.stack([own[1], own[0]]).log_softmax(-1))
    made.update_state(BatchUpdate(1, removed=[0], added=[], moved=[]))
    assert made.rows == {}
    SCRIPTS.clear()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--engine", "sglang"], "--engine sglang: expected vllm"),
        (["--baselines", "snapkv"], "--baselines is not for --engine"),
        (["--fetch", "1%"], "--fetch is not for --engine"),
        (["--regimes", "inside,after_steps"], "after_steps: an engine is always fed token by"),
        (["--budget", "2GiB"], "must be a share of dense bytes"),
    ],
)
def test_what_an_engine_cannot_be_asked_is_refused_by_name(
    asked: tuple[Path, Path, Path], more: list[str], told: str
) -> None:
    made = CliRunner().invoke(app, [*arguments(asked), *more])
    assert made.exit_code != 0
    assert told in str(made.exception) + made.output


def arguments(asked: tuple[Path, Path, Path]) -> list[str]:
    model, path, tasks = map(str, asked)
    return ["eval", "--engine", "vllm", "--model", model, "--profile", path, "--tasks", tasks,
            "--dtype", "float32", "--no-plot"]  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny model with a tokenizer, its profile, and samples of words."""
    from transformers import LlamaForCausalLM

    from hkvprof.calibration.uniform import uniform_profile
    from tests.models.families import VOCABULARY as WORDS
    from tests.models.families import tokenizer_of, words

    assert WORDS == VOCABULARY
    folder = tmp_path_factory.mktemp("quality")
    model = save_model(folder / "model")
    tokenizer_of(None).save_pretrained(model)
    fingerprint = uniform_profile(LlamaForCausalLM.from_pretrained(model)).fingerprint
    path = replace(profile(), fingerprint=fingerprint).save(folder / "p.safetensors")
    lines = [
        {"id": f"s{n}", "task": "words", "reply": words(2, n),
         "messages": [{"role": "user", "content": [
             {"type": "text", "text": words(300 + 150 * n, n)},
             {"type": "text", "text": words(5, n + 7)}]}],
         "followups": [{"question": words(6, n + 9), "reply": "w1"}]}
        for n in range(2)
    ]  # fmt: skip
    tasks = folder / "tasks.jsonl"
    tasks.write_text("\n".join(map(json.dumps, lines)))
    return model, path, tasks


@pytest.mark.slow
@needs_vllm
def test_the_engine_says_what_the_transformers_runtime_says(
    asked: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """In all regimes, with groups in 16 and in 4 bits, at two budgets in one run."""
    more = ["--budget", "0.3,0.15", "--steps", "12", "-o", str(tmp_path / "out")]
    made = CliRunner().invoke(app, [*arguments(asked), *more])
    assert made.exit_code == 0, made.output
    assert "KL(hkvprof || vllm)" in made.output
    answers = read_answers(tmp_path / "out")
    by_method = {
        method: {(a.sample, a.regime, a.turn, a.budget): a for a in answers if a.method == method}
        for method in (FULL, OURS, "vllm")
    }
    ours, theirs = by_method[OURS], by_method["vllm"]
    assert ours.keys() == theirs.keys()
    assert {regime for _, regime, _, _ in ours} == {"inside", "after", "later"}
    assert max(a.kl for a in ours.values()) > 0.01
    for key, one in theirs.items():
        assert one.runtime_kl is not None
        assert one.runtime_kl < 1e-3
        assert one.kl == pytest.approx(ours[key].kl, abs=5e-3)
        assert one.resident_bytes == one.storage_bytes < one.dense_bytes
        assert one.resident_bytes <= float(one.budget) * one.dense_bytes + 1
        assert one.compress_seconds > 0
        assert one.prompt_tokens == ours[key].prompt_tokens
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["conditions"]["engine"] == "vllm"
    assert summary["conditions"]["itemsize"] is None
