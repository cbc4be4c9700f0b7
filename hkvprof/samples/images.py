"""Image files of samples: found, checked at load, decoded when needed. PIL is imported lazily."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hkvprof.errors import SampleError
from hkvprof.files import atomic as files

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 36_000_000
"""Largest image that is decoded, width times height: 6000 x 6000, some 500 MB while it is."""
MAX_IMAGE_BYTES = 256 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats of pictures; PIL knows dozens more, and runs another program for one of them (EPS)."""


def find_image(root: Path, written: str) -> str:
    """The absolute path of image `written` under `root`, its header checked. Raises SampleError."""
    if Path(written).is_absolute():
        raise SampleError(f"{written} is absolute: expected a path relative to {root}")
    path = inside(root, written)
    try:
        if not path.is_file():
            raise SampleError(f"no image file at {root / written}")
        with path.open("rb") as stream:
            check_header(stream, str(root / written))
    except OSError as error:
        raise SampleError(f"cannot read {root / written}: {error.strerror or error}") from None
    return str(path)


def inside(root: Path, written: str | Path) -> Path:
    """Where `written` leads below `root`, links followed. Raises SampleError if that is outside."""
    try:
        path = (root / written).resolve()
        within = path.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, NUL
        raise SampleError(f"{str(written)[:80]!r} is no path") from None
    if not within:
        raise SampleError(f"{written} leads out of {root}: images must lie inside the data folder")
    return path


def read_limited(path: Path) -> bytes:
    """The bytes of an image file. Raises SampleError for too many, OSError."""
    try:
        return files.read_limited(path, MAX_IMAGE_BYTES)
    except ValueError as error:
        raise SampleError(f"{path} has {error}") from None


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
            source = read_limited(Path(source))
        except OSError as error:
            raise SampleError(f"cannot read image {name}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd metadata and palettes
            if not isinstance(source, bytes):
                return ImageOps.exif_transpose(source).convert("RGB")
            image = _open(io.BytesIO(source), name)
            ImageOps.exif_transpose(image, in_place=True)  # a copy may have 256 MB
            return image.convert("RGB")
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise SampleError(f"image {name} is damaged ({type(error).__name__}: {error})") from None


def image_bytes(part: Mapping[str, Any]) -> bytes:
    """What identifies an image part: the bytes of its file, or its pixels."""
    if "path" in part:
        return read_limited(Path(part["path"]))
    image = part["image"]
    return image if isinstance(image, bytes) else image.tobytes()


def _open(stream: BinaryIO, name: str) -> Image:
    """Open lazily (header alone) and check the size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit below replaces PIL's warning
            Image.init()
            known = [name for name in FORMATS if name in Image.OPEN]  # not every build has AVIF
            image = Image.open(stream, formats=known)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        raise SampleError(
            f"{name} is not a readable image ({type(error).__name__}): expected one of "
            f"{', '.join(FORMATS)}"
        ) from None
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise SampleError(
            f"{name} is {width} x {height}: expected 1 to {MAX_PIXELS:,} pixels; scale it down"
        )
    return image
