"""Images of requests: limits of all together. What single ones may be: test_server.py."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from hkvprof.samples import images
from hkvprof.serve import media
from hkvprof.serve.media import ImageReader
from hkvprof.serve.request import RefusedRequestError


def png(width: int, height: int) -> str:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def test_an_image_is_what_was_sent() -> None:
    image = ImageReader(None)(png(5, 7))
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((5, 7), "RGB", (255, 0, 0))


def test_all_images_of_a_request_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST_PIXELS", 100)
    reader = ImageReader(None)
    for _ in range(4):
        reader(png(5, 5))
    with pytest.raises(RefusedRequestError, match="more than 100 pixels together"):
        reader(png(1, 1))
    assert ImageReader(None)(png(10, 10)).size == (10, 10)


def test_one_image_has_the_limit_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(RefusedRequestError, match="expected 1 to 100 pixels"):
        ImageReader(None)(png(11, 10))


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "a.png", "", "\0"])
def test_without_a_folder_no_file_is_read(url: str) -> None:
    with pytest.raises(RefusedRequestError, match="--allowed-media"):
        ImageReader(None)(url)


@pytest.mark.parametrize("url", ["\0", "a" * 5000, "file://%00", ".", "..", "//etc/passwd"])
def test_names_that_are_no_images_below_the_folder(url: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedRequestError):
        ImageReader(tmp_path)(url)
