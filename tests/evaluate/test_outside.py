"""An engine that is asked beside hkvprof: fed token by token, compared under its own plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.errors import UsageError
from hkvprof.evaluate.belonging import check_belongs
from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, ProfiledModel
from hkvprof.evaluate.journal import CONDITIONS, Journal
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.outside import ForcedReply, divergence, until
from hkvprof.evaluate.prefill import capture
from hkvprof.evaluate.records import OURS, Answer, TaskSet
from hkvprof.evaluate.statistics import summarise
from hkvprof.heads import Modality
from hkvprof.models.calls import with_cache
from hkvprof.models.processing import Encoded
from hkvprof.profile.budgets import Allocation
from hkvprof.profile.record import Profile, load_profile
from hkvprof.report.comparison import engine_lines
from hkvprof.runtime import apply
from hkvprof.runtime.plan import head_plans
from hkvprof.samples.read import Sample, Turn
from tests.plugins.checkpoints import CHAT, save_checkpoint, words

RATIO, STEPS, LIMIT = 0.3, 6, 4


@dataclass(frozen=True)
class Heard:
    """See `ForcedReply`."""

    log_probs: Tensor
    resident_bytes: int = 30
    storage_bytes: int = 40
    compress_seconds: float = 0.5


@dataclass
class InProcess:
    """An engine that is the model itself, fed one token after another; `shift` is added to the
    logits of token 5."""

    model: Any
    profile: Profile
    shift: float = 0.0
    prompts: list[int] = field(default_factory=list)

    def allocation(self, tokens: int) -> Allocation:
        grid = self.profile.grid
        ratio = np.full((grid.layers, grid.kv_heads), RATIO, dtype=np.float32)
        return Allocation(np.zeros_like(ratio, dtype=np.uint8), ratio, 0.0)

    def force(
        self, prompt: Sequence[int], lead: Sequence[int], forced: Sequence[int]
    ) -> ForcedReply:
        rows, _ = self._run(prompt, [*lead, *forced], 0)
        return Heard(rows[len(lead) :])

    def answer(self, prompt: Sequence[int], lead: Sequence[int], limit: int) -> list[int]:
        return self._run(prompt, lead, limit)[1]

    @torch.no_grad()
    def _run(
        self, prompt: Sequence[int], told: Sequence[int], more: int
    ) -> tuple[Tensor, list[int]]:
        self.prompts.append(len(prompt))
        ids = torch.tensor([list(prompt)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        prefill = capture(self.model, Encoded(inputs, torch.full_like(ids, Modality.TEXT)))
        plans = head_plans(self.profile.strategies, self.allocation(len(prompt)))
        with apply(self.model, self.profile, 0.5, min_tokens=1, compress_every=0) as handle:
            cache = handle.new_cache(len(prompt))
            prefill.fill_with(cache, plans, [{}] * len(plans), 0.5)
            rows, said = [prefill.logits[0]], []
            for number in range(len(told) + more):
                token = told[number] if number < len(told) else int(self._moved(rows[-1]).argmax())
                said.append(token)
                fed = self.model(input_ids=torch.tensor([[token]]), **with_cache(self.model, cache))
                rows.append(fed.logits[0, -1])
        moved = torch.stack([self._moved(row) for row in rows])
        return moved.log_softmax(-1), said[len(told) :]

    def _moved(self, row: Tensor) -> Tensor:
        return row + self.shift * (torch.arange(len(row)) == 5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Profile]:
    folder = save_checkpoint(tmp_path_factory.mktemp("text"), CHAT)
    model, processor = hkvprof.load_model(folder, dtype="float32", device="cpu")
    return model, processor, load_profile(folder / "profile.safetensors")


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    samples = []
    for seed in (1, 2):
        texts = words(130 + 10 * seed, seed), words(4, seed + 20)
        message = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
        turn = Turn(question=words(3, seed + 5), reply="w9")
        samples.append(Sample(f"s{seed}", "words", (message,), reply="w4", followups=(turn,)))
    return TaskSet("words", tuple(samples), EXACT_MATCH, LIMIT, truth={"s1": words(5, 9)})


def asked(
    loaded: tuple[Any, Any, Profile], tasks: TaskSet, shift: float = 0.0,
    journal: Journal | None = None,
) -> tuple[list[Answer], InProcess]:  # fmt: skip
    model, processor, profile = loaded
    engine = InProcess(deepcopy(model), profile, shift)  # asked while `apply` is on the other
    profiled = ProfiledModel(model, processor, profile, engines={"0.3": engine})
    plan = ComparisonPlan(("0.3",), steps=STEPS, engine="vllm")
    return compare(profiled, tasks, plan, journal), engine


def test_an_engine_that_does_the_same_says_the_same(
    loaded: tuple[Any, Any, Profile], tasks: TaskSet
) -> None:
    answers, engine = asked(loaded, tasks)
    ours = {(a.sample, a.regime, a.turn): a for a in answers if a.method == OURS}
    theirs = {(a.sample, a.regime, a.turn): a for a in answers if a.method == "vllm"}
    assert ours.keys() == theirs.keys()
    assert {regime for _, regime, _ in ours} == {"inside", "after", "later"}
    for key, one in theirs.items():
        assert one.text == ours[key].text
        assert one.steps == ours[key].steps
        assert one.kl == pytest.approx(ours[key].kl, rel=1e-3, abs=1e-6)
        assert one.runtime_kl == pytest.approx(0, abs=1e-6)
        assert (one.resident_bytes, one.storage_bytes, one.host_bytes) == (30, 40, 0)
        assert (one.true_kl is None) == (ours[key].true_kl is None)
        if one.true_kl is not None:
            assert one.true_kl == pytest.approx(ours[key].true_kl, rel=1e-3, abs=1e-6)
        assert ours[key].runtime_kl is None
    assert any(one.true_kl is not None for one in theirs.values())
    # Under its plan, not under the profile's: a share of RATIO, each head the same.
    assert {round(a.resident_bytes / a.dense_bytes, 1) for a in ours.values()} == {RATIO}
    assert max(a.kl for a in ours.values()) > 1e-4
    # Contexts are shorter than the prompts that hold their questions.
    assert len(set(engine.prompts)) == 4


def test_an_engine_that_is_off_is_seen(
    loaded: tuple[Any, Any, Profile], tasks: TaskSet, tmp_path: Path
) -> None:
    answers, _ = asked(loaded, tasks, 3.0, Journal(tmp_path, {}))
    theirs = [a for a in answers if a.method == "vllm"]
    assert all(a.runtime_kl is not None and a.runtime_kl > 1e-3 for a in theirs)
    assert any(a.text != b.text for a, b in zip(theirs, _of(answers, OURS), strict=True))
    (line, *_) = engine_lines(summarise(answers))
    assert line.startswith("inside, budget 0.3: KL(hkvprof || vllm) ")
    again = Journal(tmp_path, {}).answers
    assert [a.runtime_kl for a in _of(again, "vllm")] == [a.runtime_kl for a in theirs]


def _of(answers: Sequence[Answer], method: str) -> list[Answer]:
    return [a for a in answers if a.method == method]


def test_answers_of_before_there_were_engines_are_read(
    loaded: tuple[Any, Any, Profile], tasks: TaskSet, tmp_path: Path
) -> None:
    answers, _ = asked(
        loaded, replace(tasks, samples=tasks.samples[:1]), 0.0, Journal(tmp_path, {})
    )
    path = tmp_path / "answers.jsonl"
    ours = [line for line in path.read_text().splitlines() if '"vllm"' not in line]
    path.write_text("".join(line.replace(', "runtime_kl": null', "") + "\n" for line in ours))
    assert "runtime_kl" not in path.read_text()
    assert Journal(tmp_path, {}).answers == [a for a in answers if a.method != "vllm"]


def test_conditions_name_the_engine() -> None:
    plan = ComparisonPlan(("0.3", "0.1"), engine="vllm")
    assert plan.conditions()["engine"] == "vllm"
    assert "engine" not in ComparisonPlan(("0.3",)).conditions()
    told = [(entry.method, entry.budget) for entry in plan.entries]
    assert told == [(OURS, "0.3"), (OURS, "0.1"), ("vllm", "0.3"), ("vllm", "0.1")]


def test_an_engine_s_answers_are_not_taken_for_the_profile_s(
    loaded: tuple[Any, Any, Profile], tmp_path: Path
) -> None:
    told = {"engine": "vllm", "profile": "any"}
    (tmp_path / CONDITIONS).write_text(json.dumps(told))
    with pytest.raises(UsageError, match="inside vllm, which plans anew"):
        check_belongs(tmp_path, tmp_path, loaded[2])


def test_divergence_and_ends_by_hand() -> None:
    full = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    wanted = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert divergence(full, other) == pytest.approx(wanted)
    assert until(frozenset({2, 9}), [4, 5, 9, 4]) == [4, 5]
    assert until(frozenset({2}), [4, 5]) == [4, 5]
