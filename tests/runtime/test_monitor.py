"""The drift sentinel: the calibration's own figures, alarms, and nothing on other requests."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.merge import gather
from hkvprof.calibration.rows import SampleRow
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.errors import HkvWarning, ProfileError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.models.processing import Encoded
from hkvprof.profile.domain import KEY, Domain, DomainCheck
from hkvprof.profile.record import Profile
from hkvprof.runtime import monitor
from hkvprof.runtime.layer import CompressedLayer
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply, left_padded, random_llama

torch.set_num_threads(1)
TASKS = ("ocr", "find", "list", "kv", "cell", "which")


def samples(split: Any, first: int, count: int) -> list[Sample]:
    return [
        make_sample(TASKS[i % len(TASKS)], first + i, images=4 + i % 3, split=split)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def calibrated(
    tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Profile, list[SampleRow]]:
    """A profile of 12 samples, and their rows."""
    folder = tmp_path_factory.mktemp("rows")
    paper = hkvprof.Recipe("paper")
    profile = hkvprof.calibrate(*tiny, samples("calibration", 0, 12), paper, rows=folder)
    return profile, gather([Path(folder)])[1]


@torch.no_grad()
def look(
    tiny: tuple[Any, Any], profile: Profile, encoded: Encoded, share: float = 1.0
) -> tuple[Tensor, DomainCheck | None]:
    """Last logits of a prompt and what the monitor says; warnings are ignored."""
    model = tiny[0]
    model.model.rope_deltas = None  # transformers leaves those of the last prompt there
    with apply(model, profile, budget=0.6, monitor=share) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore", HkvWarning)
        cache = handle.new_cache(encoded.tokens)
        model(**encoded.to(model.device, model.dtype), **with_cache(model, cache))
        token = torch.full((len(encoded.inputs["input_ids"]), 1), 7)
        mask = torch.cat([encoded.inputs["attention_mask"], torch.ones_like(token)], dim=1)
        places = mask.sum(dim=1, keepdim=True) - 1  # with a mask, Qwen-VL derives those of all
        logits = model(
            input_ids=token, attention_mask=mask, position_ids=places.expand(3, -1, -1),
            **with_cache(model, cache),
        ).logits  # fmt: skip
        return logits, handle.receipt().domain


def random_text(tiny: tuple[Any, Any], seed: int, tokens: int = 120) -> Encoded:
    """Words drawn from the vocabulary."""
    tokenizer = tiny[1].tokenizer
    special = set(tokenizer.all_special_ids)
    usable = [number for number in range(len(tokenizer)) if number not in special]
    drawn = np.random.RandomState(seed).choice(usable, tokens)
    text = " ".join(tokenizer.decode([int(number)]) for number in drawn)
    return tiny[1].encode([[{"role": "user", "content": [{"type": "text", "text": text}]}]])


# -- like with like -------------------------------------------------------------------------------


def test_a_sample_of_the_calibration_shows_the_very_figure_of_its_row(
    tiny: tuple[Any, Any], calibrated: tuple[Profile, list[SampleRow]]
) -> None:
    profile, rows = calibrated
    for sample, row in zip(samples("calibration", 0, 3), rows[:3], strict=False):
        row = next(r for r in rows if r.id == sample.id)
        _, check = look(tiny, profile, tiny[1].encode([sample.messages]))
        assert check is not None
        place = profile.kappas.index(check.kappa), check.layer, check.query_head
        assert check.found == pytest.approx(float(row.sparsity[place]), abs=1e-5)
        assert check.expected == pytest.approx(float(profile.sparsity_mean[place]), abs=1e-6)
        spread = np.maximum(profile.sparsity_std * np.sqrt(12 / 11), 0.02) * np.sqrt(1 + 1 / 12)
        moved = np.abs(row.sparsity - profile.sparsity_mean) / spread
        assert np.unravel_index(moved.argmax(), moved.shape) == place
        assert check.deviations == pytest.approx(float(moved.max()), abs=1e-3)


def test_padded_rows_are_compared_each_for_itself(
    tiny: tuple[Any, Any], calibrated: tuple[Profile, list[SampleRow]]
) -> None:
    profile, processor = calibrated[0], tiny[1]
    prompts = [sample.messages for sample in samples("heldout", 3, 3)]
    alone = [look(tiny, profile, processor.encode([prompt]))[1] for prompt in prompts]
    together = look(tiny, profile, processor.encode(prompts))[1]
    assert together is not None
    worst = max((check for check in alone if check), key=lambda check: check.deviations)
    assert together.deviations == pytest.approx(worst.deviations, abs=1e-3)
    assert (together.layer, together.query_head) == (worst.layer, worst.query_head)


# -- alarms ---------------------------------------------------------------------------------------


def test_random_text_is_out_of_domain_and_scenes_are_not(
    tiny: tuple[Any, Any], calibrated: tuple[Profile, list[SampleRow]]
) -> None:
    profile = calibrated[0]
    domain = Domain.from_json(profile.provenance[KEY])
    assert domain.samples == 12
    for seed in range(4):
        check = look(tiny, profile, random_text(tiny, seed))[1]
        assert check is not None
        assert check.out_of_domain
        assert check.deviations > check.bound == domain.bound
    quiet = 0
    for sample in samples("heldout", 40, 8):
        check = look(tiny, profile, tiny[1].encode([sample.messages]))[1]
        assert check is not None
        quiet += not check.out_of_domain
    assert quiet >= 6  # of 8; 12 samples allow one in 13


def test_the_first_alarm_warns_and_names_the_head(
    tiny: tuple[Any, Any], calibrated: tuple[Profile, list[SampleRow]]
) -> None:
    model = tiny[0]
    inputs = random_text(tiny, 0).to(model.device, model.dtype)
    with apply(model, calibrated[0], budget=0.6, monitor=1.0) as handle, torch.no_grad():
        with pytest.warns(HkvWarning, match="out of domain") as said:
            model(**inputs, use_cache=True)
        check = handle.receipt().domain
        assert check is not None
        text = str(said[0].message)
        assert f"layer {check.layer}, query head {check.query_head}" in text
        assert f"{check.found:.3f}" in text
        assert f"{check.expected:.3f} in the calibration" in text
        assert f"{check.deviations:.1f} standard deviations" in text
        model(**inputs, use_cache=True)  # a second warning would be an error
        again = handle.receipt()
    assert again.domain == check
    assert again.to_json()["domain"]["out_of_domain"] is True


@pytest.mark.slow
def test_held_out_scenes_rarely_alarm() -> None:
    """The shipped calibration set's shapes, 64 scenes it has not seen."""
    tiny = hkvprof.load_model("tinyvl", dtype="bfloat16", device="cpu")
    profile = hkvprof.load_profile("profiles/tinyvl.hkv.safetensors")
    found = [
        look(tiny, profile, tiny[1].encode([make_sample(t, i, images=12 + 4 * (i % 2),
             split="heldout", followups=1).messages]))[1]
        for t in TASKS for i in range(8)
    ]  # fmt: skip
    assert sum(check.out_of_domain for check in found if check) <= 3
    assert all(check for check in found)


