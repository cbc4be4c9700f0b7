"""The figures of `inspect`: right, JSON-ready, and robust against odd provenance."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hkvprof.errors import UsageError
from hkvprof.heads import HeadGrid
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.record import Profile
from hkvprof.report import summary
from tests.profiles import make_profile, plain_profile

SEVEN_B = HeadGrid(layers=28, query_heads=28, kv_heads=4, head_dim=128)


def test_the_sentence_holds_true_figures() -> None:
    profile = make_profile(grid=SEVEN_B)
    memory = summary.memory(profile, 32768)
    assert memory is not None
    assert memory.dense_bytes == 32768 * 57344
    assert memory.kept_bytes <= 0.1 * memory.dense_bytes
    assert memory.kept_bytes == pytest.approx(0.1 * memory.dense_bytes, rel=1e-3)
    text = summary.sentence(profile, 32768)
    assert text == (
        "50% of KV heads static; at 10% a 32,768-token prompt keeps 179 MiB instead of 1.75 GiB"
    )


def test_a_prompt_below_the_floor_is_called_too_short() -> None:
    text = summary.sentence(make_profile(), 16)
    assert text == "67% of KV heads static; 10% is too little for a 16-token prompt"
    assert summary.summarise(make_profile(), 16)["memory"] is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (2**20, "1 MiB"), (188 * 2**20, "188 MiB"),
     (1.75 * 2**30, "1.75 GiB"), (5 * 2**40, "5 TiB")],
)  # fmt: skip
def test_sizes(size: float, text: str) -> None:
    assert summary.human(size) == text


def close(profile: Profile, dynamic: float) -> Profile:
    """Head (1, 0) loses 1 static and `dynamic` dynamic, others 1 and 3, at every ratio."""
    loss = np.ones_like(profile.loss)
    loss[:, 2:] = 3
    loss[:, 2:, 1, 0] = dynamic
    return replace(profile, loss=loss)


def test_measured_heads_are_borderline_within_ten_percent() -> None:
    profile = make_profile()
    for dynamic, expected in ((1.05, 1), (0.95, 1), (1.2, 0), (0.85, 0), (1.0, 1)):
        found = summary.borderline(close(profile, dynamic))
        assert len(found) == expected
        assert all((head.layer, head.head) == (1, 0) for head in found)
    assert "loss 1 static, 1.05 dynamic" in summary.borderline(close(profile, 1.05))[0].reason


def test_heads_without_loss_or_without_choice_are_not_borderline() -> None:
    profile = make_profile()
    assert summary.borderline(replace(profile, loss=np.zeros_like(profile.loss))) == []
    assert summary.borderline(replace(profile, loss=np.full_like(profile.loss, 1e30))) == []
    static = plain_profile(profile)
    static = replace(
        static,
        strategies=static.strategies[:2],
        strategy=np.zeros_like(static.strategy),
        loss=static.loss[:, :2].copy(),
        output_error=static.output_error[:, :2].copy(),
    )
    assert summary.borderline(static) == []
    assert summary.borderline(make_profile("uniform")) == []


def paper(mean: float, std: float, **provenance: object) -> Profile:
    """One query head, (0, 3), near theta; all others at 1 without spread."""
    profile = make_profile("paper")
    means, stds = np.ones_like(profile.sparsity_mean), np.zeros_like(profile.sparsity_std)
    means[1, 0, 3], stds[1, 0, 3] = mean, std
    known = {"theta": 0.9, "samples": 16, "theta_kappa": 0.1, **provenance}
    return replace(profile, sparsity_mean=means, sparsity_std=stds, provenance=known)


def test_paper_heads_are_borderline_within_a_standard_error_of_theta() -> None:
    assert [(h.layer, h.head) for h in summary.borderline(paper(0.88, 0.1))] == [(0, 1)]
    assert summary.borderline(paper(0.86, 0.1)) == []
    assert summary.borderline(paper(0.86, 0.1, samples=4)) != []
    assert summary.borderline(paper(0.88, 0.1, theta_kappa=0.05)) == []


@pytest.mark.parametrize("value", [None, "x", True, 0, -3, [], {}])
def test_odd_provenance_does_no_harm(value: object) -> None:
    odd = {"theta": value, "samples": value, "theta_kappa": value, "tasks": value}
    profile = replace(make_profile("paper"), provenance=odd)
    assert summary.borderline(profile) == []
    assert summary.summarise(profile, 32768)["provenance"] == odd


def test_losses_between_the_points() -> None:
    profile = make_profile()
    budget = profile.budget.copy()
    budget[...] = np.sqrt(profile.ratios[1] * profile.ratios[2])
    losses = summary.losses_at_budget(replace(profile, budget=budget), 0, 0)
    halfway = profile.loss_at(profile.usual_tokens)[:, 0, 0, 1:3].mean(axis=-1)
    np.testing.assert_allclose(losses, halfway, rtol=1e-4)
    budget = np.full_like(budget, 0.1)
    assert summary.losses_at_budget(replace(profile, budget=budget), 0, 0)[2] >= INFEASIBLE


def test_the_summary_is_json() -> None:
    for recipe in ("paper", "measured", "uniform"):
        whole = summary.summarise(make_profile(recipe), 32768)
        assert json.loads(json.dumps(whole, allow_nan=False)) == whole
        assert sum(whole["strategies"].values()) == 6
        assert whole["types"][0] == ["static", "static"]
    layer = summary.summarise_layer(make_profile(), 0)
    assert json.loads(json.dumps(layer, allow_nan=False)) == layer
    assert layer["heads"][1]["query_heads"] == [2, 3]
    assert layer["heads"][0]["loss"]["dynamic-mean-chunk16"][0] is None


def test_layers_that_do_not_exist() -> None:
    for layer in (-1, 3):
        with pytest.raises(UsageError, match="expected 0 to 2"):
            summary.summarise_layer(make_profile(), layer)
