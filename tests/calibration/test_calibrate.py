"""Calibration on tinyvl with a handful of small samples, and the recipes' rules on plain arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hkvprof
from hkvprof import load_profile
from hkvprof.calibration.calibrate import calibrate
from hkvprof.calibration.decide import (
    Curves,
    allocate_by_sparsity,
    classify_by_sparsity,
    planning_loss,
)
from hkvprof.calibration.recipe import KAPPAS, MEASURED_MENU, RATIOS, Recipe
from hkvprof.errors import SampleError, UsageError
from hkvprof.heads import HeadGrid, HeadType, KeepRule, Strategy
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.record import Profile
from hkvprof.profile.tables import CLASSES
from hkvprof.samples.read import Sample, Turn, open_images
from hkvprof.samples.record import SAMPLES_KEY
from hkvprof.testbed.generator import make_sample

BUDGET = 0.25
TASKS = ("ocr", "cell", "count", "kv", "find", "attr")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [
        make_sample(task, seed, images=2, rows=6, cols=6, split="calibration", followups=1)
        for seed, task in enumerate(TASKS)
    ]


@pytest.fixture(scope="module")
def measured(tiny: tuple[Any, Any], samples: list[Sample]) -> Profile:
    return calibrate(*tiny, samples, Recipe(budget=BUDGET))


@pytest.fixture(scope="module")
def paper(tiny: tuple[Any, Any], samples: list[Sample]) -> Profile:
    return calibrate(*tiny, samples, Recipe("paper", budget=BUDGET))


def attention_name(model: Any) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def short_sample(words: int = 3) -> Sample:
    question = [{"type": "text", "text": "yellow " * words}]
    return Sample("short", "short", ({"role": "user", "content": question},), reply="yellow cross")


def broken_sample() -> Sample:
    content = [
        {"type": "image", "path": "/nowhere/missing.png"},
        {"type": "text", "text": "yellow"},
    ]
    return Sample("broken", "ocr", ({"role": "user", "content": content},), reply="yellow")


# -- profiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_the_order_of_samples_does_not_change_a_byte(
    tiny: tuple[Any, Any], samples: list[Sample], recipe: Any, request: pytest.FixtureRequest
) -> None:
    first: Profile = request.getfixturevalue(recipe)
    shuffled = [samples[i] for i in (3, 0, 5, 1, 4, 2)]
    again = calibrate(*tiny, shuffled, Recipe(recipe, budget=BUDGET))
    assert again.to_bytes() == first.to_bytes()


def test_a_measured_profile_holds_what_was_measured(measured: Profile) -> None:
    assert measured.recipe == "measured"
    assert measured.strategies == MEASURED_MENU
    assert measured.loss.shape == (1, len(MEASURED_MENU), 6, 4, len(RATIOS))
    assert measured.sparsity_mean.shape == (len(KAPPAS), 6, 8)
    assert measured.index is not None
    assert measured.index.sizes == (16, 32, 64)
    feasible = measured.output_error < INFEASIBLE
    assert bool((measured.loss[~feasible] == INFEASIBLE).all())
    assert bool((measured.loss[..., -1] == 0).all())  # a whole prompt loses nothing
    assert float(measured.loss[0, 0, ..., 0].min()) > 0
    assert 0 < float(measured.budget.mean()) <= BUDGET
    # More attention mass lies in more keys.
    assert bool((np.diff(measured.sparsity_mean, axis=0) >= 0).all())
    assert 0 < float(measured.sparsity_mean.min()) < float(measured.sparsity_mean.max()) <= 1.0001


def test_both_recipes_see_the_same_sparsity(measured: Profile, paper: Profile) -> None:
    assert np.array_equal(measured.sparsity_mean, paper.sparsity_mean)
    assert np.array_equal(measured.sparsity_std, paper.sparsity_std)
    assert paper.strategies == Recipe("paper").strategies
    assert paper.index is None


def test_provenance_counts_samples_tasks_and_tokens(
    measured: Profile, tiny: tuple[Any, Any], samples: list[Sample]
) -> None:
    lengths = [tiny[1].encode([sample.messages]).tokens for sample in samples]
    assert measured.provenance["samples"] == 6
    assert measured.provenance["tasks"] == dict.fromkeys(sorted(TASKS), 1)
    assert measured.provenance["skipped"] == 0
    assert measured.provenance["tokens"]["min"] == min(lengths)
    assert measured.provenance["tokens"]["max"] == max(lengths)
    assert measured.provenance["tokens"]["mean"] == pytest.approx(sum(lengths) / 6, abs=0.05)


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_profiles_survive_the_disk(
    recipe: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    profile: Profile = request.getfixturevalue(recipe)
    loaded = load_profile(profile.save(tmp_path / "p.safetensors"))
    assert loaded.to_bytes() == profile.to_bytes()
    assert loaded.strategies == profile.strategies
    assert loaded.fingerprint == profile.fingerprint
    assert np.array_equal(loaded.loss, profile.loss)


def test_means_over_samples_are_means_of_single_runs(
    tiny: tuple[Any, Any], samples: list[Sample]
) -> None:
    """The paper menu has no fitted index, so that samples are independent of each other."""
    both = calibrate(*tiny, samples[:2], Recipe("paper", budget=BUDGET))
    alone = [calibrate(*tiny, [s], Recipe("paper", budget=BUDGET)) for s in samples[:2]]
    mean = (alone[0].sparsity_mean + alone[1].sparsity_mean) / 2
    gap = abs(alone[0].sparsity_mean - alone[1].sparsity_mean) / 2
    assert np.allclose(both.sparsity_mean, mean, atol=1e-6)
    assert np.allclose(both.sparsity_std, gap, atol=1e-6)
    pair = [profile.statistics for profile in alone]
    for name in ("modality_mass_mean", "entropy_mean"):
        mean = (getattr(pair[0], name) + getattr(pair[1], name)) / 2
        assert np.allclose(getattr(both.statistics, name), mean, atol=1e-6)


def test_the_model_is_left_as_it_was(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    model, _ = tiny
    before = attention_name(model), [p.requires_grad for p in model.parameters()]
    calibrate(*tiny, samples[:1], Recipe(budget=BUDGET))
    assert (attention_name(model), [p.requires_grad for p in model.parameters()]) == before
    assert all(parameter.grad is None for parameter in model.parameters())


# -- the paper's rule -----------------------------------------------------------------------------


def test_theta_decides_the_types(
    tiny: tuple[Any, Any], samples: list[Sample], paper: Profile
) -> None:
    def types(theta: float) -> np.ndarray:
        profile = calibrate(*tiny, samples[:3], Recipe("paper", budget=BUDGET, theta=theta))
        assert profile.provenance["theta"] == theta
        return profile.strategy

    assert bool((types(1e-6) == HeadType.STATIC).all())
    assert bool((types(1.0) == HeadType.DYNAMIC).all())
    at = KAPPAS.index(0.10)
    lower = paper.sparsity_mean[at] - 1.96 * paper.sparsity_std[at] / np.sqrt(6)
    expected = np.where((lower >= 0.9).reshape(6, 4, 2).all(-1), HeadType.STATIC, HeadType.DYNAMIC)
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(paper.strategy, expected)


GRID = HeadGrid(layers=1, query_heads=6, kv_heads=3, head_dim=8)


def test_a_group_is_static_only_if_all_of_it_is() -> None:
    mean = np.array([[0.95, 0.95, 0.95, 0.85, 0.85, 0.85]], dtype=np.float32)
    types = classify_by_sparsity(mean, np.zeros_like(mean), 10, 0.9, GRID)
    assert types.tolist() == [[HeadType.STATIC, HeadType.DYNAMIC, HeadType.DYNAMIC]]


def test_an_interval_across_theta_means_dynamic() -> None:
    """Mean .95, deviation .2: the interval's half width is .39 / sqrt(n - 1)."""
    mean, std = np.full((1, 6), 0.95, np.float32), np.full((1, 6), 0.2, np.float32)
    assert classify_by_sparsity(mean, std, 62, 0.9, GRID).tolist() == [[HeadType.DYNAMIC] * 3]
    assert classify_by_sparsity(mean, std, 63, 0.9, GRID).tolist() == [[HeadType.STATIC] * 3]


