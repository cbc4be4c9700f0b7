"""Certificates: losses against plain generation, stops that change no verdict, held-out samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate import certify as module
from hkvprof.evaluate import compare
from hkvprof.evaluate.baselines.ablations import only
from hkvprof.evaluate.certify import (
    Claim,
    Tally,
    certify,
    conditions,
    fitting,
    judged,
    parse_budgets,
)
from hkvprof.evaluate.contest import MethodAtBudget, ProfiledModel
from hkvprof.evaluate.journal import Journal
from hkvprof.evaluate.metrics import EXACT_MATCH
from hkvprof.evaluate.records import FULL, OURS, Answer, Gold, TaskSet
from hkvprof.heads import HeadType
from hkvprof.profile.certificate import KEY, Certificate, fixed_sequence
from hkvprof.profile.record import Profile, load_profile
from hkvprof.samples.read import Sample, samples_digest
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply

NEW_TOKENS = 8
CLAIM = Claim(0.5, 0.2, (0.9, 0.1), loss="agreement")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    kinds = ("list", "find", "ocr", "kv", "list", "cell")
    samples = tuple(
        make_sample(task, 20 + i, images=4, split="heldout", followups=1)
        for i, task in enumerate(kinds)
    )
    return TaskSet("six", samples, EXACT_MATCH, NEW_TOKENS)


@pytest.fixture(scope="module")
def profile() -> Profile:
    """All heads static: prompts of 100 tokens lose little at 90% and much at 10%."""
    return only(load_profile("profiles/tinyvl.hkv.safetensors"), HeadType.STATIC)


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any], tasks: TaskSet, profile: Profile) -> Certificate:
    return certify(ProfiledModel(*tiny, profile), tasks, CLAIM)


# -- losses ---------------------------------------------------------------------------------------


def said(model: Any, processor: Any, messages: list[Any], **options: Any) -> str:
    encoded = processor.encode([messages])
    inputs = encoded.to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return str(processor.decode(ids[0, encoded.tokens :]))


def test_losses_are_those_of_plain_generation(
    tiny: tuple[Any, Any], tasks: TaskSet, profile: Profile, tmp_path: Path
) -> None:
    """The question inside, under `apply`; right and wrong counted by hand."""
    model, processor = tiny
    budgets, gold = (0.9, 0.1), [sample.reply or "" for sample in tasks.samples]

    def texts() -> list[str]:
        return [said(model, processor, list(sample.messages)) for sample in tasks.samples]

    full, compressed = texts(), {}
    for budget in budgets:
        with apply(model, profile, budget=budget):
            compressed[budget] = texts()
    for loss in ("agreement", "answers"):
        claim = replace(CLAIM, loss=loss, regimes=("inside",), budgets=budgets)
        journal = Journal(tmp_path, conditions(model, profile, tasks, claim))
        found = certify(ProfiledModel(*tiny, profile), tasks, claim, journal)
        for level in found.levels:
            lost = 0
            asked = zip(full, compressed[level.budget], gold, strict=True)
            for whole, text, reply in list(asked)[: level.samples]:
                right, wrong = EXACT_MATCH(whole, (reply,)) == 1, EXACT_MATCH(text, (reply,)) == 0
                lost += right and wrong if loss == "answers" else text != whole
            assert level.degraded == lost
        assert found.samples == 6
        right = [EXACT_MATCH(whole, (reply,)) for whole, reply in zip(full, gold, strict=True)]
        wanted = np.mean(right) if loss == "answers" else None
        assert found.full_score == pytest.approx(wanted)
    assert found.levels[1].degraded > 0


def test_what_is_certified(found: Certificate, profile: Profile, tasks: TaskSet) -> None:
    """The large budget keeps nearly all; the small one is given up after two losses."""
    large, small = found.levels
    assert found.certified == 0.9
    assert large.samples == 6
    assert small.degraded == CLAIM.most_losses(6) + 1 == 2
    assert small.samples < 6
    assert small.p_value == pytest.approx(CLAIM.p_value(2, 6))
    assert found.data_digest == samples_digest(tasks.samples)
    assert (found.dtype, found.regimes) == ("float32", ("inside", "later"))
    carried = replace(profile, provenance={KEY: found.to_json()})
    assert carried.certificate == found


def test_nothing_is_certified_where_the_largest_budget_loses(
    tiny: tuple[Any, Any], tasks: TaskSet, profile: Profile
) -> None:
    found = certify(ProfiledModel(*tiny, profile), tasks, replace(CLAIM, budgets=(0.1,)))
    assert found.certified is None
    assert "degraded at 0.1, the largest budget; at most 1 of 6 may" in found.reason
    assert Certificate.from_json(found.to_json()) == found


# -- a run that is stopped ------------------------------------------------------------------------


class StopError(Exception):
    pass


def test_a_stopped_run_goes_on_and_finds_the_same(
    tiny: tuple[Any, Any],
    tasks: TaskSet,
    profile: Profile,
    found: Certificate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def journal() -> Journal:
        return Journal(tmp_path / "answers", conditions(tiny[0], profile, tasks, CLAIM))

    def stop(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 4:
                raise StopError
            yield item

    with pytest.raises(StopError):
        certify(ProfiledModel(*tiny, profile), tasks, CLAIM, journal(), stop)
    asked = []
    real = compare.Stage

    def counted(model: Any, processor: Any, sample: Sample, tasks: TaskSet) -> Any:
        asked.append(sample.id)
        return real(model, processor, sample, tasks)

    monkeypatch.setattr(compare, "Stage", counted)
    assert certify(ProfiledModel(*tiny, profile), tasks, CLAIM, journal()) == found
    assert asked == [sample.id for sample in tasks.samples[4:]]
    asked.clear()
    assert certify(ProfiledModel(*tiny, profile), tasks, CLAIM, journal()) == found
    assert not asked


def answer(sample: str, method: str, budget: str, turn: int, text: str) -> Answer:
    numbers = dict.fromkeys(
        ("kl", "agreement", "nll", "steps", "prompt_tokens", "resident_bytes", "storage_bytes",
         "host_bytes", "dense_bytes", "compress_seconds"), 0,
    )  # fmt: skip
    score = float(text == "right")
    return Answer(sample, "t", "inside", turn, method, budget, text, "right", "m", score,
                  hit_rate=None, **numbers)  # type: ignore[arg-type]  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(3, 25), st.sampled_from(["answers", "agreement"]))
def test_giving_up_changes_no_verdict(seed: int, samples: int, loss: str) -> None:
    """Whole questions drawn at random; with and without stops."""
    random = np.random.default_rng(seed)
    claim = Claim(0.5, 0.2, (0.5, 0.3, 0.2, 0.1), loss=loss)
    names = [str(number) for number in range(samples)]
    words = ("right", "wrong", "other")
    full = random.choice(words, (samples, 2), p=[0.8, 0.1, 0.1])
    keeps = random.random((4, 1, 1)) ** 0.3
    answers = np.where(random.random((4, samples, 2)) < keeps, full, "bad")

    def play(stops: bool) -> Tally:
        told: list[Answer] = []
        tally = Tally(claim, names, told)
        for row, name in enumerate(names):
            told += [answer(name, FULL, "", turn, full[row, turn]) for turn in range(2)]
            for level, budget in enumerate(claim.budgets):
                if not (stops and tally.is_lost(MethodAtBudget(OURS, f"{budget:g}"))):
                    texts = answers[level, row]
                    told += [answer(name, OURS, f"{budget:g}", t, texts[t]) for t in range(2)]
        return tally

    (early, total), (late, same) = play(True).levels(), play(False).levels()
    assert total == same == samples
    verdict = fixed_sequence(late, samples, claim.delta)
    assert fixed_sequence(early, samples, claim.delta) == verdict
    for level, one in enumerate(late):
        lost = answers[level] != full
        if loss == "answers":
            lost &= full == "right"
        assert one.degraded == lost.any(axis=1).sum()
        assert early[level].p_value <= one.p_value
        assert early[level].samples == samples or early[level].p_value > claim.delta or level


# -- which samples --------------------------------------------------------------------------------


def test_samples_without_anything_to_judge_are_left_out(tasks: TaskSet) -> None:
    first, second, third = tasks.samples[:3]
    mixed = replace(
        tasks,
        samples=(
            first,
            replace(second, reply=None, followups=()),
            replace(third, reply=None),
        ),
        gold={second.id: Gold(("x",), EXACT_MATCH)},
    )
    kept = {}
    for loss in ("answers", "agreement"):
        for regime in ("inside", "later"):
            claim = replace(CLAIM, loss=loss, regimes=(regime,))
            kept[loss, regime] = [sample.id for sample in judged(mixed, claim).samples]
    assert kept["answers", "inside"] == [first.id, second.id]
    assert kept["agreement", "inside"] == [first.id, second.id, third.id]
    assert kept["answers", "later"] == kept["agreement", "later"] == [first.id, third.id]


def test_later_questions_are_asked_where_there_are_any(tasks: TaskSet) -> None:
    alone = replace(tasks, samples=tuple(replace(s, followups=()) for s in tasks.samples))
    assert fitting(CLAIM, tasks, given=True) == CLAIM
    assert fitting(CLAIM, alone, given=False).regimes == ("inside",)
    with pytest.raises(UsageError, match="no sample of six has a follow-up"):
        fitting(CLAIM, alone, given=True)


def test_too_few_samples_are_refused_before_anything_runs(profile: Profile, tasks: TaskSet) -> None:
    with pytest.raises(UsageError, match=r"6 samples are too few.*at least 149"):
        certify(ProfiledModel(None, None, profile), tasks, Claim(0.02, 0.05, (0.5,)))  # type: ignore[arg-type]


def test_a_budget_that_cannot_be_met_says_what_to_do(
    tiny: tuple[Any, Any], tasks: TaskSet, profile: Profile
) -> None:
    with pytest.raises(BudgetError, match=r"cannot be met.*--budgets"):
        certify(ProfiledModel(*tiny, profile), tasks, replace(CLAIM, budgets=(0.9, 0.01)))


def test_samples_of_the_calibration_are_found_by_content(
    tiny: tuple[Any, Any], tasks: TaskSet
) -> None:
    seen = tasks.samples[:2]
    made = hkvprof.calibrate(*tiny, seen, hkvprof.Recipe("paper"))
    assert len(made.provenance["sample_digests"]) == 2

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        return items

    renamed = [replace(sample, id=f"other-{i}") for i, sample in enumerate(tasks.samples[1:])]
    with pytest.raises(UsageError, match=r"calibrated on 1 of these 5 samples \('other-0'\)"):
        module.check_contents(made, tiny[1], renamed, track)
    assert module.check_contents(made, tiny[1], renamed[1:], track)
    assert not module.check_contents(uniform_profile(tiny[0]), tiny[1], renamed, track)


def test_the_data_of_the_calibration_are_refused(profile: Profile, tasks: TaskSet) -> None:
    digest = samples_digest(tasks.samples)
    same = replace(profile, provenance={"data": "a", "data_digest": digest})
    with pytest.raises(UsageError, match="calibrated on these very samples"):
        module.check_source(same, "b", tasks.samples)
    part = replace(profile, provenance={"data": "a", "data_digest": "1"})
    with pytest.raises(UsageError, match="does not record on which"):
        module.check_source(part, "a", tasks.samples)
    module.check_source(part, "b", tasks.samples)
    told = replace(profile, provenance={"data": "a", "sample_digests": []})
    module.check_source(told, "a", tasks.samples)


def test_budgets_are_shares_from_the_largest_down() -> None:
    assert parse_budgets("10%, 0.5,0.05") == (0.5, 0.1, 0.05)
    for text in ("4096", "2GiB"):
        with pytest.raises(BudgetError, match="shares"):
            parse_budgets(text)
