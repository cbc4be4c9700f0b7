"""Ablations: plans from the same profile with a part of the choice taken away, the strongest static
score for all heads alike, and HybridKV with the types of a profile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.calibration.decide import classify_by_sparsity
from hkvprof.errors import BudgetError, UsageError
from hkvprof.evaluate.baselines.base import LayerPrompt, PromptView, Selection, ablation, baseline
from hkvprof.evaluate.baselines.hybridkv import KAPPA, KEEP, THETA, by_types
from hkvprof.evaluate.baselines.scores import WINDOW, keep_best, same_room, with_recent
from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE, Allocation
from hkvprof.profile.planning import Menu
from hkvprof.profile.record import Profile
from hkvprof.runtime.plan import HeadPlan, head_plans
from hkvprof.selection.static import pool, window_attention

WIDE_POOL = 31


@baseline("snapkv_max", "SnapKV, max over the window, pooling 31", "hkvprof", public=False)
def snapkv_max(prompt: PromptView) -> Selection:
    """The strongest static score without offline knowledge (docs/method.md); heads alike."""
    scores = prompt.remember(
        "snapkv_max", lambda: [_window_maximum(layer) for layer in prompt.layers]
    )
    return keep_best(prompt, [with_recent(prompt, s) for s in scores], same_room(prompt))


def _window_maximum(layer: LayerPrompt) -> Float[Tensor, "kv_heads tokens"]:
    attention = window_attention(layer.query[:, -WINDOW:], layer.key, layer.scaling)
    return pool(attention, WIDE_POOL)


def measured_profile(prompt: PromptView, name: str) -> Profile:
    """The profile, if it has curves to plan from. Raises UsageError."""
    profile = prompt.need_profile(name)
    if profile.recipe != "measured":
        raise UsageError(
            f"{name} plans from measured curves, and this profile's recipe is {profile.recipe!r}: "
            "calibrate with recipe 'measured'"
        )
    return profile


def only(profile: Profile, head_type: HeadType) -> Profile:
    """The profile with strategies of one type alone in its menu."""
    loss = profile.loss.copy()
    loss[:, [s.head_type is not head_type for s in profile.strategies]] = INFEASIBLE
    return replace(profile, loss=loss)


def allocated(prompt: PromptView, profile: Profile) -> Allocation:
    """What the profile decides for this prompt and share. Raises BudgetError."""
    return profile.allocation(prompt.share, prompt.tokens, prompt.itemsize)


def planned(profile: Profile, allocation: Allocation) -> Selection:
    """The runtime's plan in which every head has the strategy and share that it was allocated."""
    return [list(plans) for plans in head_plans(profile.strategies, allocation)]


def even(prompt: PromptView, profile: Profile) -> Selection:
    """The same share for every head, which takes the strategy that loses least with it.

    Below the first ratio at which a strategy was measured, its loss there counts. Raises
    BudgetError where no strategy fits.
    """
    menu = Menu(
        profile.strategies, profile.keep, prompt.grid.head_dim, prompt.tokens, prompt.itemsize
    )
    numbers = [
        number
        for number, strategy in enumerate(profile.strategies)
        if menu.fits(strategy, prompt.share) and bool((profile.loss[:, number] < INFEASIBLE).any())
    ]
    if not numbers:
        raise BudgetError(
            f"budget {prompt.share:.4g} is too small for a prompt of {prompt.tokens} tokens: no "
            "strategy fits; raise the budget or use longer prompts"
        )
    ratio = np.full(profile.strategy.shape, prompt.share, dtype=np.float64)
    losses = np.stack([loss_at(profile, number, ratio, prompt.tokens) for number in numbers])
    best = np.array(numbers)[losses.argmin(axis=0)]
    return [
        [HeadPlan(profile.strategies[choice], prompt.share) for choice in choices]
        for choices in best
    ]


