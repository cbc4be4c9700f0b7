"""How sure a profile is, in words: what is recorded, what is not, and what is not sound."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hkvprof.profile.record import Profile
from hkvprof.report import summary, terminal
from hkvprof.report.certainty import certainty, recorded, type_agreements, verdict
from tests.profiles import make_profile, with_confidence
from tests.report.test_terminal import text


def having(record: Any) -> Profile:
    return replace(make_profile(), provenance={"confidence": record})


@pytest.mark.parametrize("recipe", ["measured", "paper"])
def test_the_page_says_how_sure_the_profile_is(recipe: str) -> None:
    profile = with_confidence(make_profile(recipe))
    page = text(terminal.overview(profile, 32768, ascii_only=True), width=200)
    assert page.isascii()
    for part in (
        "How sure (16 samples, with 95% intervals):",
        "two halves of the samples: agree on the type of 94% of heads, kappa 0.50 [0.25, 0.75]",
        "one task and all others: agree on the type of 50%",
        "count agrees least: 25%",
        "text and multimodal prompts: not compared: there is only one kind",
        "single samples agree on the type of 91% of heads",
        "(layer.head, samples that agree): 2.1 0.81 [0.41, 1.00], 1.1 0.88",
    ):
        assert part in page
    assert "confidence:" not in page  # not once more among the provenance


def test_a_layer_shows_every_heads_agreement() -> None:
    profile = with_confidence(make_profile())
    page = text(terminal.layer_page(profile, 1, ascii_only=True), width=200)
    assert "samples that agree on the type" in page
    assert "0.94 [0.47, 1.00]" in page
    layer = summary.summarise_layer(profile, 1)
    assert [head["type_agreement"] for head in layer["heads"]] == [
        [0.9375, 0.46875, 1.0],
        [0.875, 0.4375, 1.0],
    ]
    plain = make_profile()
    assert "agree" not in text(terminal.layer_page(plain, 1, ascii_only=True), width=200)
    assert "type_agreement" not in summary.summarise_layer(plain, 1)["heads"][0]


def test_json_has_the_whole_record() -> None:
    profile = with_confidence(make_profile())
    whole = summary.summarise(profile, 32768)
    assert whole["confidence"] == profile.provenance["confidence"]
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_older_profiles_and_uniform_ones_say_that_nothing_is_recorded() -> None:
    assert certainty(make_profile())[0].startswith("How sure: not recorded")
    assert "was not measured" in certainty(make_profile("uniform"))[0]
    assert recorded(make_profile())["reason"].startswith("not recorded")
    few = having({"samples": 2, "reason": "too few samples: 2, expected at least 4"})
    assert certainty(few) == ["How sure: too few samples: 2, expected at least 4"]
    assert type_agreements(few, 0) == []


@pytest.mark.parametrize("record", [None, 1, "x", [], {}, {"samples": 3, "reason": ["\x1b"]}])
def test_odd_records_do_no_harm(record: object) -> None:
    profile = having(record)
    assert "cannot be used" in certainty(profile)[0]
    assert "cannot be used" in summary.summarise(profile, 32768)["confidence"]["reason"]
    assert type_agreements(profile, 0) == []
    assert "How sure" in text(terminal.overview(profile, 32768, ascii_only=True), width=200)


def test_strangers_names_cannot_draw_on_the_terminal() -> None:
    record: Any = with_confidence(make_profile()).provenance["confidence"]
    bad = "\x1b[2J[bold]\n"
    found = {**record, "by_task": {bad: record["by_task"]["count"]}, "kinds": {"reason": bad}}
    page = text(terminal.overview(having(found), 32768, ascii_only=True), width=200)
    assert "\x1b" not in page
    assert page.count(r"\x1b[2J[bold]\n") == 2


def test_kappa_is_doubted_where_nearly_all_heads_are_of_one_type() -> None:
    profile = with_confidence(make_profile())
    assert not any("says little" in line for line in certainty(profile))
    for strategy, says in ((0, "0% of heads are dynamic"), (2, "0% of heads are static")):
        same = replace(profile, strategy=np.full_like(profile.strategy, strategy))
        assert any(f"kappa says little here: {says}" in line for line in certainty(same))


def test_sure_profiles_name_no_heads() -> None:
    record: Any = with_confidence(make_profile()).provenance["confidence"]
    ones = [[1.0, 1.0]] * 3
    sure = having({**record, "heads": {**record["heads"], "agree": ones}})
    assert certainty(sure)[-1].endswith("none; all samples agree on every type")


def test_the_verdict_says_whether_samples_were_enough() -> None:
    profile = with_confidence(make_profile())
    record: Any = profile.provenance["confidence"]
    for value, words in ((0.9, "Enough samples ("), (0.89, "Too few samples: ")):
        halves = {**record["halves"], "types": [value, 0.5, 1.0]}
        told = verdict(having({**record, "halves": halves}))
        assert told.startswith(words)
        assert f"agree on the type of {value:.0%} of heads" in told
    same = {**record, "halves": {**record["halves"], "types": [1.0, 0.5, 1.0]}}
    assert verdict(having({**same, "samples": 15})).startswith("Too few samples: ")
    assert verdict(having({**same, "samples": 16})).startswith("Enough samples (16): ")
    few = having({"samples": 2, "reason": "too few samples: 2, expected at least 4"})
    assert verdict(few).endswith("give more than these 2 samples, at best two to four times")
    assert verdict(make_profile("uniform")).startswith("Nothing says")
