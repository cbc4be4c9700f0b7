"""Packed rows, their masks, and the targets of the auxiliary heads."""

from __future__ import annotations

import random

import pytest
import torch

from hkvprof.testbed.generator import ask_questions
from hkvprof.testbed.scenes import Scene, draw_scene
from hkvprof.testbed.tasks import SceneQuestion
from hkvprof.testbed.vocabulary import END_OF_TURN, IMAGE_PAD, PAD, TOKEN_IDS, encode_text
from tools.tinyvl.batching import Batch, collate, pack_scene
from tools.tinyvl.roles import IGNORE, ROLE_INDEX, ROLES, question_roles

LABELS = (4, 9, 21)


@pytest.fixture
def scenes() -> list[Scene]:
    rng = random.Random(2)
    return [draw_scene(rng, LABELS, 4, 4, facts, text_share=0.2) for facts in (1, 3)]


@pytest.fixture
def asked(scenes: list[Scene]) -> list[list[SceneQuestion]]:
    rng = random.Random(3)
    return [ask_questions(scene, rng, count) for scene, count in zip(scenes, (2, 40), strict=True)]


@pytest.fixture
def batch(scenes: list[Scene], asked: list[list[SceneQuestion]]) -> Batch:
    return collate(scenes, asked)


def test_targets_are_the_replies(batch: Batch, asked: list[list[SceneQuestion]]) -> None:
    end = TOKEN_IDS[END_OF_TURN]
    for index, question in enumerate(question for questions in asked for question in questions):
        reply = batch.targets[batch.question_of == index].tolist()
        assert reply == [*encode_text(question.reply), end]
    assert len(batch.tasks) == sum(map(len, asked))


def test_questions_do_not_see_each_other(
    scenes: list[Scene], asked: list[list[SceneQuestion]]
) -> None:
    batch, row = collate(scenes[:1], asked[:1]), pack_scene(scenes[0], asked[0])
    segments = torch.from_numpy(row.segments)
    mask = batch.mask[0, 0]
    first, second = (segments == 1).nonzero().flatten(), (segments == 2).nonzero().flatten()
    context = (segments == 0).nonzero().flatten()
    assert not mask[second][:, first].any()
    assert mask[second][:, context].all()
    assert not mask.triu(1).any()
    starts = {
        segment: row.positions[:, row.segments == segment][:, 0].tolist() for segment in (1, 2)
    }
    assert starts[1] == starts[2]


def test_rows_are_padded_on_the_right(batch: Batch) -> None:
    padding = batch.ids == TOKEN_IDS[PAD]
    assert padding[0].any()
    assert not padding[1].any()
    assert not (padding & batch.selected).any()


def test_image_roles_describe_the_cells(scenes: list[Scene]) -> None:
    row = pack_scene(scenes[0], [])
    roles = row.roles[row.ids == TOKEN_IDS[IMAGE_PAD]].reshape(len(LABELS), 16, len(ROLES))
    assert roles[:, 0, ROLE_INDEX["label"]].tolist() == list(LABELS)
    assert roles[0, :, ROLE_INDEX["row"]].tolist() == [position // 4 for position in range(16)]
    assert roles[0, :, ROLE_INDEX["column"]].tolist() == [position % 4 for position in range(16)]
    assert (roles[0, :, ROLE_INDEX["previous shape"]] == IGNORE).all()
    assert (roles[1, :, ROLE_INDEX["previous shape"]] == roles[0, :, ROLE_INDEX["shape"]]).all()
    for role, classes in ROLES.items():
        assert roles[..., ROLE_INDEX[role]].max() < classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what is at B3 of image #7", {"label": 7, "row": 1, "column": 2}),
        ("list row A of image #32", {"label": 32, "row": 0}),
        ("where is the red bar of image #1", {"label": 1, "colour": 0, "shape": 7}),
        ("which image has more disc #4 or #9", {"shape": 0}),
    ],
)
def test_question_roles(text: str, expected: dict[str, int]) -> None:
    found = dict(zip(ROLES, question_roles(text), strict=True))
    assert {role: value for role, value in found.items() if value != IGNORE} == expected


def test_sums_are_shares(batch: Batch) -> None:
    colours, shapes = batch.histograms.split(9, dim=1)
    torch.testing.assert_close(colours.sum(1), torch.ones(len(colours)))
    torch.testing.assert_close(shapes.sum(1), torch.ones(len(shapes)))
    torch.testing.assert_close(batch.shares.sum(1), torch.ones(len(batch.shares)))
    assert min(len(batch.histograms), len(batch.shares), len(batch.numbers)) > 0
    assert len(batch.numbers) == len(batch.number_rows)
    first_rows = torch.cat([batch.histogram_rows, batch.share_rows, batch.number_rows])
    assert batch.selected.flatten()[first_rows].all()


def test_batches_without_sums_keep_their_shape(scenes: list[Scene]) -> None:
    questions = [ask_questions(scene, random.Random(0), 2, names=["cell"]) for scene in scenes]
    batch = collate(scenes, questions)
    assert batch.histograms.shape == (0, 18)
    assert batch.shares.shape == (0, 33)
