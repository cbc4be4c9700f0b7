"""Images of requests: base64 in the request, or files below one folder. Nothing is fetched."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hkvprof.errors import SampleError
from hkvprof.samples import images
from hkvprof.serve.request import RefusedRequestError

MOST_PIXELS = 4 * images.MAX_PIXELS
"""Of all images of a request together: some 430 MB once they are decoded."""


class ImageReader:
    """Opens the images of one request: RGB PIL images from `data:` URLs, or files below `allowed`.

    Files are named by `file:` URLs or by paths relative to the folder; links are followed.
    """

    def __init__(self, allowed: Path | None) -> None:
        self._allowed = allowed
        self._pixels = 0

    def __call__(self, url: str) -> Any:
        """The image behind a URL. Raises RefusedRequestError."""
        image = _open(url, self._allowed)
        self._pixels += image.width * image.height
        if self._pixels > MOST_PIXELS:
            raise RefusedRequestError(
                f"the images have more than {MOST_PIXELS:,} pixels together: send smaller ones"
            )
        return image


def _open(url: str, allowed: Path | None) -> Any:
    kind = urlsplit(url[:64]).scheme.lower()
    try:
        if kind == "data":
            return images.decode(_data(url), "in the request")
        if kind not in ("", "file"):
            raise RefusedRequestError(
                f"{kind}: images are not fetched from elsewhere: send a data: URL with base64"
            )
        if allowed is None:
            raise RefusedRequestError(
                "files of the server are not read: send a data: URL with base64, or start it with "
                "--allowed-media DIR"
            )
        written = unquote(urlsplit(url).path) if kind else url
        path = images.inside(allowed, written)
        if not path.is_file():
            raise RefusedRequestError(f"no image file {written!r} in the folder of --allowed-media")
        return images.decode(path, repr(written))
    except (SampleError, OSError) as error:
        raise RefusedRequestError(str(error)) from None


def _data(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RefusedRequestError(
            "a data: URL of an image must be base64: data:image/png;base64,..."
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedRequestError("the data: URL does not hold valid base64") from None
