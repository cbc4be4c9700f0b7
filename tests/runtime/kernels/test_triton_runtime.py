"""The Triton kernels below a whole model, and that nobody imports triton before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.lazy import no_triton
from hkvprof.models.calls import with_cache
from hkvprof.runtime import kernels, ragged
from hkvprof.runtime.kernels import Kernels
from hkvprof.runtime.kernels.reference import TorchKernels
from hkvprof.testbed.generator import make_sample
from tests.models_for_tests import apply
from tests.profiles import in_16_bits
from tests.runtime.kernels.triton_cases import DEVICES, QUIET, triton_kernels
from tests.runtime.test_quantised import in_bits

SHIPPED = Path(__file__).parents[3] / "profiles" / "tinyvl.hkv.safetensors"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tinyvl() -> tuple[Any, Any]:
    return hkvprof.load_model("tinyvl", dtype="float32")


def profile_named(model: Any, name: str) -> Any:
    if name == "shipped":  # static heads and projected indexes with reranking
        return in_16_bits(hkvprof.load_profile(SHIPPED))
    if name == "static":
        return uniform_profile(model, "static")
    if name == "in 8 bits":
        return in_bits(model, 8, np.arange(24).reshape(6, 4) % 2, chunk=8)
    return uniform_profile(model, "dynamic", index=name, chunk={"mean": 4, "minmax": 16}[name])


@torch.no_grad()
def decode(
    model: Any, profile: Any, inputs: Any, kernels: Kernels, tokens: list[int], **options: Any
) -> tuple[list[Tensor], Any]:
    """Logits of a prompt and of the given tokens, one by one; and the receipt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "for_device", lambda device, dtype: kernels)
        with apply(model, profile, budget=0.3, **options) as handle:
            cache = handle.new_cache()
            out = [model(**inputs, **with_cache(model, cache)).logits[:, -1]]
            for token in tokens:
                ids = torch.tensor([[token]], device=model.device)
                out.append(model(input_ids=ids, **with_cache(model, cache)).logits[:, -1])
            return out, cache.receipt()


@QUIET
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("static", 8, {}),  # storage grows meanwhile
        ("mean", 3, {"smoothing": 0.5, "compress_every": 2}),
        ("minmax", 3, {"smoothing": 0.0}),
        ("shipped", 2, {"smoothing": 0.5}),
        ("in 8 bits", 2, {}),
        ("in 8 bits", 2, {"host_dtype": "int8"}),
    ],
)
def test_a_model_decodes_as_with_the_reference_kernels(
    device: str, name: str, steps: int, options: dict[str, Any], tinyvl: tuple[Any, Any]
) -> None:
    model, processor = tinyvl
    sample = make_sample("list", 1, images=6, split="calibration")
    model.to(device)
    inputs = processor.encode([sample.messages]).to(model.device, model.dtype)
    profile = profile_named(model, name)
    tokens = [7 + 2 * step for step in range(steps)]
    fast = triton_kernels(torch.float32)
    expected, wanted = decode(model, profile, inputs, TorchKernels(), tokens, **options)
    got, receipt = decode(model, profile, inputs, fast, tokens, **options)
    model.to("cpu")
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert not fast.notes
    assert receipt.steps == steps
    assert receipt.hit_rate == wanted.hit_rate
    assert receipt.bytes_moved >= wanted.bytes_moved  # keys of all candidates, hot ones too
    assert name == "shipped" or receipt.bytes_moved == wanted.bytes_moved
    assert (receipt.hit_rate is None) == (name == "static")
    assert receipt.resident_bytes == wanted.resident_bytes


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch; from hkvprof.runtime import apply, kernels;"
        "k = kernels.for_device(torch.device('cpu'), torch.float32); kernels.status();"
        "print(k.name, 'triton' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert made.stdout.split()[-1] == "False"


def test_without_triton_cuda_tensors_go_to_torch_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_ON_CUDA", {})
    monkeypatch.setattr(kernels, "no_triton", lambda: "triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda")
    with pytest.warns(UserWarning, match="because triton is not installed"):
        assert kernels.for_device(cuda, torch.float16).name == "torch"
    assert kernels.for_device(cuda, torch.float16).name == "torch"  # warns once
    assert kernels.status().startswith("CUDA: torch: triton is not installed; CPU: ")


@pytest.mark.parametrize("device", DEVICES)
def test_with_triton_cuda_tensors_are_its_own(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ON_CUDA", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda")
    assert no_triton() == ""
    chosen = kernels.for_device(cuda, torch.bfloat16)
    assert chosen.name == "triton"
    assert kernels.for_device(cuda, torch.bfloat16) is chosen
    assert kernels.for_device(cuda, torch.float64).name == "torch"
    assert kernels.status().startswith("CUDA: triton 3.")
