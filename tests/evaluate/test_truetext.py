"""Texts and what really follows them: from the documents, of the right length, spread, judged."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import UsageError
from hkvprof.evaluate.compare import compare
from hkvprof.evaluate.contest import ComparisonPlan, ProfiledModel
from hkvprof.evaluate.longtext import JOINT, paragraphs
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.prefill import capture
from hkvprof.evaluate.records import Answer, TaskSet
from hkvprof.evaluate.statistics import summarise
from hkvprof.evaluate.tasks import load_tasks
from hkvprof.evaluate.truetext import INSTRUCTION, KINDS, documents, make_text
from hkvprof.models.calls import with_cache
from hkvprof.testbed.generator import make_sample

STEPS = 6


def count_quarters(text: str) -> int:
    """A token for every four characters."""
    return len(text) // 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_and_what_follows_stand_in_its_document(kind: str) -> None:
    starts = set()
    for index in range(6):
        sample, after = make_text(kind, index, 1200, count_quarters)
        context, question = (part["text"] for part in sample.messages[0]["content"])
        assert question == INSTRUCTION
        assert sample.messages[0]["content"][0]["modality"] == "context"
        text = documents(kind)[index % len(documents(kind))]
        assert context + after in text
        assert text.startswith(context) or "\n" + context in text
        assert after[0].isspace() or kind == "multilingual"  # Chinese has few spaces
        used = count_quarters(context) + count_quarters(JOINT + question)
        assert 0.97 * 1200 <= used <= 1200
        assert sample.reply is None
        assert make_text(kind, index, 1200, count_quarters) == (sample, after)
        starts.add(text.index(context))
    assert len(starts) > 3


def test_nothing_of_prose_is_calibrated_on() -> None:
    told = {text for name in ("calibration",) for text in paragraphs(name)}
    assert not told & set(documents("prose")[0].split(JOINT))
    assert len(documents("multilingual")) == 3


def test_unknown_kinds_are_refused_and_long_requests_get_what_there_is() -> None:
    with pytest.raises(UsageError, match="expected a kind of text among prose, code"):
        documents("poems")
    for index in range(3):
        sample, after = make_text("table", index, 50_000, count_quarters)
        context = sample.messages[0]["content"][0]["text"]
        assert len(documents("table")[0]) / 2 < len(context)
        assert context + after in documents("table")[0]
        assert len(after) == 1000


def test_longtext_brings_texts_with_their_truth() -> None:
    words: Any = SimpleNamespace(encode_text=lambda text: text.split())
    tasks = load_tasks("longtext", words, 2, "700")
    texts = [sample for sample in tasks.samples if sample.task.startswith("text_")]
    assert [sample.task for sample in texts[:5]] == [f"text_{kind}" for kind in KINDS]
    assert set(tasks.truth) == {sample.id for sample in texts}
    assert len(texts) == 2 * len(KINDS)


# -- judged on a model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    sample = make_sample("list", 3, images=3, rows=6, cols=6, split="heldout", followups=2)
    return TaskSet("one", (sample,), EXACT_MATCH, 4, truth={sample.id: "blue square red circle"})


@pytest.fixture(scope="module")
def answers(tiny: tuple[Any, Any], tasks: TaskSet) -> list[Answer]:
    profile = uniform_profile(tiny[0], "static", budget=0.4)
    regimes = ("inside", "after", "several", "after_steps", "later", "later_steps")
    plan = ComparisonPlan(("0.4", "1.0"), ("snapkv",), regimes, STEPS)
    return compare(ProfiledModel(*tiny, profile), tasks, plan)


@torch.no_grad()
def test_truth_is_forced_where_it_is_known(
    tiny: tuple[Any, Any], tasks: TaskSet, answers: list[Answer]
) -> None:
    """Its likelihood is that of the whole conversation in one dense pass."""
    model, processor = tiny
    judged = {(a.regime, a.turn) for a in answers if a.true_kl is not None}
    assert judged == {("inside", 0), ("after", 0)}
    truth = processor.encode_text(tasks.truth[tasks.samples[0].id])[:STEPS]
    encoded = processor.encode([tasks.samples[0].messages])
    prefill = capture(model, encoded)
    fed = torch.tensor([truth])
    logits = model(input_ids=fed, **with_cache(model, prefill.dense_cache())).logits[0]
    rows = torch.cat([prefill.logits, logits])[: len(truth)].log_softmax(-1)
    wanted = -float(rows.gather(1, fed.T).mean())
    full = next(a for a in answers if (a.regime, a.method) == ("inside", "full"))
    assert full.true_nll == pytest.approx(wanted, rel=1e-4)
    assert full.true_kl == 0
    by = {(a.method, a.budget): a for a in answers if a.regime == "inside"}
    assert by["snapkv", "0.4"].true_kl > 1e-4 > by["hkvprof", "1.0"].true_kl
    assert by["snapkv", "0.4"].true_kl != by["snapkv", "0.4"].kl
    rows_of = {(r.regime, r.method, r.budget): r for r in summarise(answers)}
    one = rows_of["inside", "snapkv", "0.4"]
    assert one.true_kl is not None
    assert one.true_kl.value == by["snapkv", "0.4"].true_kl
    assert one.true_nll_difference == pytest.approx(by["snapkv", "0.4"].true_nll - full.true_nll)
    assert rows_of["later", "snapkv", "0.4"].true_kl is None


def test_several_questions_stand_in_one_compressed_prompt(
    tiny: tuple[Any, Any], tasks: TaskSet, answers: list[Answer]
) -> None:
    sample = tasks.samples[0]
    several = [a for a in answers if a.regime == "several" and a.method == "snapkv"]
    assert [a.turn for a in several] == [0, 1, 2]
    assert [a.expected for a in several] == [sample.reply, *(t.reply for t in sample.followups)]
    assert len({a.prompt_tokens for a in several}) == 1
    inside = next(a for a in answers if a.regime == "inside")
    assert several[0].prompt_tokens > inside.prompt_tokens
    alone = TaskSet("one", (replace(sample, followups=()),), EXACT_MATCH, 4)
    plan = ComparisonPlan(("0.4",), (), ("several",), STEPS)
    with pytest.raises(UsageError, match="no sample has a question in the regime 'several'"):
        compare(ProfiledModel(*tiny, uniform_profile(tiny[0], "static")), alone, plan)


def test_questions_token_by_token_are_the_same_to_a_cache_that_fetches_nothing(
    answers: list[Answer],
) -> None:
    """Static heads attend to what they kept, however the question comes."""
    by = {(a.regime, a.method, a.budget, a.turn): a for a in answers}
    compared = 0
    for (regime, method, budget, turn), answer in by.items():
        if regime.endswith("_steps") and method == "snapkv":
            other = by[regime.removesuffix("_steps"), method, budget, turn]
            assert answer.kl == pytest.approx(other.kl, rel=1e-2, abs=1e-5)
            assert answer.prompt_tokens == other.prompt_tokens
            compared += 1
    assert compared == 3 + 2


def test_questions_token_by_token_differ_where_heads_fetch(
    tiny: tuple[Any, Any], tasks: TaskSet
) -> None:
    """A pass of several tokens sees everything on the host, a step what it fetches."""
    plan = ComparisonPlan(("0.3",), (), ("after", "after_steps"), STEPS)
    profile = uniform_profile(tiny[0], "dynamic", budget=0.3, chunk=8)
    found = {
        (a.regime, a.method, a.turn): a.kl
        for a in compare(ProfiledModel(*tiny, profile), tasks, plan)
    }
    ours = [turn for regime, method, turn in found if (regime, method) == ("after", "hkvprof")]
    once = sum(found["after", "hkvprof", turn] for turn in ours)
    stepped = sum(found["after_steps", "hkvprof", turn] for turn in ours)
    assert stepped != pytest.approx(once, rel=1e-3)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_full_caches_distance_is_the_noise_of_its_dtype(
    dtype: str, most: float, tasks: TaskSet
) -> None:
    model, processor = hkvprof.load_model("tinyvl", dtype=dtype, device="cpu")
    profile = uniform_profile(model, "static", budget=0.4)
    plan = ComparisonPlan(("0.4",), (), ("inside",), STEPS)
    answers = compare(ProfiledModel(model, processor, profile), tasks, plan)
    (full,) = [a for a in answers if a.method == "full"]
    assert 0 < abs(full.kl) < most  # computed another way, not compared with itself
    assert full.agreement == 1
