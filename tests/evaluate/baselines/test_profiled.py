"""Methods that plan from a profile: budgets and plans against the profile's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import hkvprof
from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate.baselines import PromptView, find, session
from hkvprof.evaluate.baselines import sparsemm as sparsemm_file
from hkvprof.evaluate.baselines.ablations import even, loss_at, only
from hkvprof.evaluate.baselines.base import Kept, Selection
from hkvprof.evaluate.baselines.hybridkv import KAPPA, request_sparsity
from hkvprof.evaluate.baselines.offline import static_loss
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.heads import HeadType
from hkvprof.profile.record import Profile, load_profile
from hkvprof.runtime.options import SMOOTHING
from hkvprof.runtime.plan import HeadPlan
from hkvprof.testbed.generator import make_sample
from tests.evaluate.baselines.synthetic import counts
from tests.evaluate.baselines.test_all_methods import same

torch.set_num_threads(1)

SHARE = 0.1
ABLATIONS = ("all_static", "all_dynamic", "no_head_level", "no_type_level")
Subject = tuple[Any, Prefill, Profile]


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, processor = hkvprof.load_model("tinyvl", dtype="float32")
    sample = make_sample("list", 1, images=12, split="calibration")
    prefill = capture(model, processor.encode([sample.messages]))
    return model, prefill, load_profile("profiles/tinyvl.hkv.safetensors")


def plans(selection: Selection) -> list[HeadPlan]:
    """All heads' plans in one list."""
    choices = [choice for layer in selection for choice in layer]
    assert all(isinstance(choice, HeadPlan) for choice in choices)
    return [choice for choice in choices if isinstance(choice, HeadPlan)]


def chosen(subject: Subject, name: str, share: float = SHARE) -> list[HeadPlan]:
    model, prefill, profile = subject
    return plans(find(name).select(PromptView(model, prefill, share, profile)))


