"""The training forward against the Hugging Face module on the shipped checkpoint."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hkvprof.models.load import load_model
from hkvprof.models.processing import ChatProcessor
from hkvprof.testbed.generator import ask_questions, scene_messages
from hkvprof.testbed.rendering import glyph_atlas, tick_patches
from hkvprof.testbed.scenes import draw_scene, random_labels
from hkvprof.testbed.vocabulary import CELL_CLASSES
from tools.tinyvl.architecture import build_model, grow_model
from tools.tinyvl.batching import Batch, collate
from tools.tinyvl.fastmodel import FastForward


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, ChatProcessor]:
    torch.set_num_threads(1)
    return load_model("tinyvl", dtype="float32", device="cpu")


def plain_atlas() -> torch.Tensor:
    """The drawings without jitter, as `render_grid` makes them without a generator."""
    import numpy as np

    from hkvprof.testbed.rendering import cell_patches, draw_cell

    cells = [cell_patches(np.array(draw_cell(cell))) for cell in range(CELL_CLASSES)]
    return torch.from_numpy(np.stack(cells))


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 6)])
def test_logits_equal_the_module(
    shipped: tuple[Any, ChatProcessor], rows: int, columns: int
) -> None:
    model, processor = shipped
    rng = random.Random(5)
    scenes = [draw_scene(rng, random_labels(images, rng), rows, columns, 2) for images in (3, 2)]
    asked = [ask_questions(scene, rng, 3) for scene in scenes]
    batch = collate(scenes, asked)
    fast = FastForward(model, torch.float32)
    with torch.no_grad():
        logits, _ = fast(batch, plain_atlas(), torch.from_numpy(tick_patches()))
    questions = [(s, q) for s, qs in zip(scenes, asked, strict=True) for q in qs]
    for index, (scene, question) in enumerate(questions):
        inputs = processor.encode([scene_messages(scene, question.text)]).inputs
        mine = logits[batch.question_of == index]
        reply = batch.targets[batch.question_of == index][:-1][None]
        ids = torch.cat([inputs.pop("input_ids"), reply], 1)
        kinds = torch.cat([inputs.pop("mm_token_type_ids"), torch.zeros_like(reply)], 1)
        inputs.pop("attention_mask")
        with torch.no_grad():
            theirs = model(
                input_ids=ids,
                mm_token_type_ids=kinds,
                attention_mask=torch.ones_like(ids),
                logits_to_keep=len(mine),
                **inputs,
            ).logits[0]
        assert (mine - theirs).abs().max() <= 1e-4


def small_batch() -> Batch:
    rng = random.Random(1)
    scene = draw_scene(rng, (1, 2), 2, 4, 1)
    return collate([scene], [ask_questions(scene, rng, 3)])


def test_growth_changes_no_logit() -> None:
    model = build_model(4, seed=0)
    grown = grow_model(model, seed=1)
    assert grown.config.text_config.num_hidden_layers == 6
    atlas = torch.from_numpy(glyph_atlas(1, random.Random(0)))
    ticks = torch.from_numpy(tick_patches())
    with torch.no_grad():
        before, _ = FastForward(model, torch.float32)(small_batch(), atlas, ticks)
        after, _ = FastForward(grown, torch.float32)(small_batch(), atlas, ticks)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_trace_keeps_watched_heads() -> None:
    fast = FastForward(build_model(2, seed=0), torch.float32)
    fast.watched_heads = {1: [0, 1]}
    batch = small_batch()
    atlas = torch.from_numpy(glyph_atlas(1, random.Random(0)))
    with torch.no_grad():
        _, trace = fast(batch, atlas, torch.from_numpy(tick_patches()))
    length = batch.ids.shape[1]
    assert len(trace.hidden) == 2
    assert trace.attention[0].shape == (1, 2, length, length)
