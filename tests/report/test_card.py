"""The card says what the profile says, and what strangers wrote into one stays plain text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hkvprof.errors import UsageError
from hkvprof.profile.record import load_profile
from hkvprof.report import certainty
from hkvprof.report.card import card
from hkvprof.report.profile_plot import profile_plot
from tests.profiles import make_profile

TINYVL = load_profile("profiles/tinyvl.hkv.safetensors")


def test_a_card_of_a_certified_profile() -> None:
    text = card(TINYVL, "me/tinyvl", "apache-2.0", pictured=True)
    front = text.split("---\n")[1].splitlines()
    assert "license: apache-2.0" in front
    assert "library_name: hkvprof" in front
    assert not any(line.startswith("base_model") for line in front), "it has no hub id"
    plan = TINYVL.plan(0.1, TINYVL.usual_tokens)
    assert f"| 10% | {plan.resident_bytes / 1024:.3g} KiB |" in text
    assert "| 0 of 150 worse |" in text
    told = certainty.section(TINYVL)
    assert told
    assert "\n".join(f"    {line}" for line in told) in text
    assert 'hkvprof.apply(model, "hf:me/tinyvl", budget=0.10)' in text
    assert TINYVL.content_digest in text
    assert "(curves.png)" in text
    assert "(curves.png)" not in card(TINYVL, "me/tinyvl", "", pictured=False)


def test_a_model_of_the_hub_is_named_as_the_base() -> None:
    text = card(make_profile(), "me/x", "", pictured=False)
    assert "base_model: example/model" in text
    assert 'load_model("example/model")' in text
    assert "Not stated by who pushed it" in text
    assert "None: `hkvprof certify` was not run on it." in text


def test_what_strangers_wrote_is_no_markup() -> None:
    profile = make_profile()
    hub_id = "a/b\nlicense: mit\n# [x](http://bad.example) <script> | `x`"
    evil = replace(
        profile,
        fingerprint=replace(profile.fingerprint, hub_id="a|b](x) <b> `c`", commit="*" * 40),
        provenance={"data": hub_id, "versions": {"<i>": "|"}},
    )
    text = card(evil, "me/x", "", pictured=False)
    assert text.split("---\n")[1].count("license") == 0
    assert "base_model" not in text
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "](http" not in text.replace("\\](http", "")
    row = next(line for line in text.splitlines() if line.startswith("| data"))
    assert row.count("|") - row.count("\\|") == 3
    assert 'load_model("MODEL")' in text


def test_budgets_that_are_too_small_say_so() -> None:
    short = replace(make_profile(), provenance={"tokens": {"mean": 60.0}})
    assert "| 5% | too small for this length | | |" in card(short, "me/x", "", pictured=False)


@pytest.mark.parametrize("licence", ["Apache 2.0", "a\nb", "-x", "x" * 65])
def test_a_licence_is_an_identifier(licence: str) -> None:
    with pytest.raises(UsageError, match="expected an identifier"):
        card(TINYVL, "me/x", licence, pictured=False)


@pytest.mark.parametrize("recipe", ["measured", "uniform"])
def test_the_picture_is_the_same_for_the_same_profile(recipe: str) -> None:
    profile = make_profile(recipe)
    assert profile_plot(profile) == profile_plot(make_profile(recipe))
    assert profile_plot(profile) != profile_plot(replace(profile, budget=profile.budget / 2))