@given(
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    st.lists(st.floats(0, 0.5, width=32), min_size=6, max_size=6),
    st.integers(1, 50),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
)
def test_a_higher_theta_makes_no_head_static(
    mean: list[float], std: list[float], count: int, a: float, b: float
) -> None:
    low, high = sorted((a, b))
    spread = np.array([std], np.float32)
    lax = classify_by_sparsity(np.array([mean], np.float32), spread, count, low, GRID)
    strict = classify_by_sparsity(np.array([mean], np.float32), spread, count, high, GRID)
    assert bool((strict >= lax).all())  # DYNAMIC is 1


def test_static_shares_follow_sparsity_and_dynamic_ones_are_even() -> None:
    grid = HeadGrid(layers=2, query_heads=4, kv_heads=2, head_dim=8)
    types = np.array([[0, 0], [1, 1]], dtype=np.uint8)
    mean = np.array([[0.9, 0.7, 0.4, 0.4], [0.1, 0.1, 0.9, 0.9]], dtype=np.float32)
    found = allocate_by_sparsity(types, mean, 0.2, 0.01, grid)
    assert found.ratio[0].tolist() == pytest.approx([0.2 * 0.8 / 0.6, 0.2 * 0.4 / 0.6], rel=1e-4)
    assert found.ratio[1].tolist() == pytest.approx([0.2, 0.2], rel=1e-4)
    assert np.array_equal(found.strategy, types)
    assert float(found.ratio.astype(np.float64).mean()) <= 0.2


