"""Prompts have the exact length asked for, in every row, and the same tokens for everyone."""

from typing import Any

import pytest
import torch

from hkvprof.bench.prompts import Material, chat_prompt, random_prompt
from hkvprof.cli.bench import pictures
from hkvprof.errors import UsageError
from hkvprof.models import load_model
from tests.models_for_tests import random_llama


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tinyvl", dtype="float32", device="cpu")


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(("tokens", "rows"), [(50, 1), (200, 2), (700, 3)])
def test_image_prompts_are_exact(tiny: tuple[Any, Any], tokens: int, rows: int) -> None:
    model, processor = tiny
    prompt = chat_prompt(model, processor, pictures(enlarged=False), tokens, rows, 40)
    ids = prompt.inputs["input_ids"]
    assert ids.shape == prompt.inputs["attention_mask"].shape == (rows, tokens)
    assert bool(prompt.inputs["attention_mask"].all())
    assert prompt.forced.shape == (rows, 40)
    grids = prompt.inputs["image_grid_thw"]
    assert int((ids == model.config.image_token_id).sum()) == int(grids.prod(dim=1).sum()) // 4
    assert prompt.source == f"{len(grids) // rows} images and text"
    if tokens == 700:
        assert len({tuple(row) for row in ids.tolist()}) == rows
        assert int((ids[0] == model.config.image_token_id).sum()) > tokens / 2


def test_the_message_is_still_one_of_the_chat_format(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    material = Material("read row B", "read row C of image #1 ")
    prompt = chat_prompt(model, processor, material, 64, 1, 4)
    text = squeezed(processor.tokenizer.decode(prompt.inputs["input_ids"][0]))
    rendered = processor.render([{"role": "user", "content": "read row B"}], reply_next=True)
    before, after = rendered.split("read row B")
    assert text.startswith(squeezed(before + "read row B") + "readrowCofimage#1")
    assert text.endswith("readrow" + squeezed(after))
    assert "attention_mask" not in prompt.inputs
    assert prompt.source == "prose"


def test_a_prompt_can_be_too_short(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    with pytest.raises(UsageError, match=r"context of 20 tokens is too short.*with one image"):
        chat_prompt(model, processor, pictures(enlarged=False), 20, 1, 4)


def test_enlarged_pictures_are_larger() -> None:
    material = pictures(enlarged=True)
    assert material.images is not None
    sizes = {p["image"].size for p in material.images(0, 18) if p["type"] == "image"}
    assert sizes == {(448, 448)}
    assert len(material.text) > 10_000


def test_random_prompts_repeat() -> None:
    model = random_llama()
    one, two = (random_prompt(model, 30, 2, 8) for _ in range(2))
    assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
    assert torch.equal(one.forced, two.forced)
    assert (one.rows, one.tokens, one.forced.shape[1]) == (2, 30, 8)
