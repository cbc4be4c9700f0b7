"""What lies beyond the tensors is refused before a compiled kernel reads it, asserts or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hkvprof.errors import CompressionError
from hkvprof.runtime import kernels
from hkvprof.runtime.kernels import Kernels
from tests.runtime.kernels.bad_inputs import (
    BAD,
    DTYPE,
)
from tests.runtime.kernels.cases import compiler

CPU = torch.device("cpu")


@compiler
@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_name(name: str) -> None:
    native = kernels.for_device(CPU, DTYPE)
    if native.name != "native":
        pytest.skip(kernels.status())
    with pytest.raises(CompressionError, match=r"decode kernels: expected .* nothing was read"):
        BAD[name](native)


ELSEWHERE = {
    "a negative slot",  # slots lie on the device, and reading them would make the host wait
    "a slot past the items",
    "a segment that ends past the storage",  # extents lie on the device
    "a segment that begins before it",
    "a negative length",
    "values with fewer rows than keys",  # in torch
    "a codebook of fewer channels",
    "a subspace past the channels",
    "a subspace that ends before it begins",
    "no subspace",
}


@pytest.mark.parametrize("name", sorted(set(BAD) - ELSEWHERE))
def test_it_is_refused_before_triton_too(name: str) -> None:
    pytest.importorskip("triton")
    from hkvprof.runtime.kernels.triton_backend import TritonKernels

    triton: Kernels = TritonKernels(DTYPE)
    with pytest.raises(CompressionError, match="decode kernels: expected"):
        BAD[name](triton)


@compiler
def test_without_asserts() -> None:
    command = [sys.executable, "-O", "-W", "error", "-m", "tests.runtime.kernels.bad_inputs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    page = json.loads(done.stdout)
    assert page["asserts"] is False
    assert page["status"].startswith("native: "), page["status"]
    assert page["met"] == dict.fromkeys(BAD, "CompressionError")
