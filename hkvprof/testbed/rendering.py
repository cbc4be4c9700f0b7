"""Drawing of cells, ruler ticks and whole images, and the patches the vision tower sees.

One cell is 28 x 28 px: one merged visual token of the Qwen2-VL family. The top and left bands of
4 px carry ruler ticks (row and column number), because at this size the rotary positions alone
do not make rows and columns readable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from hkvprof.testbed.vocabulary import (
    BLANK,
    CELL_CLASSES,
    COLOUR_NAMES,
    COLOURS,
    GLYPHS,
    MAX_COLUMNS,
    MAX_ROWS,
    SHAPE_NAMES,
    colour_of,
    is_glyph,
    shape_of,
)

CELL_PIXELS = 28
BAND = 4
"""Width in px of the band that is kept for ticks."""
PATCH_VALUES = 3 * 2 * 14 * 14
"""Values of one patch: channel x temporal x height x width."""

_WHITE = (255, 255, 255)
_TICK_GREY = 90
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])

Pixels = npt.NDArray[np.uint8]
Patches = npt.NDArray[np.float32]
Colour = tuple[int, int, int]
Jitter = Callable[[int, int], int]


@dataclass(frozen=True)
class _Pen:
    """Where and how an item is drawn: centre and radius in px, and its colour."""

    draw: ImageDraw.ImageDraw
    x: int
    y: int
    radius: int
    colour: Colour

    def box(self, half_width: int, half_height: int) -> tuple[int, int, int, int]:
        return (
            self.x - half_width,
            self.y - half_height,
            self.x + half_width,
            self.y + half_height,
        )

    def polygon(self, points: Sequence[tuple[float, float]]) -> None:
        """Fill a polygon given in units of the radius around the centre."""
        scaled = [(self.x + px * self.radius, self.y + py * self.radius) for px, py in points]
        self.draw.polygon(scaled, fill=self.colour)


def _draw_star(pen: _Pen) -> None:
    corners = []
    for corner in range(10):
        reach = 1 if corner % 2 == 0 else 0.42
        angle = corner * math.pi / 5
        corners.append((math.sin(angle) * reach, -math.cos(angle) * reach))
    pen.polygon(corners)


def _draw_cross(pen: _Pen) -> None:
    pen.draw.rectangle(pen.box(pen.radius, 2), fill=pen.colour)
    pen.draw.rectangle(pen.box(2, pen.radius), fill=pen.colour)


_DRAW_SHAPE: dict[str, Callable[[_Pen], None]] = {
    "disc": lambda p: p.draw.ellipse(p.box(p.radius, p.radius), fill=p.colour),
    "ring": lambda p: p.draw.ellipse(p.box(p.radius, p.radius), outline=p.colour, width=3),
    "square": lambda p: p.draw.rectangle(p.box(p.radius - 1, p.radius - 1), fill=p.colour),
    "bar": lambda p: p.draw.rectangle(p.box(p.radius, 3), fill=p.colour),
    "triangle": lambda p: p.polygon([(0, -1), (1, 1), (-1, 1)]),
    "diamond": lambda p: p.polygon([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]),
    "cross": _draw_cross,
    "star": _draw_star,
}


def _middle(low: int, high: int) -> int:
    return (low + high) // 2


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_glyph(image: Image.Image, character: str, jitter: Jitter) -> None:
    mask = Image.new("L", image.size, 0)
    font = _font(jitter(20, 23))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    width, height = right - left, bottom - top
    room = CELL_PIXELS - BAND - 1
    x = BAND + (room - width) // 2 + jitter(-1, 1)
    y = BAND + (room - height) // 2 + jitter(-1, 1)
    x = max(BAND, min(x, CELL_PIXELS - width))
    y = max(BAND, min(y, CELL_PIXELS - height))
    ImageDraw.Draw(mask).text((x - left, y - top), character, fill=255, font=font)
    ink = np.array(mask)
    ink[:BAND] = 0
    ink[:, :BAND] = 0
    grey = jitter(0, 60)
    image.paste((grey, grey, grey), (0, 0), Image.fromarray(ink))


def _draw_item(image: Image.Image, colour: str, shape: str, jitter: Jitter) -> Image.Image:
    red, green, blue = (max(0, min(255, channel + jitter(-12, 12))) for channel in COLOURS[colour])
    radius = jitter(8, 10)
    centre = 16
    pen = _Pen(
        ImageDraw.Draw(image),
        x=centre + jitter(-1, 1),
        y=centre + jitter(-1, 1),
        radius=radius,
        colour=(red, green, blue),
    )
    _DRAW_SHAPE[shape](pen)
    pixels = np.array(image)
    pixels[:BAND] = 255
    pixels[:, :BAND] = 255
    return Image.fromarray(pixels)


def draw_cell(cell: int, rng: random.Random | None = None) -> Image.Image:
    """One cell without ticks; `rng` jitters size, place and shade (without it: the mean)."""
    jitter = rng.randint if rng is not None else _middle
    image = Image.new("RGB", (CELL_PIXELS, CELL_PIXELS), _WHITE)
    if cell == BLANK:
        return image
    if is_glyph(cell):
        _draw_glyph(image, GLYPHS[cell - 1], jitter)
        return image
    return _draw_item(image, COLOUR_NAMES[colour_of(cell)], SHAPE_NAMES[shape_of(cell)], jitter)


def add_ticks(pixels: Pixels, row: int, column: int) -> Pixels:
    """Draw the ruler marks of a cell in place: the row on the left edge, the column on the top."""
    pixels[4 + 3 * row : 6 + 3 * row, 0:3] = _TICK_GREY
    pixels[0:3, 4 + 3 * column : 6 + 3 * column] = _TICK_GREY
    return pixels


def render_grid(
    cells: Sequence[int], rows: int, columns: int, rng: random.Random | None = None
) -> Image.Image:
    """The image of `rows` x `columns` cells (class ids in row-major order)."""
    size = CELL_PIXELS
    canvas = np.empty((rows * size, columns * size, 3), np.uint8)
    for position, cell in enumerate(cells):
        row, column = divmod(position, columns)
        drawn = add_ticks(np.array(draw_cell(cell, rng)), row, column)
        canvas[row * size : (row + 1) * size, column * size : (column + 1) * size] = drawn
    return Image.fromarray(canvas)


def cell_patches(pixels: Pixels) -> Patches:
    """uint8 [28, 28, 3] -> float32 [4, 1176], as Qwen2VLImageProcessor lays out a merged token.

    Order of patches: 2 x 2 merge order; of values: channel, temporal (the frame repeated), height,
    width.
    """
    scaled = (pixels.astype(np.float64) / 255 - _CLIP_MEAN) / _CLIP_STD
    split = scaled.transpose(2, 0, 1).reshape(3, 2, 14, 2, 14)
    patches = split.transpose(1, 3, 0, 2, 4).reshape(4, 3, 1, 14, 14)
    return np.repeat(patches, 2, axis=2).reshape(4, PATCH_VALUES).astype(np.float32)


def glyph_atlas(variants: int, rng: random.Random) -> Patches:
    """Every cell class in `variants` jittered drawings: [classes * variants, 4, 1176]."""
    drawn = [
        cell_patches(np.array(draw_cell(cell, rng)))
        for cell in range(CELL_CLASSES)
        for _ in range(variants)
    ]
    return np.stack(drawn)


def tick_patches() -> Patches:
    """What the ticks of (row, column) add to a cell's patches: [8, 8, 4, 1176].

    Patches are linear in the pixels and ticks lie in a band that cells leave white, so cell and
    ticks can be embedded apart and added.
    """
    white = np.full((CELL_PIXELS, CELL_PIXELS, 3), 255, np.uint8)
    blank = cell_patches(white)
    ticked = [
        cell_patches(add_ticks(white.copy(), row, column)) - blank
        for row in range(MAX_ROWS)
        for column in range(MAX_COLUMNS)
    ]
    return np.stack(ticked).reshape(MAX_ROWS, MAX_COLUMNS, 4, PATCH_VALUES)