# -- the measured loss ----------------------------------------------------------------------------


def curves(seed: int = 0) -> Curves:
    rng = np.random.default_rng(seed)
    terms = [rng.uniform(0.1, 1, size=(3, 2, 2, len(RATIOS))) for _ in range(3)]
    for term in terms:
        term[2, :, :, :4] = float(INFEASIBLE)
    return Curves(*terms)


@pytest.mark.parametrize(("square", "reply"), [(1e-6, 1.0), (1.0, 1e4), (37.0, 1e-3)])
def test_planning_does_not_depend_on_the_scale_of_its_terms(square: float, reply: float) -> None:
    plain = curves()
    ratios = np.array(RATIOS, dtype=np.float32)
    scaled = replace(plain, square=plain.square * square, reply=plain.reply * reply)
    found, expected = planning_loss(scaled, ratios), planning_loss(plain, ratios)
    feasible = plain.output < INFEASIBLE
    assert np.allclose(found[feasible], expected[feasible], rtol=1e-5)
    assert bool((found[~feasible] == INFEASIBLE).all())
    assert bool((found[feasible] < 1e6).all())


def test_a_model_without_any_loss_has_no_nan() -> None:
    zero = np.zeros((1, 1, 1, len(RATIOS)))
    found = planning_loss(Curves(zero, zero, zero), np.array(RATIOS, np.float32))
    assert found.tolist() == zero.tolist()


# -- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_skipping_counts_and_names_bad_samples(
    tiny: tuple[Any, Any], samples: list[Sample], recipe: Any
) -> None:
    empty = replace(samples[2], id="empty", reply="", followups=())
    mixed = [short_sample(), samples[0], broken_sample(), samples[1], empty]
    profile = calibrate(*tiny, mixed, Recipe(recipe, budget=BUDGET), on_error="skip")
    skipped = ["broken", "empty", "short"] if recipe == "measured" else ["broken", "short"]
    assert profile.provenance["samples"] == 5 - len(skipped)
    assert profile.provenance["skipped"] == len(skipped)
    assert profile.provenance["skipped_ids"] == skipped
    used = [samples[0], samples[1], *([] if recipe == "measured" else [empty])]
    good = calibrate(*tiny, used, Recipe(recipe, budget=BUDGET))
    assert np.array_equal(profile.loss, good.loss)
    assert np.array_equal(profile.sparsity_mean, good.sparsity_mean)
    if recipe == "measured":
        assert profile.index is not None
        assert good.index is not None
        assert np.array_equal(profile.index.key_projection, good.index.key_projection)


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_when_every_sample_is_bad_the_first_reason_is_given(
    tiny: tuple[Any, Any], samples: list[Sample], recipe: Any
) -> None:
    empty = replace(samples[2], id="empty", reply="", followups=())
    cases = [[short_sample(), broken_sample()], *([[empty]] if recipe == "measured" else [])]
    for bad in cases:
        with pytest.raises(SampleError, match=r"no sample could be used: .*(empty|missing)"):
            calibrate(*tiny, bad, Recipe(recipe, budget=BUDGET), on_error="skip")


def test_a_bad_sample_stops_calibration_and_leaves_nothing(
    tiny: tuple[Any, Any], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = attention_name(tiny[0])
    with pytest.raises(SampleError, match="broken"):
        calibrate(*tiny, [*samples[:1], broken_sample()], Recipe(budget=BUDGET))
    assert attention_name(tiny[0]) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [1, 10])