def loss_at(
    profile: Profile, number: int, ratio: NDArray[np.float64], tokens: int
) -> NDArray[np.float64]:
    """Loss of every head, [layers, kv_heads], with strategy `number` at these ratios, on prompts of
    `tokens` tokens."""
    loss = profile.loss_at(tokens)[number]
    known, wanted = np.log(profile.ratios.astype(np.float64)), np.log(ratio)
    result = np.empty_like(wanted)
    for place in np.ndindex(*wanted.shape):
        curve = loss[place].astype(np.float64)
        fits = curve < INFEASIBLE
        result[place] = (
            np.interp(wanted[place], known[fits], np.minimum.accumulate(curve[fits]))
            if fits.any()
            else INFEASIBLE
        )
    return result


@ablation("all_static", "hkvprof, all heads static")
def all_static(prompt: PromptView) -> Selection:
    """Budgets and pooling widths per head as the profile plans them, static strategies alone."""
    profile = only(measured_profile(prompt, "all_static"), HeadType.STATIC)
    return planned(profile, allocated(prompt, profile))


@ablation("all_dynamic", "hkvprof, all heads dynamic")
def all_dynamic(prompt: PromptView) -> Selection:
    """Budgets and index sizes per head as the profile plans them, dynamic strategies alone.

    Where that fails (the ratios measured are too coarse for what the indexes need), all heads get
    the same share. Raises BudgetError where the smallest index does not fit into it.
    """
    profile = only(measured_profile(prompt, "all_dynamic"), HeadType.DYNAMIC)
    try:
        return planned(profile, allocated(prompt, profile))
    except BudgetError:
        return even(prompt, profile)


@ablation("no_head_level", "hkvprof, same share for every head")
def no_head_level(prompt: PromptView) -> Selection:
    """Every head takes the strategy that loses least at the common share."""
    return even(prompt, measured_profile(prompt, "no_head_level"))


@ablation("no_type_level", "hkvprof, one static strategy for all heads")
def no_type_level(prompt: PromptView) -> Selection:
    """Shares as the profile plans them with all strategies; every head then prunes the same way.

    The way is the static strategy whose losses at these shares sum to the least.
    """
    profile = measured_profile(prompt, "no_type_level")
    allocation = allocated(prompt, profile)
    static = [
        number
        for number, strategy in enumerate(profile.strategies)
        if strategy.head_type is HeadType.STATIC
    ]
    ratio = allocation.ratio.astype(np.float64)
    best = min(static, key=lambda number: loss_at(profile, number, ratio, prompt.tokens).sum())
    same = np.full_like(allocation.strategy, best)
    return planned(profile, replace(allocation, strategy=same))


@baseline(
    "hybridkv_offline", "HybridKV, types from the profile", "hkvprof", keep=KEEP,
    needs_profile=True, public=False,
)  # fmt: skip
def hybridkv_offline(prompt: PromptView) -> Selection:
    """As `hybridkv`, but types and shares come from the calibration's mean sparsity."""
    profile = prompt.need_profile("hybridkv_offline")
    return by_types(prompt, offline_types(profile), offline_sparsity(profile))


def offline_sparsity(profile: Profile) -> NDArray[np.float32]:
    """Mean sparsity over the calibration's samples at HybridKV's kappa, [layers, query_heads].

    Raises UsageError for a profile without it.
    """
    return profile.sparsity_mean[_kappa(profile)]


def offline_types(profile: Profile) -> NDArray[np.uint8]:
    """What the recipe `paper` decides at that kappa, [layers, kv_heads]. Raises UsageError."""
    at, samples = _kappa(profile), profile.provenance.get("samples", 0)
    mean, std = profile.sparsity_mean[at], profile.sparsity_std[at]
    return classify_by_sparsity(mean, std, samples, THETA, profile.grid)


def _kappa(profile: Profile) -> int:
    if KAPPA not in profile.kappas or not profile.provenance.get("samples"):
        raise UsageError(
            f"hybridkv_offline needs a calibrated profile with sparsity at kappa {KAPPA:g}, found "
            f"kappas {profile.kappas}: calibrate this model"
        )
    return profile.kappas.index(KAPPA)
