"""Pictures in a terminal: every character shows two pixels, its upper half over its lower half."""

from __future__ import annotations

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

UPPER_HALF = "▀"


def shows_pictures(console: Console) -> bool:
    """Whether a console has colours and the character: not into a file, nor under NO_COLOR."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    return coloured and console.encoding.lower().replace("-", "") == "utf8"


def half_blocks(image: Image.Image, columns: int) -> Text:
    """A picture `columns` characters wide, in its own proportions.

    A character cell is taken to be twice as high as wide, so that a pixel is square.
    """
    height = max(2, 2 * round(columns * image.height / image.width / 2))
    small = image.convert("RGB").resize((columns, height), Image.Resampling.BOX)
    lines = []
    for row in range(0, height, 2):
        line = Text(no_wrap=True)
        for column in range(columns):
            upper, lower = (_colour(small, column, row + half) for half in (0, 1))
            line.append(UPPER_HALF, Style(color=upper, bgcolor=lower))
        lines.append(line)
    return Text("\n").join(lines)


def _colour(image: Image.Image, column: int, row: int) -> Color:
    pixel = image.getpixel((column, row))
    assert isinstance(pixel, tuple)
    return Color.from_rgb(*pixel)