# -- cost -----------------------------------------------------------------------------------------


def test_other_requests_compute_nothing_and_answer_bit_for_bit(
    tiny: tuple[Any, Any],
    calibrated: tuple[Profile, list[SampleRow]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = calibrated[0]
    encoded = tiny[1].encode([samples("heldout", 0, 1)[0].messages])
    seen: list[tuple[int, ...]] = []
    real = monitor.text_sparsity

    def counted(query: Tensor, *rest: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return real(query, *rest)

    monkeypatch.setattr(monitor, "text_sparsity", counted)
    plain, nothing = look(tiny, profile, encoded, share=0.0)
    assert nothing is None
    assert not seen
    missed, none = look(tiny, profile, encoded, share=1e-9)
    assert none is None
    assert not seen
    watched, check = look(tiny, profile, encoded, share=1.0)
    assert check is not None
    assert len(seen) == profile.grid.layers
    assert torch.equal(plain, missed)
    assert torch.equal(plain, watched)


def test_caches_of_other_requests_are_made_of_plain_layers(
    tiny: tuple[Any, Any], calibrated: tuple[Profile, list[SampleRow]]
) -> None:
    with apply(tiny[0], calibrated[0], budget=0.6, monitor=0.3) as handle:
        kinds = [{type(layer) for layer in handle.new_cache().covered} for _ in range(300)]
    plain = [kind == {CompressedLayer} for kind in kinds]
    assert [kind == {monitor.WatchedLayer} for kind in kinds] == [not one for one in plain]
    assert 60 < 300 - sum(plain) < 120
    with apply(tiny[0], calibrated[0], budget=0.6, monitor=0.3) as handle:
        again = [type(handle.new_cache().covered[0]) is CompressedLayer for _ in range(300)]
    assert again == plain


def llama_profile(model: Any, **changes: Any) -> Profile:
    """Of a text model, as if calibrated on 20 samples."""
    domain = Domain(20, 5.0, 0.05)
    provenance = {"samples": 20, KEY: domain.to_json()}
    return replace(uniform_profile(model, budget=0.4), provenance={**provenance, **changes})


@torch.no_grad()
def test_no_more_than_64_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    shapes: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, rows: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return torch.zeros(1, len(query))

    monkeypatch.setattr(monitor, "text_sparsity", counted)
    ids, mask = left_padded([900, 300])
    with apply(model, llama_profile(model), monitor=1.0):
        model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert shapes == [(4, 64, 16)] * 6


# -- what is not compared -------------------------------------------------------------------------


@torch.no_grad()
def test_requests_that_cannot_be_compared_say_why() -> None:
    model = random_llama()
    ids, _ = left_padded([300])
    with apply(model, llama_profile(model), monitor=1.0) as handle:
        handle.new_cache()
        assert "no prompt" in reason(handle)
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=128)
        assert reason(handle) == "the prompt came in several passes"
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)
        assert "input_ids" in reason(handle)
        model(input_ids=ids[:, :40], use_cache=True)
        assert "not compressed: prompt of 40 tokens" in reason(handle)


def reason(handle: Any) -> str:
    check = handle.receipt().domain
    assert check is not None
    return str(check.reason)


@torch.no_grad()
def test_a_cache_that_is_used_again_is_looked_at_again() -> None:
    model = random_llama()
    ids, _ = left_padded([300])
    with apply(model, llama_profile(model), monitor=1.0) as handle:
        cache = handle.new_cache()
        model(input_ids=ids[:, :40], **with_cache(model, cache))
        assert reason(handle)
        cache.reset()
        with pytest.warns(HkvWarning):  # the uniform profile expects no sparsity at all
            model(input_ids=ids, **with_cache(model, cache))
        assert not reason(handle)


def test_profiles_that_do_not_know_what_is_usual_are_refused() -> None:
    model = random_llama()
    with pytest.raises(ProfileError, match="calibrate"):
        apply(model, uniform_profile(model), monitor=0.5)
    few = llama_profile(model, **{KEY: Domain(3, reason="3 samples are fewer than 10").to_json()})
    with pytest.raises(ProfileError, match="3 samples"):
        apply(model, few, monitor=0.5)
    with pytest.raises(UsageError, match="monitor is a share"):
        apply(model, llama_profile(model), monitor=1.5)
    apply(model, few).detach()  # nothing is left on the model, and without a monitor nothing asks