def test_sparsemm_budgets(subject: Subject) -> None:
    model, prefill, profile = subject
    prompt = PromptView(model, prefill, SHARE, profile)
    numbers = np.array(counts(find("sparsemm").select(prompt)))
    score = static_loss(profile)
    room = prompt.room
    window = min(16, room // 2)
    least = window + int(sparsemm_file.RHO * (room - window))
    exact = least + score / score.sum() * (room - least) * score.size
    assert numbers.sum() == room * score.size
    assert float(np.abs(numbers - np.minimum(exact, prefill.tokens)).max()) <= 1


def test_static_loss_is_the_least_of_the_static_curves_at_a_fifth(subject: Subject) -> None:
    profile = subject[2]
    assert float(profile.ratios[9]) == pytest.approx(0.2)
    static = [s.head_type is HeadType.STATIC for s in profile.strategies]
    assert np.array_equal(
        static_loss(profile), profile.loss_at(profile.usual_tokens)[static][..., 9].min(axis=0)
    )


def test_duo_attention_streams_all_but_the_heads_that_lose_most(subject: Subject) -> None:
    model, prefill, profile = subject
    prompt = PromptView(model, prefill, 0.2, profile)
    selection = find("duo_attention").select(prompt)
    numbers = np.array(counts(selection))
    whole = numbers == prefill.tokens
    assert 0 < whole.sum() < whole.size
    assert numbers.sum() == prompt.room * whole.size
    loss = static_loss(profile)
    assert loss[whole].min() >= loss[~whole].max()
    layer, head = np.argwhere(~whole)[0]
    streaming = selection[layer][head]
    assert isinstance(streaming, Kept)
    assert torch.equal(streaming.key[:4], prompt.layers[layer].key[head, :4])
    recent = len(streaming.key) - 4
    assert torch.equal(streaming.key[4:], prompt.layers[layer].key[head, -recent:])


def test_all_static_and_all_dynamic(subject: Subject) -> None:
    for name, kind in (("all_static", HeadType.STATIC), ("all_dynamic", HeadType.DYNAMIC)):
        heads = chosen(subject, name)
        assert {plan.strategy.head_type for plan in heads} == {kind}
        assert np.mean([plan.ratio for plan in heads]) <= SHARE + 1e-6


def test_static_plans_are_those_of_a_profile_without_dynamic_losses(subject: Subject) -> None:
    _, prefill, profile = subject
    edited = only(profile, HeadType.STATIC)
    want = edited.allocation(SHARE, prefill.tokens, 4)
    got = chosen(subject, "all_static")
    assert [p.ratio for p in got] == pytest.approx(want.ratio.ravel().tolist())
    menu = profile.strategies
    assert [p.strategy for p in got] == [menu[choice] for choice in want.strategy.ravel()]
    assert bool(
        (profile.loss < 1e30).any(axis=(0, 2, 3, 4)).all()
    )  # the profile itself is as it was


def test_no_head_level_gives_all_heads_the_same(subject: Subject) -> None:
    heads = chosen(subject, "no_head_level")
    assert {plan.ratio for plan in heads} == {SHARE}
    _, prefill, profile = subject
    at = int(np.abs(profile.ratios - SHARE).argmin())
    # The share is one of the measured ratios: the least loss there decides (all strategies fit).
    loss = profile.loss_at(prefill.tokens)
    best = loss[..., : at + 1].min(axis=-1).argmin(axis=0).ravel()
    assert [p.strategy for p in heads] == [profile.strategies[choice] for choice in best]


def test_no_type_level_keeps_the_shares_and_takes_one_static_strategy(subject: Subject) -> None:
    _, prefill, profile = subject
    want = profile.allocation(SHARE, prefill.tokens, 4)
    heads = chosen(subject, "no_type_level")
    assert [p.ratio for p in heads] == pytest.approx(want.ratio.ravel().tolist())
    (strategy,) = {p.strategy for p in heads}
    assert strategy.head_type is HeadType.STATIC
    ratio = want.ratio.astype(np.float64)
    sums = [
        loss_at(profile, number, ratio, prefill.tokens).sum()
        for number, other in enumerate(profile.strategies)
        if other.head_type is HeadType.STATIC
    ]
    mine = loss_at(profile, profile.strategies.index(strategy), ratio, prefill.tokens).sum()
    assert mine == min(sums)


def test_losses_between_measured_ratios(subject: Subject) -> None:
    profile = subject[2]
    at = profile.ratios[4].astype(np.float64)
    ratio = np.full(profile.strategy.shape, at)
    curves = profile.loss_at(300)[0]
    assert np.allclose(loss_at(profile, 0, ratio, 300), curves[..., : 4 + 1].min(axis=-1))
    middle = np.full_like(ratio, np.sqrt(at * profile.ratios[5]))
    monotone = np.minimum.accumulate(curves.astype(np.float64), axis=-1)
    assert np.allclose(loss_at(profile, 0, middle, 300), monotone[..., 4:6].mean(axis=-1))


def test_even_dynamic_shares_where_measured_ratios_are_too_coarse(subject: Subject) -> None:
    heads = chosen(subject, "all_dynamic", 0.05)
    assert {round(plan.ratio, 6) for plan in heads} == {0.05}  # in float32
    assert {plan.strategy.head_type for plan in heads} == {HeadType.DYNAMIC}


def test_no_dynamic_strategy_fits(subject: Subject) -> None:
    model, prefill, profile = subject
    with pytest.raises(BudgetError, match="no strategy fits"):
        even(PromptView(model, prefill, 0.004, profile), only(profile, HeadType.DYNAMIC))


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_go_by_the_profile_and_runtime(subject: Subject, name: str) -> None:
    model, _, profile = subject
    method = find(name)
    assert method.keep is None
    assert method.smoothing == SMOOTHING
    with session.applied(model, method, SHARE, profile) as handle:
        assert handle.profile.keep == profile.keep


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_need_measured_curves(subject: Subject, name: str) -> None:
    model, prefill, profile = subject
    other = replace(profile, recipe="paper")
    with pytest.raises(UsageError, match="recipe 'measured'"):
        find(name).select(PromptView(model, prefill, SHARE, other))


def test_offline_types_of_this_very_prompt_select_as_types_per_request_do(subject: Subject) -> None:
    model, prefill, profile = subject
    kappa = profile.kappas.index(KAPPA)
    mean = profile.sparsity_mean.copy()
    mean[kappa] = request_sparsity(PromptView(model, prefill, SHARE))
    known = replace(profile, sparsity_mean=mean, sparsity_std=np.zeros_like(mean))
    for share in (0.2, 0.1):
        offline = find("hybridkv_offline").select(PromptView(model, prefill, share, known))
        assert same(offline, find("hybridkv").select(PromptView(model, prefill, share)))
    spread = replace(profile, sparsity_mean=np.zeros_like(mean))  # no head is static by that
    assert not same(
        offline, find("hybridkv_offline").select(PromptView(model, prefill, 0.1, spread))
    )
    none = replace(profile, kappas=(0.5, *profile.kappas[1:]))
    with pytest.raises(UsageError, match="sparsity at kappa"):
        find("hybridkv_offline").select(PromptView(model, prefill, SHARE, none))
