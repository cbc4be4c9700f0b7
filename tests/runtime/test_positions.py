"""Positions of a conversation's tokens, as passes told them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hkvprof.runtime.positions import SeenPositions

CPU = torch.device("cpu")


def told(seen: SeenPositions, *where: Any) -> list[list[int]]:
    """Positions of some tokens, on every axis that was told."""
    positions = seen.of(*where, CPU)
    if positions.told is None:
        return [list(range(positions.first, positions.first + positions.count))]
    return positions.told.tolist()


def pass_of(seen: SeenPositions, before: int, *axes: Any) -> None:
    """A pass after `before` tokens; `axes` of rows of positions."""
    seen.before = before
    given: Tensor = torch.tensor(axes)
    seen.see(given, given.shape[1])


def test_without_being_told_positions_count_from_the_end_of_the_padding() -> None:
    seen = SeenPositions()
    assert told(seen, 0, 3, 20, 2, 4) == [[2, 3, 4, 5]]
    assert seen.nbytes == 0


def test_padding_chunks_and_steps() -> None:
    seen = SeenPositions()
    pass_of(seen, 0, [[1, 1, 0, 1], [5, 6, 7, 8]])
    pass_of(seen, 4, [[2, 3], [9, 10]])
    pass_of(seen, 6, [[99], [99]])  # a step is not read: it counts on
    assert told(seen, 0, 2, 8, 0, 6) == [[0, 1, 2, 3, 4, 5]]
    assert told(seen, 1, 0, 8, 1, 7) == [[6, 7, 8, 9, 10, 11, 12]]
    assert seen.nbytes == 0


def test_several_axes_are_kept_once_per_row_and_count_on() -> None:
    seen = SeenPositions()
    pass_of(seen, 0, [[0, 1, 1, 1]], [[0, 1, 1, 2]], [[0, 1, 2, 1]])
    assert told(seen, 0, 1, 6, 1, 4) == [[1, 1, 2, 3], [1, 2, 3, 4], [2, 1, 2, 3]]
    assert seen.nbytes == 3 * 5 * 4
    first, second = seen.of(0, 1, 6, 0, 2, CPU), seen.of(0, 1, 6, 2, 3, CPU)
    assert first.told is not None
    assert second.told is not None
    assert first.told.untyped_storage().data_ptr() == second.told.untyped_storage().data_ptr()
    seen.take_rows([0, 0])
    assert seen.nbytes == 3 * 5 * 4
    assert told(seen, 1, 1, 6, 1, 4) == [[1, 1, 2, 3], [1, 2, 3, 4], [2, 1, 2, 3]]


def test_axes_that_agree_and_count_up_need_no_memory() -> None:
    seen = SeenPositions()
    pass_of(seen, 0, *[[[4, 5, 6]]] * 3)
    assert told(seen, 0, 0, 5, 0, 5) == [[4, 5, 6, 7, 8]]


def test_what_was_taken_back_is_forgotten() -> None:
    seen = SeenPositions()
    pass_of(seen, 0, [[0, 1, 2, 3]])
    pass_of(seen, 4, [[4, 5, 6]])
    branch = copy.deepcopy(seen)
    pass_of(seen, 5, [[90, 91]])
    assert told(seen, 0, 0, 8, 0, 8) == [[0, 1, 2, 3, 4, 90, 91, 92]]
    assert told(branch, 0, 0, 8, 0, 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_one_row_of_positions_is_for_all_rows() -> None:
    seen = SeenPositions()
    seen.see(torch.tensor([[[3, 4, 6]]]), 2)
    assert told(seen, 1, 0, 3, 0, 3) == [[3, 4, 6]]
