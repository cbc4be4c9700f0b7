"""The line that says under which conditions figures hold."""

import sys
from types import ModuleType

import pytest
import torch

from hkvprof.bench.regime import describe
from hkvprof.bench.run import Setup
from tests.models_for_tests import random_llama

SETUP = Setup((64,), ("0.1",), batch=3)


def test_it_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ModuleType("hkvprof.runtime.kernels")
    monkeypatch.setattr(kernels, "status", lambda: "triton, checked", raising=False)
    monkeypatch.setitem(sys.modules, "hkvprof.runtime.kernels", kernels)
    regime = describe(random_llama(), "llama", "p", SETUP)
    assert (regime.layers, regime.batch, regime.dtype) == (3, 3, "float32")
    assert regime.threads == torch.get_num_threads()
    assert set(regime.versions) == {"hkvprof", "torch", "transformers"}
    for word in ("llama", "batch 3", "float32 on cpu", "kernels: triton, checked", "64 forced"):
        assert word in str(regime)


def test_a_runtime_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hkvprof.runtime.kernels", None)
    assert describe(random_llama(), "llama", "p", SETUP).kernels == "none"
