"""What heads attend to, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from hkvprof.heads import HeadGrid
from hkvprof.profile.tables import CLASSES
from hkvprof.report import summary
from hkvprof.report.attention import attention, most_on, recorded
from tests.profiles import GRID, head_statistics, make_profile


def test_the_section_of_inspect() -> None:
    grid = HeadGrid(layers=7, query_heads=4, kv_heads=2, head_dim=8)
    assert attention(make_profile(grid=grid)) == [
        "Attention of text rows, mean over heads and samples:",
        "               sinks    text   image   video  recent entropy",
        "  layers 0-2     52%     25%     10%      0%     12%    0.35",
        "  layers 3-4     34%     25%     29%      0%     12%    0.54",
        "  layers 5-6     19%     25%     44%      0%     12%    0.69",
        "  most on image (layer.query head): 6.3 50%, 6.2 48%, 6.1 46%, 6.0 45%, 5.3 43%, 5.2 41%",
        "  same top tenth of tokens (by chance 10%): prompt's end and reply 33% (16 samples), "
        "prompt's end and later questions 50% (8 samples), "
        "reply and later questions 67% (8 samples)",
    ]


def test_pairs_and_modalities_that_no_sample_has_are_left_out() -> None:
    found = head_statistics(GRID)
    mass = found.modality_mass_mean.copy()
    mass[CLASSES.index("text")] += mass[CLASSES.index("image")]
    mass[CLASSES.index("image")] = 0
    drift = found.drift_mean.copy()
    drift[1:] = 0
    text = replace(
        found,
        modality_mass_mean=mass,
        drift_mean=drift,
        drift_samples=np.array([3, 0, 0], dtype=np.int32),
    )
    lines = attention(replace(make_profile(), statistics=text))
    assert not any("most on" in line for line in lines)
    assert (
        lines[-1]
        == "  same top tenth of tokens (by chance 10%): prompt's end and reply 33% (3 samples)"
    )
    none = replace(text, drift_mean=0 * drift, drift_samples=np.zeros(3, dtype=np.int32))
    assert "only recipe 'measured'" in attention(replace(make_profile(), statistics=none))[-1]
    assert recorded(replace(make_profile(), statistics=text))["drift"]["window_later"] == {
        "samples": 0, "overlap": None,
    }  # fmt: skip


def test_profiles_without_statistics_say_why() -> None:
    old = replace(make_profile(), statistics=None)
    for profile, reason in ((old, "calibrate again"), (make_profile("uniform"), "not measured")):
        (line,) = attention(profile)
        assert reason in line
        assert reason in recorded(profile)["reason"]


def test_the_heads_with_most_mass_come_first() -> None:
    found = head_statistics(GRID)
    heads = most_on(found, "image")
    assert [(head["layer"], head["query_head"]) for head in heads] == [
        (2, 3), (2, 2), (2, 1), (2, 0), (1, 3), (1, 2),
    ]  # fmt: skip
    assert heads[0]["mass"] == 0.5


def test_json_has_every_head() -> None:
    page = summary.summarise(make_profile(), 32768)["attention"]
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    assert list(page["modality_mass"]) == list(CLASSES)
    assert np.shape(page["modality_mass"]["image"]) == (3, 4)
    assert np.shape(page["entropy"]) == (3, 4)
    assert page["drift"]["window_decoding"]["samples"] == 16
    assert np.shape(page["drift"]["decoding_later"]["overlap"]) == (3, 4)
