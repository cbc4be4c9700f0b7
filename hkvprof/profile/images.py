"""Image files of samples: found, checked at load, decoded when needed. PIL is imported lazily."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hkvprof.errors import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
"""Largest image that is decoded, width times height: 8000 x 8000."""
MAX_IMAGE_BYTES = 256 * 2**20


def find_image(root: Path, written: str) -> str:
    """The absolute path of image `written` under `root`, its header checked. Raises SampleError."""
    if Path(written).is_absolute():
        raise SampleError(f"{written} is absolute: expected a path relative to {root}")
    path = (root / written).resolve()
    if not path.is_relative_to(root.resolve()):
        raise SampleError(f"{written} leads out of {root}: images must lie inside the data folder")
    if not path.is_file():
        raise SampleError(f"no image file at {root / written}")
    try:
        with path.open("rb") as stream:
            check_header(stream, str(root / written))
    except OSError as error:
        raise SampleError(f"cannot read {root / written}: {error.strerror or error}") from None
    return str(path)


def check_header(stream: BinaryIO, name: str) -> None:
    """Raise SampleError unless the header is an image's of at most MAX_PIXELS pixels."""
    size = stream.seek(0, io.SEEK_END)
    if size > MAX_IMAGE_BYTES:
        raise SampleError(f"{name} has {size:,} bytes: expected at most {MAX_IMAGE_BYTES:,}")
    stream.seek(0)
    _open(stream, name).close()


def decode(source: Any, name: str) -> Image:
    """An RGB image from a path, bytes or PIL image. Raises SampleError naming `name`."""
    from PIL import ImageOps

    if isinstance(source, str | Path):
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise SampleError(f"cannot read image {name}: {error.strerror or error}") from None
    try:
        image = _open(io.BytesIO(source), name) if isinstance(source, bytes) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata and palettes
            return ImageOps.exif_transpose(image).convert("RGB")
    except SampleError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise SampleError(f"image {name} is damaged ({type(error).__name__}: {error})") from None


def image_bytes(part: Mapping[str, Any]) -> bytes:
    """What identifies an image part: the bytes of its file, or its pixels."""
    if "path" in part:
        return Path(part["path"]).read_bytes()
    image = part["image"]
    return image if isinstance(image, bytes) else image.tobytes()


def _open(stream: BinaryIO, name: str) -> Image:
    """Open lazily (header alone) and check the size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit below replaces PIL's warning
            image = Image.open(stream)
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        raise SampleError(f"{name} is not a readable image ({type(error).__name__})") from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise SampleError(
            f"{name} is {width} x {height}: expected 1 to {MAX_PIXELS:,} pixels; scale it down"
        )
    return image
