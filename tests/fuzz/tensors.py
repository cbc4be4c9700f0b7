"""Mutations of safetensors files: whatever tensors they hold."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import jsons
from tests.fuzz.raw import bytes_mutated

DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "U8": np.uint8,
          "I64": np.int64, "BOOL": np.bool_}  # fmt: skip
NAMES = ["loss", "ratios", "fingerprint", "recipe", "index", "self", "", "__metadata__", "x" * 300,
         "index.codebook_64", "a/b", "\0", "é", "provenance", "lengths",
         "statistics.x"]  # fmt: skip
VALUES = [0.0, -1.0, 1.0, 2.0, 255.0, 1e-45, 3e38, -3e38, 1e30, 65504.0, math.nan, math.inf, 0.5]


@dataclass
class Tensor:
    """An entry of the header and its bytes; `offsets` overrides where they are said to lie."""

    name: str
    dtype: str
    shape: Any
    data: bytes
    offsets: Any = None


@dataclass
class File:
    """A safetensors file in parts; `about` is the JSON value under the one metadata key."""

    key: str
    about: Any
    tensors: list[Tensor]

    @classmethod
    def of(cls, data: bytes, key: str) -> File:
        """Take a sound file apart."""
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        about = json.loads(header.pop("__metadata__")[key])
        tensors = [
            Tensor(name, e["dtype"], e["shape"], body[slice(*e["data_offsets"])])
            for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        ]
        return cls(key, about, tensors)

    def to_bytes(self, text: str, metadata: Any = None) -> bytes:
        """Put together, with `text` as the metadata under the key."""
        entries, body = [], b""
        for tensor in self.tensors:
            offsets = tensor.offsets or [len(body), len(body) + len(tensor.data)]
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            entries.append(f"{json.dumps(tensor.name)}:{json.dumps(entry)}")
            body += tensor.data
        about = {self.key: text} if metadata is None else metadata
        header = ",".join([f'"__metadata__":{json.dumps(about)}', *entries])
        head = f"{{{header}}}".encode()
        head += b" " * (-len(head) % 8)
        return struct.pack("<Q", len(head)) + head + body


def _dtype(random: Random, file: File) -> None:
    random.choice(file.tensors).dtype = random.choice([*DTYPES, "BF16", "F8_E4M3", "C64", "x", ""])


def _shape(random: Random, file: File) -> None:
    """Huge, negative, empty, or simply another; with the same bytes, or with as many as it says."""
    tensor = random.choice(file.tensors)
    whole = isinstance(tensor.shape, list) and all(type(n) is int for n in tensor.shape)
    shape = list(tensor.shape) if whole else []
    at = random.randrange(len(shape)) if shape else 0
    choice: list[Any] = [
        [2**40], [2**62, 4], [2**63, 2], [0, 2**62], [-1], [1.5], ["3"], [], None, shape[::-1],
        [1, *shape], [*shape, 1], shape[1:], [math.prod(shape)], [1] * 40, {"a": 1}, [0],
    ]  # fmt: skip
    if shape:
        choice += [[*shape[:at], shape[at] + random.choice([-1, 1, 7]), *shape[at + 1 :]]] * 6
    tensor.shape = random.choice(choice)
    if random.random() < 0.7 and tensor.dtype in DTYPES:
        _fill_to_shape(tensor)


def _fill_to_shape(tensor: Tensor) -> None:
    shape = tensor.shape
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**20 for n in shape):
        return
    wanted = math.prod(shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
    if wanted < 2**20:
        tensor.data = (tensor.data * (wanted // max(len(tensor.data), 1) + 1))[:wanted]


def _offsets(random: Random, file: File) -> None:
    """Overlapping, reversed, beyond the end, negative, or of the wrong kind."""
    tensor = random.choice(file.tensors)
    size = len(tensor.data)
    choice: list[Any] = [
        [0, size], [size, 0], [8, 8 + size], [-size, 0], [2**62, 2**62 + size], [0, 2**63],
        [2**64 - 1, 2**64], [0], [0, size, size], "0", None, [0.0, float(size)], [True, size],
    ]  # fmt: skip
    tensor.offsets = random.choice(choice)


def _rename(random: Random, file: File) -> None:
    random.choice(file.tensors).name = random.choice(NAMES)


def _twice(random: Random, file: File) -> None:
    """Two entries of one name, of the same bytes or of others."""
    tensor = random.choice(file.tensors)
    copy = Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.data, tensor.offsets)
    file.tensors.insert(random.randrange(len(file.tensors) + 1), copy)


def _drop(random: Random, file: File) -> None:
    file.tensors.remove(random.choice(file.tensors))


def _add(random: Random, file: File) -> None:
    count = random.choice([1, 1, 1, 1100])
    name = random.choice(NAMES)
    file.tensors += [
        Tensor(f"{name}{i or ''}", "F32", [1], b"\0\0\0\0") for i in range(count)
    ]  # fmt: skip


def _swap(random: Random, file: File) -> None:
    one, other = random.choice(file.tensors), random.choice(file.tensors)
    one.name, other.name = other.name, one.name


def _values(random: Random, file: File) -> None:
    """Some or all numbers of a tensor become one that is out of bounds, or at a bound."""
    tensor = random.choice(file.tensors)
    if tensor.dtype not in DTYPES:
        return
    dtype = DTYPES[tensor.dtype]
    array = np.frombuffer(tensor.data[: len(tensor.data) // np.dtype(dtype).itemsize *
                                      np.dtype(dtype).itemsize], dtype).copy()  # fmt: skip
    value = random.choice(VALUES)
    if np.dtype(dtype).kind in "iu":
        value = 0 if not math.isfinite(value) else int(value) % 128
    many = random.random() < 0.3
    for at in range(len(array)) if many else [random.randrange(len(array) or 1)]:
        if at < len(array):
            with np.errstate(all="ignore"):
                array[at] = np.array(value).astype(dtype)
    tensor.data = array.tobytes()


def _shuffle(random: Random, file: File) -> None:
    """The same numbers in another order."""
    tensor = random.choice(file.tensors)
    width = np.dtype(DTYPES.get(tensor.dtype, np.uint8)).itemsize
    words = [tensor.data[i : i + width] for i in range(0, len(tensor.data), width)]
    random.shuffle(words)
    tensor.data = b"".join(words)


_EDITS: list[Callable[[Random, File], None]] = [
    _dtype, _shape, _shape, _offsets, _rename, _twice, _drop, _add, _swap, _shuffle,
    _values, _values, _values,
]  # fmt: skip


def mutated(random: Random, data: bytes, key: str) -> bytes:
    """A file that was sound, with bytes, header, tensors or metadata changed."""
    fate = random.random()
    if fate < 0.30:
        return bytes_mutated(random, data, head=8 + int.from_bytes(data[:8], "little"))
    file = File.of(data, key)
    if fate < 0.65:
        file.about = jsons.mutated(random, file.about)
    else:
        for _ in range(random.choice([1, 1, 2, 3])):
            if file.tensors:
                random.choice(_EDITS)(random, file)
    text = jsons.text_of(random, file.about) if fate < 0.65 else json.dumps(file.about)
    metadata = jsons.mutated(random, {key: text}) if random.random() < 0.02 else None
    made = file.to_bytes(text, metadata)
    if random.random() < 0.03:
        made = struct.pack("<Q", random.choice([0, 1, 2**20, 10**8, 2**31, 2**63])) + made[8:]
    return made
