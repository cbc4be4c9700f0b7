"""A decoding step asks no tensor for its value, seen without a device.

On CUDA such a question makes the host wait (`pytest -m gpu` lets torch itself raise). Here every
operator of a step is looked at, and Triton's launches are left out: what they would have computed
must not matter for what is launched next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hkvprof.bench.filled import Keys, filled_profiles
from hkvprof.bench.methods import Kind
from hkvprof.calibration.uniform import uniform_profile
from hkvprof.models.adapter import view_model
from hkvprof.models.calls import with_cache
from hkvprof.runtime import handle as handles
from hkvprof.runtime import plan, ragged
from hkvprof.runtime import retrieval as retrieving
from hkvprof.runtime.graph import GraphDecoder
from hkvprof.runtime.kernels import Kernels
from hkvprof.runtime.kernels.reference import TorchKernels
from tests.models_for_tests import apply, random_llama, token_ids
from tests.runtime.kernels.triton_cases import INTERPRETED, triton_kernels
from tests.runtime.queues import InOrder

BY_VALUE = {
    "_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "nonzero_static",
    "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
"""Operators whose result or shape the host must know from values."""
METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class AskedError(AssertionError):
    """A tensor was asked for its value."""


class Watch(TorchDispatchMode):
    """Raises AskedError for operators of BY_VALUE, and for masks used as indices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in BY_VALUE or masks or (name == "repeat_interleave" and len(args) == 1):
            raise AskedError(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def nobody_asks() -> Iterator[None]:
    """As a device would have it: an error where the host wants a value."""

    def refuse(name: str) -> Any:
        def asked(self: Tensor, *args: Any, **kwargs: Any) -> None:
            raise AskedError(name)

        return asked

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, refuse(name)))
        stack.enter_context(Watch())
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched; nothing is computed."""
    from triton.runtime.interpreter import InterpretedFunction

    done: list[str] = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: done.append(self.fn.__name__)
    )
    return done


def use(monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    monkeypatch.setattr(ragged, "for_device", lambda device, dtype: kernels)
    for module in (retrieving, handles):
        monkeypatch.setattr(module, "queues_for", lambda device: InOrder())


def prefilled(model: Any, monkeypatch: pytest.MonkeyPatch, types: str, **options: Any) -> Any:
    use(monkeypatch, TorchKernels())
    index = {} if types == "static" else {"index": types, "chunk": 8}
    profile = uniform_profile(model, "static" if types == "static" else "dynamic", **index)
    handle = apply(model, profile, budget=0.3, compress_every=0, **options)
    cache = handle.new_cache()
    model(input_ids=token_ids(2, 150), **with_cache(model, cache))
    return cache


@pytest.mark.skipif(not INTERPRETED, reason="Triton launches are left out in its interpreter only")
@pytest.mark.parametrize(
    ("types", "options"),
    [
        ("static", {}),
        ("mean", {}),
        ("minmax", {"smoothing": 0.0}),
        ("mean", {"prefetch": 0.85}),
    ],
)
@torch.no_grad()
def test_steps_ask_for_nothing(
    types: str, options: dict[str, Any], launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model's steps, over growth and binding anew."""
    model = random_llama(2)
    cache = prefilled(model, monkeypatch, types, **options)
    use(monkeypatch, triton_kernels(torch.float32))
    tokens = token_ids(2, 12).split(1, dim=1)
    before = [layer.ragged.storage.key for layer in cache.covered]
    with nobody_asks():
        for one in tokens:
            model(input_ids=one, **with_cache(model, cache))
    for layer, storage in zip(cache.covered, before, strict=True):
        assert layer.ragged.storage.key is not storage, "nothing grew"
    assert launches.count("_split_kernel") == launches.count("_merge_kernel") == 24
    selections = launches.count("select_kernel")
    if types == "static":
        assert selections == 0
    elif "prefetch" in options:
        assert selections == 2 * (1 + 2 * 11)  # each layer: once at first, then in two parts
    else:
        assert selections == 24
    assert cache.get_seq_length() == 162


@torch.no_grad()
@pytest.mark.parametrize("kind", [Kind.STATIC, Kind.DYNAMIC, Kind.PROFILE])
def test_compressing_a_prompt_asks_for_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the host would wait for a layer's prefill before it could launch the next one's."""
    model = random_llama(2)
    view = view_model(model)
    made = filled_profiles(model, view, Keys(view, torch.float32, torch.device("cpu")))
    kernels = TorchKernels()
    monkeypatch.setattr(plan, "for_device", lambda device, dtype: kernels)
    ids = token_ids(1, 300)
    with apply(model, made[kind], budget=0.3) as handle:
        cache = handle.new_cache(300)
        with nobody_asks():
            model(input_ids=ids, **with_cache(model, cache))
        assert cache.receipt().compressed_layers == 2


@pytest.mark.skipif(not INTERPRETED, reason="Triton launches are left out in its interpreter only")
@pytest.mark.parametrize("types", ["static", "mean"])
@torch.no_grad()
def test_every_replayed_step_launches_the_same(
    types: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded step holds all of a step's launches, whatever step it is."""
    model = random_llama(2)
    cache = prefilled(model, monkeypatch, types)
    use(monkeypatch, triton_kernels(torch.float32))
    recorded: list[list[str]] = []

    class Recorder:
        def record(self, step: Any) -> Any:
            start = len(launches)
            with nobody_asks():
                out = step()
            recorded.append(launches[start:])
            return lambda: out

    decoder = GraphDecoder(model, cache, ahead=8, recorder=Recorder())
    for one in token_ids(2, 30).split(1, dim=1):
        decoder(one)
    assert len(recorded) >= 3
    assert all(one == recorded[0] for one in recorded)
    assert recorded[0].count("_split_kernel") == 2


@torch.no_grad()
def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch looks for missing items by value: its steps are caught."""
    model = random_llama(2)
    cache = prefilled(model, monkeypatch, "mean")
    with nobody_asks(), pytest.raises(AskedError, match=r"nonzero|tolist|item"):
        model(input_ids=token_ids(2, 1), **with_cache(model, cache))
    numbers = torch.arange(3)
    for ask in (
        lambda: numbers.tolist(),
        lambda: bool(numbers[0]),
        lambda: int(numbers.sum()),
        lambda: numbers[numbers > 1],
        lambda: numbers.masked_select(numbers > 1),
        lambda: torch.unique(numbers),
        lambda: torch.arange(int(numbers[2])),
    ):
        with nobody_asks(), pytest.raises(AskedError):
            ask()
