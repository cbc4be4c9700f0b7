"""Training batches: many questions packed on one shared context.

One row holds a scene's context and then its questions one after another. Every question has its
own segment: it sees the context and itself, and its positions restart after the context, so that
each question gets exactly the logits it would get alone, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from hkvprof.testbed.generator import TASKS
from hkvprof.testbed.scenes import Scene
from hkvprof.testbed.tasks import SceneQuestion
from hkvprof.testbed.vocabulary import (
    END_OF_TURN,
    IMAGE_PAD,
    MAX_LABEL,
    PAD,
    START_OF_TURN,
    TOKEN_IDS,
    VISION_END,
    VISION_START,
    encode_text,
)
from tools.tinyvl.roles import (
    HISTOGRAM_SIZE,
    IGNORE,
    NO_ROLE,
    ROLES,
    Ints,
    image_roles,
    label_shares,
    question_roles,
    scope_histogram,
    text_roles,
)

TASK_INDEX = {name: index for index, name in enumerate(TASKS)}


@dataclass(frozen=True)
class PackedRow:
    """One scene with its questions as token arrays of one length."""

    ids: Ints
    positions: Ints
    """[3, length]: temporal, height, width."""
    segments: Ints
    """0 for the context, then 1, 2, ... per question."""
    targets: Ints
    roles: Ints
    """[length, roles]"""
    first_answers: list[int]
    """Per question, the row whose logits give the first token of the reply."""


class _RowBuilder:
    """Collects the pieces of a row; `position` is the next free text position."""

    def __init__(self) -> None:
        self.position = 0
        self.length = 0
        self._ids: list[Ints] = []
        self._positions: list[Ints] = []
        self._segments: list[Ints] = []
        self._targets: list[Ints] = []
        self._roles: list[Ints] = []

    def add(
        self,
        ids: Sequence[int],
        positions: Ints | None = None,
        roles: Ints | None = None,
        targets: Sequence[int] | None = None,
        segment: int = 0,
    ) -> None:
        """Append tokens; without positions they are text and take the next ones."""
        count = len(ids)
        if positions is None:
            positions = np.tile(np.arange(self.position, self.position + count), (3, 1))
            self.position += count
        self._ids.append(np.asarray(ids, np.int64))
        self._positions.append(positions)
        self._segments.append(np.full(count, segment, np.int64))
        self._targets.append(np.full(count, IGNORE) if targets is None else np.asarray(targets))
        self._roles.append(np.tile(NO_ROLE, (count, 1)) if roles is None else roles)
        self.length += count

    def build(self, first_answers: list[int]) -> PackedRow:
        return PackedRow(
            ids=np.concatenate(self._ids),
            positions=np.concatenate(self._positions, axis=1),
            segments=np.concatenate(self._segments),
            targets=np.concatenate(self._targets).astype(np.int64),
            roles=np.concatenate(self._roles),
            first_answers=first_answers,
        )


def _image_positions(start: int, rows: int, columns: int) -> Ints:
    """M-RoPE positions [3, rows * columns] of an image that starts at text position `start`."""
    places = np.arange(rows * columns)
    return np.stack(
        [np.full_like(places, start), start + places // columns, start + places % columns]
    )


def _add_context(row: _RowBuilder, scene: Scene) -> None:
    row.add([TOKEN_IDS[START_OF_TURN], TOKEN_IDS["user"]])
    for part in scene.prompt_parts():
        if isinstance(part, str):
            row.add(encode_text(part), roles=text_roles(scene, part))
            continue
        row.add([TOKEN_IDS[VISION_START]])
        positions = _image_positions(row.position, scene.rows, scene.columns)
        count = scene.rows * scene.columns
        row.add([TOKEN_IDS[IMAGE_PAD]] * count, positions, image_roles(scene, part))
        row.position += max(scene.rows, scene.columns)
        row.add([TOKEN_IDS[VISION_END]])


def pack_scene(scene: Scene, questions: Sequence[SceneQuestion]) -> PackedRow:
    """The chat layout of the prompt (as the chat template gives it) with all questions packed."""
    row = _RowBuilder()
    _add_context(row, scene)
    after_context = row.position
    first_answers: list[int] = []
    turn_end = (TOKEN_IDS[END_OF_TURN],)
    reply_start = (*turn_end, TOKEN_IDS[START_OF_TURN], TOKEN_IDS["assistant"])
    for segment, question in enumerate(questions, start=1):
        prompt = encode_text(question.text) + reply_start
        reply = encode_text(question.reply) + turn_end
        roles = np.tile(NO_ROLE, (len(prompt) - 1 + len(reply), 1))
        roles[len(prompt) - 1 :] = question_roles(question.text)
        first_answers.append(row.length + len(prompt) - 1)
        row.position = after_context
        row.add(
            prompt + reply[:-1],
            roles=roles,
            targets=(IGNORE,) * (len(prompt) - 1) + reply,
            segment=segment,
        )
    return row.build(first_answers)


@dataclass(frozen=True)
class Batch:
    """Packed rows of scenes of one grid, padded on the right to length L.

    T counts target tokens, Q questions, N images, in the order of the rows.
    """

    rows: int
    columns: int
    ids: Tensor
    """[B, L]"""
    positions: Tensor
    """[3, B, L]"""
    mask: Tensor
    """bool [B, 1, L, L]: who sees whom."""
    selected: Tensor
    """bool [B, L]: rows with a target."""
    targets: Tensor
    """[T]"""
    question_of: Tensor
    """[T]: the question that a target belongs to."""
    tasks: Tensor
    """[Q]"""
    roles: Tensor
    """[B, L, roles]"""
    cells: Tensor
    """[N, rows * columns]: class ids, or positions in an atlas of drawings (see vary_cells)."""
    histogram_rows: Tensor
    """[H]: first answer rows (b * L + l) of questions that sum up a scope."""
    histograms: Tensor
    """[H, 18]: shares of colours and of shapes (each with none) in the scope."""
    share_rows: Tensor
    shares: Tensor
    """[S, labels + 1]: what part of the items asked for each label holds."""
    number_rows: Tensor
    numbers: Tensor
    """[K]: the number that is the reply."""

    def vary_cells(self, variants: int, rng: np.random.Generator) -> Batch:
        """Each cell as one of the drawings of an atlas with `variants` per class."""
        drawn = torch.from_numpy(rng.integers(0, variants, tuple(self.cells.shape)))
        return replace(self, cells=self.cells * variants + drawn)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            if isinstance(getattr(self, field.name), Tensor)
            else getattr(self, field.name)
            for field in fields(self)
        }
        return Batch(**moved)


def _visibility(segments: Tensor) -> Tensor:
    """bool [B, 1, L, L]: earlier tokens of the context or of the own segment."""
    length = segments.shape[1]
    keys, queries = segments[:, None, :], segments[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (((keys == 0) | (keys == queries)) & causal)[:, None]


def collate(scenes: Sequence[Scene], questions: Sequence[Sequence[SceneQuestion]]) -> Batch:
    """Pack and pad scenes of one grid, each with its questions."""
    packed = [pack_scene(scene, asked) for scene, asked in zip(scenes, questions, strict=True)]
    count, length = len(packed), max(len(row.ids) for row in packed)
    ids = torch.full((count, length), TOKEN_IDS[PAD])
    positions = torch.zeros((3, count, length), dtype=torch.long)
    segments = torch.full((count, length), -1)
    targets = torch.full((count, length), IGNORE)
    roles = torch.full((count, length, len(ROLES)), IGNORE)
    for index, row in enumerate(packed):
        size = len(row.ids)
        ids[index, :size] = torch.from_numpy(row.ids)
        positions[:, index, :size] = torch.from_numpy(row.positions)
        segments[index, :size] = torch.from_numpy(row.segments)
        targets[index, :size] = torch.from_numpy(row.targets)
        roles[index, :size] = torch.from_numpy(row.roles)
    selected = targets != IGNORE
    before = torch.tensor([0, *(len(asked) for asked in questions)]).cumsum(0)[:-1]
    numbered = [
        (index * length + first, scene, question)
        for index, (row, scene, asked) in enumerate(zip(packed, scenes, questions, strict=True))
        for first, question in zip(row.first_answers, asked, strict=True)
    ]
    with_scope = [entry for entry in numbered if entry[2].scope]
    with_shares = [entry for entry in numbered if entry[2].shares]
    with_number = [entry for entry in numbered if entry[2].number is not None]
    return Batch(
        rows=scenes[0].rows,
        columns=scenes[0].columns,
        ids=ids,
        positions=positions,
        mask=_visibility(segments),
        selected=selected,
        targets=targets[selected],
        question_of=(segments - 1 + before[:, None])[selected],
        tasks=torch.tensor([TASK_INDEX[question.task] for _, _, question in numbered]),
        roles=roles,
        cells=torch.tensor([cells for scene in scenes for cells in scene.images]),
        histogram_rows=torch.tensor([row for row, _, _ in with_scope], dtype=torch.long),
        histograms=torch.tensor([scope_histogram(s, q.scope) for _, s, q in with_scope]).reshape(
            len(with_scope), HISTOGRAM_SIZE
        ),
        share_rows=torch.tensor([row for row, _, _ in with_shares], dtype=torch.long),
        shares=torch.tensor([label_shares(q) for _, _, q in with_shares]).reshape(
            len(with_shares), MAX_LABEL + 1
        ),
        number_rows=torch.tensor([row for row, _, _ in with_number], dtype=torch.long),
        numbers=torch.tensor([float(q.number or 0) for _, _, q in with_number]),
    )