def test_a_prompt_too_short_to_calibrate_on_is_named(tiny: tuple[Any, Any], words: int) -> None:
    tokens = tiny[1].encode([short_sample(words).messages]).tokens
    assert tokens < 23
    with pytest.raises(SampleError, match=f"short.* {tokens} tokens.*at least 23"):
        calibrate(*tiny, [short_sample(words)])


def test_a_reply_of_one_token_can_be_calibrated_on(
    tiny: tuple[Any, Any], samples: list[Sample]
) -> None:
    one = replace(samples[2], reply="7", followups=())
    profile = calibrate(*tiny, [one], Recipe(budget=BUDGET))
    assert profile.provenance["samples"] == 1
    assert bool(np.isfinite(profile.loss).all())


def test_without_a_reply_the_model_speaks_for_itself(
    tiny: tuple[Any, Any], samples: list[Sample]
) -> None:
    model, processor = tiny
    given = samples[0]
    inputs = processor.encode([given.messages]).to(model.device, model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    own = processor.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert own
    silent = replace(given, reply=None, followups=())
    spoken = replace(given, reply=own, followups=())
    other = replace(given, reply="red cross red cross", followups=())
    profiles = [calibrate(*tiny, [s], Recipe(budget=BUDGET)) for s in (silent, spoken, other)]
    assert np.array_equal(profiles[0].loss, profiles[1].loss)
    assert not np.array_equal(profiles[0].loss, profiles[2].loss)


def test_a_later_question_counts(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    """Dropping the follow-up turn changes what is measured, not what the prompt shows."""
    sample = samples[0]
    assert sample.followups
    whole = calibrate(*tiny, [sample], Recipe(budget=BUDGET))
    first = calibrate(*tiny, [replace(sample, followups=())], Recipe(budget=BUDGET))
    assert np.array_equal(whole.sparsity_mean, first.sparsity_mean)
    assert not np.array_equal(whole.output_error, first.output_error)
    assert whole.statistics is not None
    assert first.statistics is not None
    assert whole.statistics.drift_samples.tolist() == [1, 1, 1]
    assert first.statistics.drift_samples.tolist() == [1, 0, 0]
    assert np.array_equal(whole.statistics.drift_mean[0], first.statistics.drift_mean[0])
    assert 0.1 < float(whole.statistics.drift_mean.mean()) < 1
    long = replace(sample, followups=(*sample.followups, *[Turn("yellow cross", "red")] * 60))
    assert calibrate(*tiny, [long], Recipe(budget=BUDGET)).provenance["samples"] == 1


# -- the recipe paper reads prompts alone, and its constants are options ---------------------------


def test_paper_profiles_do_not_depend_on_replies(
    tiny: tuple[Any, Any], samples: list[Sample], paper: Profile
) -> None:
    silent = [replace(s, reply=None, followups=()) for s in samples]
    found = calibrate(*tiny, silent, Recipe("paper", budget=BUDGET))
    # But for the digests of the samples, which say what was given.
    same = {**found.provenance, SAMPLES_KEY: paper.provenance[SAMPLES_KEY]}
    assert replace(found, provenance=same).to_bytes() == paper.to_bytes()
    with pytest.raises(UsageError, match="judges no replies"):
        calibrate(*tiny, samples, Recipe("paper", replies="own"))


def test_paper_profiles_promise_no_loss(paper: Profile) -> None:
    assert not paper.has_curves
    assert paper.ratios.tolist() == [1.0]
    assert not paper.loss.any()
    plan = paper.plan(0.3, 2000)
    assert plan.expected_loss is None
    assert plan.reference_loss is None
    assert plan.below_measured == 0
    assert np.isnan(paper.allocation(0.3, 2000).expected_loss)
    assert paper.statistics is not None
    assert paper.statistics.drift_samples.tolist() == [0, 0, 0]


def test_both_recipes_see_the_same_entropy_and_masses_that_add_up(
    measured: Profile, paper: Profile
) -> None:
    assert measured.statistics is not None
    assert paper.statistics is not None
    assert np.array_equal(measured.statistics.entropy_mean, paper.statistics.entropy_mean)
    mass = measured.statistics.modality_mass_mean
    assert np.allclose(mass.sum(axis=0), 1, atol=1e-5)
    assert not mass[CLASSES.index("video")].any()
    assert float(mass[CLASSES.index("image")].max()) > 0.1


def test_constants_of_the_paper_are_options(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    recipe = Recipe(
        "paper", budget=BUDGET, theta=0.7, kappa=0.3, coefficient=2.0, chunk=8, text_prior=0.25
    )
    found = calibrate(*tiny, samples[:3], recipe)
    assert found.strategies == (
        Strategy(HeadType.STATIC, pool=1, text_prior=0.25),
        Strategy(HeadType.DYNAMIC, index="mean", chunk=8),
    )
    assert found.kappas == (*KAPPAS, 0.3)
    assert found.provenance["theta_kappa"] == 0.3
    assert found.provenance["coefficient"] == 2.0
    lower = found.sparsity_mean[-1] - 1.96 * found.sparsity_std[-1] / np.sqrt(2)
    static = (lower >= 0.7).reshape(6, 4, 2).all(-1)
    assert 0 < static.sum() < static.size
    assert np.array_equal(found.head_types == HeadType.STATIC, static)
    shares = found.budget[static].mean() / found.budget[~static].mean()
    assert float(shares) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"theta": 0.8}, {"kappa": 0.05}, {"coefficient": 2.0}, {"chunk": 32}, {"text_prior": 0.0}],
    ids=str,
)
def test_constants_of_the_paper_belong_to_it(
    tiny: tuple[Any, Any], samples: list[Sample], options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} belong to recipe 'paper'"):
        calibrate(*tiny, samples[:1], Recipe(**options))


