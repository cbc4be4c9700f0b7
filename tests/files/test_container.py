"""safetensors files from strangers, before any tensor is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hkvprof.errors import ProfileError
from hkvprof.files import container
from hkvprof.files.container import read_container
from hkvprof.profile.record import load_profile

MOST = 2**20


def write(path: Path, header: str | bytes, body: bytes = b"", size: int | None = None) -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + body)
    return path


def entry(begin: int = 0, end: int = 4, shape: tuple[int, ...] = (1,)) -> str:
    return json.dumps({"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]})


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_container(path, MOST).tensors()


def test_a_sound_file_comes_back(tmp_path: Path) -> None:
    tensors = {"a": np.arange(3, dtype=np.float32), "b": np.zeros((2, 0), np.int8)}
    path = tmp_path / "f"
    path.write_bytes(save(tensors, {"key": "text"}))
    found = read_container(path, MOST)
    assert found.metadata == {"key": "text"}
    assert found.tensors().keys() == tensors.keys()
    assert all(np.array_equal(found.tensors()[name], tensors[name]) for name in tensors)
    path.write_bytes(save(tensors))
    assert read_container(path, MOST).metadata == {}


def test_names_that_occur_twice_are_refused(tmp_path: Path) -> None:
    header = f'{{"a":{entry(0, 4)},"a":{entry(4, 8)}}}'
    refused(write(tmp_path / "f", header, bytes(8)), "'a' occurs twice")


@pytest.mark.parametrize("offsets", [(2, 6), (0, 8), (4, 0), (4, 8), (0, 2**62), (-4, 0)], ids=str)
def test_offsets_that_overlap_lead_out_or_leave_gaps(tmp_path: Path, offsets: tuple) -> None:
    header = f'{{"a":{entry(0, 4)},"b":{entry(*offsets)}}}'
    if offsets == (4, 8):
        header = f'{{"a":{entry(0, 4)},"b":{entry(4, 8, (2,))}}}'
    refused(write(tmp_path / "f", header, bytes(8)), ".")


def test_a_huge_header_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 100)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    refused(write(tmp_path / "f", b" " * 101), "header has 101 bytes: at most 100")


@pytest.mark.parametrize("size", [10**8, 2**63, 2**64 - 1])
def test_a_header_that_claims_to_be_huge(tmp_path: Path, size: int) -> None:
    refused(write(tmp_path / "f", "{}", size=size), "cut off within its header")


def test_thousands_of_tensors(tmp_path: Path) -> None:
    count = container.MAX_TENSORS + 2
    entries = ",".join(f'"t{i}":{entry(0, 0, (0,))}' for i in range(count))
    refused(write(tmp_path / "f", f"{{{entries}}}"), "at most 1,024 are read")


@pytest.mark.parametrize("header", ["[]", "1", '{"__metadata__":1}', '{"__metadata__":{"a":1}}',
                                    "{", "", '{"a":NaN}', "[" * 5000])  # fmt: skip
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    refused(write(tmp_path / "f", header), ".")


def test_sizes_and_kinds_of_files(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(MOST + 1)
    refused(tmp_path / "big", "at most 1,048,576 are read")
    refused(tmp_path, "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    refused(Path("/dev/zero"), "no regular file")
    for data in (b"", b"1234567"):
        (tmp_path / "short").write_bytes(data)
        refused(tmp_path / "short", "cut off within its header")


def test_a_profile_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "p", "{}")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ProfileError, match=r"cannot read .*/p: Permission denied"):
        load_profile(path)
