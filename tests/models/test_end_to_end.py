"""Every model of the coverage table from calibrate to generate, with images where it has them.

Real classes with random weights; docs/models.md is checked against what runs here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.errors import HkvWarning
from hkvprof.heads import EXACT_BITS, Modality
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import rope_holder, with_cache
from hkvprof.models.processing import ChatProcessor
from hkvprof.profile.record import Profile
from hkvprof.runtime import measure_storage
from hkvprof.samples.read import Sample
from tests.models.conversations import picture, user
from tests.models.families import FAMILIES, processor_of, words
from tests.models.tiny import COVERED, build_covered
from tests.models_for_tests import apply
from tests.runtime.reference import MaskedLayer, kept_positions, masked_cache, masked_step

pytestmark = [  # transformers' own: PaliGemma's processor; InternVL's in older releases
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
STEPS = 3
BUDGET = 0.2


@dataclass(frozen=True)
class Subject:
    """A tiny model, a profile measured on it, and a left-padded batch of two prompts."""

    model: Any
    processor: ChatProcessor
    how: str
    profile: Profile
    inputs: dict[str, Tensor]
    modality: Tensor


def asked(name: str) -> list[dict[str, Any]]:
    """Two questions of different length, about two images and about one."""
    if name not in FAMILIES:
        return [user(words(90)), user(words(71, 1))]
    return [
        user(picture(56, 56), words(40), picture(56, 28, 1), words(40, 1)),
        user(picture(28, 56, 2), words(70, 2)),
    ]


@cache
def subject(name: str) -> Subject:
    """Everything that the tests of one model share."""
    model = build_covered(name)
    processor, how = processor_of(name, model)
    samples = [
        Sample(str(i), "look", (message,), reply=words(5, i))
        for i, message in enumerate(asked(name))
    ]
    with warnings.catch_warnings():
        for what in (
            "static heads of this model are scored by the prompt's last",
            "the index takes",
        ):
            warnings.filterwarnings("ignore", what, HkvWarning)  # tests/models/test_rotary.py
        profile = hkvprof.calibrate(model, processor, samples, hkvprof.Recipe(budget=BUDGET))
    encoded = processor.encode([[message] for message in asked(name)])
    inputs = encoded.to(model.device, model.dtype)
    return Subject(model, processor, how, profile, inputs, encoded.modality)


@torch.no_grad()
def generated(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits of the prompt's every position, then of what generate() makes of it."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [model(**inputs, use_cache=True).logits, *out.logits]


@pytest.mark.parametrize("name", COVERED)
def test_calibration_sees_what_the_prompt_holds(name: str) -> None:
    found = subject(name)
    rows = found.profile.provenance["samples"]
    assert rows == 2
    images = (found.modality == Modality.IMAGE).sum(dim=1).tolist()
    assert (min(images) > 0) is (name in FAMILIES)
    assert (max(images) > min(images)) is (name in FAMILIES), "two images against one"
    assert not bool(found.inputs["attention_mask"][1, 0]), "the second row is padded on the left"
    assert bool((found.profile.loss > 0).any()), "compressing loses something"


@pytest.mark.parametrize("name", COVERED)
def test_everything_kept_is_bit_identical(name: str) -> None:
    found = subject(name)
    expected = generated(found.model, found.inputs)
    with apply(found.model, found.profile, budget=1.0):
        ours = generated(found.model, found.inputs)
    assert len(ours) == STEPS + 2
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))


def pass_of(model: Any, mask: Tensor, tokens: list[Tensor]) -> dict[str, Tensor]:
    """Inputs of a pass over the last of the tokens that follow a prompt.

    Qwen-VL computes wrong shapes from a mask of more than the pass: generate() gives positions.
    """
    grown = torch.cat([mask, *(torch.ones_like(token) for token in tokens)], dim=1)
    inputs = {"input_ids": tokens[-1], "attention_mask": grown}
    holder = rope_holder(model)
    if holder is not None:
        position = grown.sum(dim=1, keepdim=True) - 1 + holder.rope_deltas
        inputs["position_ids"] = position.expand(3, *position.shape)
    return inputs


@pytest.mark.parametrize("name", COVERED)
def test_a_fifth_is_dense_attention_over_what_is_kept(name: str) -> None:
    found = subject(name)
    model, inputs, mask = found.model, found.inputs, found.inputs["attention_mask"]
    prompt = mask.shape[1]
    tokens = [torch.tensor([[20 + i], [30 + i]]) for i in range(STEPS)]
    dense = masked_cache(model)
    with torch.no_grad():
        expected = model(**inputs, **with_cache(model, dense)).logits
    masked = [layer for layer in dense.layers if isinstance(layer, MaskedLayer)]
    keys = [layer.keys for layer in masked]
    exact = tuple(replace(s, resident_bits=EXACT_BITS) for s in found.profile.strategies)
    with apply(model, replace(found.profile, strategies=exact), budget=BUDGET) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            assert torch.equal(model(**inputs, **with_cache(model, cache)).logits, expected)
        receipt = cache.receipt()
        ours, kept = [], []
        for step in range(STEPS):
            with torch.no_grad():
                fed = pass_of(model, mask, tokens[: step + 1])
                ours.append(model(**fed, **with_cache(model, cache)).logits)
            kept.append([kept_positions(a, b) for a, b in zip(cache.covered, keys, strict=True)])
    assert receipt.compressed_layers == found.profile.grid.layers
    assert receipt.resident_share <= BUDGET
    assert (receipt.resident_bytes, receipt.host_bytes) <= measure_storage(cache)
    for step in range(STEPS):
        fed = pass_of(model, mask, tokens[: step + 1])
        theirs = masked_step(model, dense, kept[step], prompt, **fed)
        assert (ours[step] - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", COVERED)
def test_generate_takes_the_steps_that_forward_takes(name: str) -> None:
    """A prompt of one row: the same tokens through generate() and through one's own loop."""
    found = subject(name)
    encoded = found.processor.encode([[asked(name)[0]]])
    inputs = encoded.to(found.model.device, found.model.dtype)
    with apply(found.model, found.profile, budget=BUDGET) as handle, torch.no_grad():
        out = found.model.generate(
            **inputs, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert handle.receipt().compressed_layers == found.profile.grid.layers
        cache = handle.new_cache()
        mine = [found.model(**inputs, **with_cache(found.model, cache)).logits[:, -1]]
        tokens = list(out.sequences[:, encoded.tokens :].split(1, dim=1))
        for step in range(STEPS):
            fed = pass_of(found.model, inputs["attention_mask"], tokens[: step + 1])
            mine.append(found.model(**fed, **with_cache(found.model, cache)).logits[:, -1])
    assert len(out.logits) == STEPS + 1
    for a, b in zip(out.logits, mine, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize(("name", "sees_ahead"), [("llava", 0), ("gemma3", 4), ("paligemma", None)])
def test_which_prompts_see_ahead(name: str, sees_ahead: int | None) -> None:
    """The tests above ran on prompts that attend in both directions where the model does.

    `sees_ahead`: how many tokens of an image do, None for the whole prompt.
    """
    found = subject(name)
    layer, masks = view_model(found.model).attention[0], []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        found.model(**found.inputs)
    hook.remove()
    mask = masks[0][0, 0]
    ahead = (mask if mask.dtype == torch.bool else mask == 0).triu(1).sum(dim=1)
    tokens = len(ahead)
    if sees_ahead is None:
        assert ahead.tolist() == list(range(tokens - 1, -1, -1)), "all rows see all"
        return
    image = (found.modality[0] == Modality.IMAGE).tolist()
    wanted, left = [], 0
    for held in image:
        left = sees_ahead if held and left == 0 else left
        left -= bool(left)
        wanted.append(left)
    assert ahead.tolist() == wanted