def test_budgets_go_to_types_by_the_coefficient() -> None:
    """r = 3 at a share of .2, one static head in four: 3 d + 3 d = 4 * .2, so d = .4 / 3 and the
    static head has .4; two static heads of sparsity .9 and .6 share .3 as 3 to 2."""
    grid = HeadGrid(layers=2, query_heads=2, kv_heads=2, head_dim=8)
    types = np.array([[0, 1], [1, 1]], dtype=np.uint8)
    mean = np.array([[0.9, 0.4], [0.3, 0.2]], dtype=np.float32)
    found = allocate_by_sparsity(types, mean, 0.2, 0.01, grid, coefficient=3.0)
    assert found.ratio.ravel().tolist() == pytest.approx([0.4, *[0.4 / 3] * 3], rel=1e-4)
    types = np.array([[0, 0], [1, 1]], dtype=np.uint8)
    mean = np.array([[0.9, 0.6], [0.3, 0.2]], dtype=np.float32)
    found = allocate_by_sparsity(types, mean, 0.2, 0.01, grid, coefficient=3.0)
    assert found.ratio.ravel().tolist() == pytest.approx([0.36, 0.24, 0.1, 0.1], rel=1e-4)
    for kind in HeadType:  # with one type alone there is nothing to divide
        even = np.full((2, 2), kind, dtype=np.uint8)
        found = allocate_by_sparsity(even, np.ones_like(mean), 0.2, 0.01, grid, coefficient=3.0)
        assert found.ratio.ravel().tolist() == pytest.approx([0.2] * 4, rel=1e-4)


