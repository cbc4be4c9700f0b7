"""Pictures made of half blocks: which pixel stands where, and where there are none."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from hkvprof.report.picture import UPPER_HALF, half_blocks, shows_pictures


def test_upper_pixel_is_the_letter_and_lower_its_ground() -> None:
    image = Image.new("RGB", (2, 2))
    for place, colour in {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255)}.items():
        image.putpixel(place, colour)
    text = half_blocks(image, 2)
    assert text.plain == UPPER_HALF * 2
    styles = [str(span.style) for span in text.spans]
    assert styles == ["#ff0000 on #0000ff", "#00ff00 on #000000"]


@pytest.mark.parametrize(("size", "lines"), [((168, 168), 15), ((300, 10), 1), ((168, 84), 8)])
def test_proportions_are_the_picture_s(size: tuple[int, int], lines: int) -> None:
    rows = half_blocks(Image.new("L", size), 30).plain.split("\n")
    assert len(rows) == lines
    assert {len(row) for row in rows} == {30}


def test_pictures_need_colours_and_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)

    def told(encoding: str = "utf-8", **more: object) -> bool:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return shows_pictures(Console(file=file, **{"color_system": "truecolor", **more}))  # type: ignore[arg-type]

    assert told(force_terminal=True)
    assert not told(force_terminal=False)
    assert not told(force_terminal=True, no_color=True)
    assert not told(force_terminal=True, color_system=None)
    assert not told("latin-1", force_terminal=True)
