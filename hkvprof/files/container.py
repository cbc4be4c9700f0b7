"""safetensors files from strangers: sizes, header and names are checked before a tensor is read."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from hkvprof.files import strict_json

MAX_HEADER_BYTES = 8 * 2**20
"""Of the header, metadata included; safetensors itself takes 100 MB."""
MAX_TENSORS = 1024


@dataclass(frozen=True)
class Container:
    """A file's bytes and the texts of its metadata."""

    data: bytes
    metadata: dict[str, str]

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All tensors by name. Raises ValueError.

        safetensors refuses offsets that overlap, leave gaps or lead out of the file, and shapes
        that do not fill them: no more memory is taken than the file has bytes.
        """
        try:
            return dict(load(self.data))
        except (SafetensorError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def read_container(path: Path, most_bytes: int) -> Container:
    """Read a file of at most `most_bytes`, its header checked. Raises OSError, ValueError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > most_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, and at most {most_bytes:,} are read")
    with path.open("rb") as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has grown beyond {most_bytes:,} bytes while it was read")
    return Container(data, _metadata(data))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in a file's header: names that occur twice are refused with the rest."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError("it is cut off within its header, or no safetensors file")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {size:,} bytes: at most {MAX_HEADER_BYTES:,} are read")
    header = strict_json.loads(data[8 : 8 + size].decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    if len(header) > MAX_TENSORS + 1:
        raise ValueError(f"it has {len(header):,} tensors: at most {MAX_TENSORS:,} are read")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no object of texts")
    return metadata