# -- options, progress, interruption --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"name": "best"},
        {"theta": 0.0},
        {"theta": 1.01},
        {"theta": float("nan")},
        {"kappa": 0.0, "name": "paper"},
        {"kappa": float("nan"), "name": "paper"},
        {"coefficient": 0.0, "name": "paper"},
        {"coefficient": float("inf"), "name": "paper"},
        {"chunk": 0, "name": "paper"},
        {"text_prior": 1.5, "name": "paper"},
        {"text_prior": float("nan"), "name": "paper"},
        {"budget": 0.0},
        {"budget": 1.5},
        {"budget": float("nan")},
        {"budget": -0.1},
        {"on_error": "ignore"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_work(
    tiny: tuple[Any, Any], samples: list[Sample], options: dict[str, Any]
) -> None:
    def never(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        raise AssertionError("work began")

    running = {name: options.pop(name) for name in ["on_error"] if name in options}
    with pytest.raises(UsageError, match=str(next(iter((options | running).values())))):
        calibrate(*tiny, samples, Recipe(**options), track=never, **running)


def test_no_samples_are_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(SampleError, match="at least one"):
        calibrate(*tiny, [])


@pytest.mark.parametrize(("recipe", "passes"), [("paper", 1), ("measured", 2)])
def test_progress_sees_every_sample_of_every_pass(
    tiny: tuple[Any, Any], samples: list[Sample], recipe: Any, passes: int
) -> None:
    seen: list[tuple[str, int, list[str]]] = []

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        ids: list[str] = []
        seen.append((description, total, ids))
        for item in items:
            ids.append(item.id)
            yield item

    calibrate(*tiny, samples[:2], Recipe(recipe, budget=BUDGET), track=track)
    assert len(seen) == passes
    assert len({description for description, _, _ in seen}) == passes
    for _, total, ids in seen:
        assert total == 2
        assert ids == sorted(sample.id for sample in samples[:2])


def test_an_interruption_restores_attention(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = tiny
    before = attention_name(model)

    def interrupt(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        for i, item in enumerate(items):
            if i == 1:
                assert attention_name(model) != before
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(*tiny, samples, Recipe(budget=BUDGET), track=interrupt)
    assert attention_name(model) == before
    inputs = processor.encode([samples[0].messages]).to(model.device, model.dtype)
    with torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())


def test_the_keep_rule_is_used_and_recorded(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    keep = KeepRule(sinks=1, recent=2, window=4)
    profile = calibrate(*tiny, samples[:1], Recipe("paper", budget=BUDGET, keep=keep))
    default = calibrate(*tiny, samples[:1], Recipe("paper", budget=BUDGET))
    assert profile.keep == keep
    for few, many in zip(
        *(p.statistics.modality_mass_mean for p in (profile, default)), strict=True
    ):
        assert not np.array_equal(few, many) or not many.any()  # there is no video
    at = CLASSES.index("recent")
    mass = [p.statistics.modality_mass_mean[at] for p in (profile, default)]
    assert bool((mass[0] <= mass[1] + 1e-6).all())


def test_own_replies_are_what_the_model_says(tiny: tuple[Any, Any]) -> None:
    """Judging the model's own replies equals giving them in the samples, follow-ups included."""
    model, processor = tiny
    sample = make_sample("list", 2, images=3, split="calibration", followups=2)
    wrong = [replace(sample, id=f"s{i}", reply="red", followups=sample.followups) for i in range(2)]
    own = calibrate(model, processor, wrong, Recipe(budget=BUDGET, replies="own"))
    spoken = _spoken(model, processor, sample)
    given = [
        replace(
            sample,
            id=f"s{i}",
            reply=spoken[0],
            followups=tuple(
                Turn(turn.question, reply)
                for turn, reply in zip(sample.followups, spoken[1:], strict=True)
            ),
        )
        for i in range(2)
    ]
    expected = calibrate(model, processor, given, Recipe(budget=BUDGET))
    assert np.array_equal(own.loss, expected.loss)
    assert own.provenance["replies"] == "own"
    with pytest.raises(UsageError, match="replies"):
        calibrate(model, processor, wrong, Recipe(replies="mine"))  # type: ignore[arg-type]


def _spoken(model: Any, processor: Any, sample: Sample) -> list[str]:
    """The model's greedy replies, turn by turn, by plain generate() on whole conversations."""
    conversation = list(open_images(sample))
    replies: list[str] = []
    for turn in (None, *sample.followups):
        if turn is not None:
            for role, text in (("assistant", replies[-1]), ("user", turn.question)):
                conversation.append({"role": role, "content": [{"type": "text", "text": text}]})
        encoded = processor.encode([conversation])
        inputs = encoded.to(model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        replies.append(processor.decode(ids[0, encoded.tokens :]))
    return replies


def test_one_sample_proves_no_head_static() -> None:
    mean, std = np.full((1, 6), 0.99, np.float32), np.zeros((1, 6), np.float32)
    assert classify_by_sparsity(mean, std, 1, 0.9, GRID).tolist() == [[HeadType.DYNAMIC] * 3]
    assert classify_by_sparsity(mean, std, 2, 0.9, GRID).tolist() == [[HeadType.STATIC] * 3]


def test_repeated_sample_ids_are_refused(tiny: tuple[Any, Any], samples: list[Sample]) -> None:
    with pytest.raises(SampleError, match="given 2 times"):
        calibrate(*tiny, [*samples, samples[0]])


def test_bad_samples_do_not_use_up_the_index_fit(
    tiny: tuple[Any, Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sample but the last two unusable, the index is fitted on those two."""
    from hkvprof.calibration import index_fit

    monkeypatch.setattr(index_fit, "FIT_SAMPLES", 2)
    short = [
        Sample(f"a{i}", "ocr", ({"role": "user", "content": "x"},), reply="1") for i in range(5)
    ]
    found = calibrate(*tiny, [*short, *samples[:2]], Recipe(budget=BUDGET), on_error="skip")
    expected = calibrate(*tiny, samples[:2], Recipe(budget=BUDGET))
    assert np.array_equal(found.loss, expected.loss)
    assert found.provenance["skipped"] == 5
