"""From whatever a data set writes for a picture to a part of a message, checked but not decoded."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hkvprof.errors import SampleError
from hkvprof.samples import images
from hkvprof.samples.parse import MAX_PARTS
from hkvprof.samples.videos import file_part

Part = dict[str, Any]
Given = tuple[str, object]
"""A field, as errors call it, and what stands there for a picture."""

MAX_PATH_CHARACTERS = 4096
_ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")
"""How JPEG, PNG, GIF, WebP and BMP files begin in base64; a path of this length is none."""
_SHORTEST_ENCODED = 256
_ADVICE = "--image-folder names the folder where they are"


def wrong(field: str, expected: str, found: object) -> SampleError:
    """The error for a field that holds something else than what is `expected`."""
    text = found if isinstance(found, str) else repr(found)
    line = text.encode("unicode_escape").decode("ascii")
    shown = line if len(line) <= 60 else f"{line[:57]}..."
    return SampleError(f"field '{field}': expected {expected}, found {shown}")


def listed(value: object, field: str) -> list[Given]:
    """One picture, several, or none, each with the name of its field. Raises SampleError for more
    pictures than a sample may have."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if not isinstance(value, list | tuple):
        return [(field, value)]
    if len(value) > MAX_PARTS:
        raise wrong(field, f"at most {MAX_PARTS} pictures", f"{len(value)} pictures")
    return [(f"{field}[{number}]", entry) for number, entry in enumerate(value)]


@contextmanager
def _path(written: str, field: str, kind: str) -> Iterator[None]:
    """Within, a path that a field gives is looked for: what fails names the field. Raises
    SampleError for what no path can be."""
    if not written.isprintable() or not 0 < len(written) <= MAX_PATH_CHARACTERS:
        raise wrong(field, f"the path of {kind}", written)
    try:
        yield
    except OSError as error:
        raise SampleError(
            f"field '{field}': cannot read {written[:80]}: {error.strerror or error}"
        ) from None
    except SampleError as error:
        raise SampleError(f"field '{field}': {error}") from None


@dataclass(frozen=True)
class Pictures:
    """The folders in which the pictures of a data set may lie, in the order in which they are
    asked. No path leads out of them."""

    roots: tuple[Path, ...]

    def part(self, value: object, field: str) -> Part:
        """The image part for a path, a `file:` or `data:` address, base64, the bytes of a file, an
        image column's entry or a PIL image. Raises SampleError naming the field."""
        if isinstance(value, Mapping):
            value = _of_column(value, field)
        if isinstance(value, str):
            return self._written(value, field)
        if isinstance(value, bytes):
            return _checked(value, field)
        if hasattr(value, "convert") and hasattr(value, "save"):
            return _checked(_as_png(value, field), field)
        raise wrong(field, "a picture: a path, base64, or an image column", value)

    def located(self, written: str, field: str, names: Iterable[str] = ()) -> str:
        """The absolute path of a picture, its header checked; `names` are other ways to call it.

        Raises SampleError naming the field where there is none, or none inside the folders.
        """
        wanted = [written, *names]
        with _path(written, field, "a picture"):
            found = self._first(wanted)
            if found is None:
                raise SampleError(self._nowhere(wanted))
            with found.open("rb") as stream:
                images.check_header(stream, str(found))
        return str(found)

    def film(self, written: str, field: str, fps: float) -> Part:
        """The video part for a video file inside one of the folders. Raises SampleError naming the
        field, UsageError where the extra that decodes it is not installed."""
        plain = written.removeprefix("file://")
        wanted = [plain, unquote(plain)]
        with _path(written, field, "a video"):
            if written.startswith(("http://", "https://")):
                raise SampleError(
                    f"{written[:80]} is a web address, and videos are not fetched: download them, "
                    "and write their paths"
                )
            found = self._first(wanted)
            if found is None:
                raise SampleError(self._nowhere(wanted).replace("image", "video", 1))
            return file_part(found, fps)

    def folder(self, written: str, field: str) -> Path:
        """A folder inside one of the folders. Raises SampleError naming the field."""
        plain = written.removeprefix("file://")
        with _path(written, field, "a folder"):
            for root in self.roots:
                if is_inside(root, plain) and (root / plain).is_dir():
                    return images.inside(root, plain)
            raise SampleError(self._nowhere([plain]))

    def _first(self, wanted: list[str]) -> Path | None:
        """The first file of these names that lies inside one of the folders."""
        for root in self.roots:
            for name in wanted:
                try:
                    path = images.inside(root, name)
                except SampleError:
                    continue
                if path.is_file():
                    return path
        return None

    def _nowhere(self, wanted: list[str]) -> str:
        asked = " and ".join(str(root) for root in self.roots) or "no folder"
        within = [is_inside(root, wanted[0]) for root in self.roots]
        if any(within) if Path(wanted[0]).is_absolute() else all(within):
            return f"no image file {' or '.join(dict.fromkeys(wanted))} in {asked}; {_ADVICE}"
        return (
            f"{wanted[0]} leads out of {asked}: images must lie inside the data folder; {_ADVICE}"
        )

    def _written(self, text: str, field: str) -> Part:
        head = text[:16].lower()
        if head.startswith("data:"):
            return _checked(_of_address(text, field), field)
        if head.startswith(("http://", "https://", "gs://", "s3://")):
            raise SampleError(
                f"field '{field}': {text[:80]} is a web address, and pictures are not fetched: "
                "download them, and write their paths"
            )
        if head.startswith("file:"):
            path = text[len("file:") :].removeprefix("//").removeprefix("localhost")
            return {"type": "image", "path": self.located(path, field, [unquote(path)])}
        if len(text) >= _SHORTEST_ENCODED and text.startswith(_ENCODED):
            return _checked(_decoded(text, field), field)
        return {"type": "image", "path": self.located(text, field)}


def is_inside(root: Path, written: str) -> bool:
    """Whether a path leads to a place below `root`, links followed."""
    try:
        images.inside(root, written)
    except SampleError:
        return False
    return True


def _of_column(value: Mapping[Any, Any], field: str) -> object:
    """What an image column or an `image_url` object holds: bytes, a path or an address."""
    for key in ("bytes", "url", "path", "image", "base64"):
        if value.get(key) is not None:
            return value[key]
    raise wrong(field, "a picture: its bytes, path or url", dict(value))


def _checked(data: bytes, field: str) -> Part:
    try:
        images.check_header(io.BytesIO(data), "the picture")
    except SampleError as error:
        raise SampleError(f"field '{field}': {error}") from None
    return {"type": "image", "image": data}


def _of_address(text: str, field: str) -> bytes:
    """The bytes of a `data:` address (RFC 2397), which must be base64."""
    head, comma, body = text.partition(",")
    if not comma or "base64" not in head[:128].lower():
        raise wrong(field, "a data: address with base64, as data:image/png;base64,...", head)
    return _decoded(body, field)


def _decoded(text: str, field: str) -> bytes:
    most = images.MAX_IMAGE_BYTES
    if len(text) > most // 3 * 4:
        raise wrong(field, f"a picture of at most {most:,} bytes", f"{len(text):,} characters")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"field '{field}': the base64 is broken ({error})") from None


def _as_png(image: Any, field: str) -> bytes:
    """A PIL image as the bytes of a PNG file: its pixels, unchanged, as RGB or grey."""
    stream = io.BytesIO()
    try:
        kept = image if image.mode in ("RGB", "RGBA", "L", "LA", "P", "1") else image.convert("RGB")
        kept.save(stream, "PNG")
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise SampleError(f"field '{field}': the picture is damaged ({error})") from None
    return stream.getvalue()
