"""Cells, ticks and patches."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hkvprof.models.sources import TINYVL_FOLDER
from hkvprof.testbed.rendering import (
    BAND,
    CELL_PIXELS,
    add_ticks,
    cell_patches,
    draw_cell,
    glyph_atlas,
    render_grid,
    tick_patches,
)
from hkvprof.testbed.vocabulary import BLANK, CELL_CLASSES, GLYPHS, item_class


def glyph_class(character: str) -> int:
    """Class id of a text cell."""
    return 1 + GLYPHS.index(character)


def test_every_class_looks_different() -> None:
    drawn = {draw_cell(cell).tobytes() for cell in range(CELL_CLASSES)}
    assert len(drawn) == CELL_CLASSES


@pytest.mark.parametrize("seed", range(4))
def test_cells_leave_the_tick_band_white(seed: int) -> None:
    rng = random.Random(seed)
    for cell in range(CELL_CLASSES):
        pixels = np.array(draw_cell(cell, rng))
        assert (pixels[:BAND] == 255).all()
        assert (pixels[:, :BAND] == 255).all()


def test_ticks_tell_all_places_apart() -> None:
    white = np.full((CELL_PIXELS, CELL_PIXELS, 3), 255, np.uint8)
    ticked = {add_ticks(white.copy(), r, c).tobytes() for r in range(8) for c in range(8)}
    assert len(ticked) == 64


def test_jitter_comes_from_the_generator() -> None:
    cell = glyph_class("R")
    assert (
        draw_cell(cell, random.Random(1)).tobytes() == draw_cell(cell, random.Random(1)).tobytes()
    )
    variants = {draw_cell(cell, random.Random(seed)).tobytes() for seed in range(20)}
    assert len(variants) > 10


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 4), (6, 6)])
def test_patches_equal_the_image_processor(rows: int, columns: int) -> None:
    rng = random.Random(0)
    cells = [rng.randrange(CELL_CLASSES) for _ in range(rows * columns)]
    image = render_grid(cells, rows, columns)
    assert image.size == (columns * CELL_PIXELS, rows * CELL_PIXELS)
    settings = json.loads((TINYVL_FOLDER / "processor_config.json").read_text())["image_processor"]
    del settings["image_processor_type"]
    processor = Qwen2VLImageProcessorPil(**settings)
    encoded = processor(images=[image], return_tensors="np")
    assert encoded["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    ticks = tick_patches()[:rows, :columns].reshape(rows * columns, 4, -1)
    mine = np.stack([cell_patches(np.array(draw_cell(cell))) for cell in cells]) + ticks
    np.testing.assert_allclose(encoded["pixel_values"], mine.reshape(-1, 1176), atol=1e-5)


def test_atlas_holds_variants_class_by_class() -> None:
    atlas = glyph_atlas(2, random.Random(0))
    assert atlas.shape == (2 * CELL_CLASSES, 4, 1176)
    assert (atlas[2 * BLANK] == atlas[2 * BLANK + 1]).all()
    item = 2 * item_class(3, 0)
    assert (atlas[item] != atlas[item + 1]).any()
