"""Work goes to its tensors' device, pinned memory is shared, and capturing gives nothing back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from hkvprof.runtime import devices, storage
from hkvprof.runtime.devices import PinnedSlabs, at
from hkvprof.runtime.graph import CudaGraphs
from hkvprof.runtime.kernels import Extents
from hkvprof.runtime.storage import HostChunks
from tests.runtime.kernels.cases import make_layer
from tests.runtime.kernels.triton_cases import INTERPRETED, triton_kernels

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="launches are looked at in Triton's interpreter only"
)


@interpreted
def test_every_launch_is_made_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    from hkvprof.runtime.kernels import triton_backend, triton_retrieval

    entered: list[torch.device] = []
    launched: list[str] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        assert entered, f"{self.fn.__name__} is launched wherever the process is"
        launched.append(self.fn.__name__)

    for module in (triton_backend, triton_retrieval):
        monkeypatch.setattr(module, "at", guard)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    kernels = triton_kernels(torch.float32)
    settings: list[dict[str, Any]] = [{"kind": "projected", "rerank": 4}, {"kind": "mean"}]
    for setting in settings:
        layer = make_layer(0, setting.pop("kind"), [90], [9], dtype=torch.float32, **setting)
        bound = kernels.bind(layer.key, layer.value, layer.heads, 0.1)
        bound.step(layer.query)
        bound.load(bound.score(layer.query))
        bound.step_some(layer.query, torch.tensor([True]))
        kernels.attend(layer.key, layer.value, Extents.of([0], [12]), layer.query, 0.1)
        end, one = torch.tensor([3], dtype=torch.int32), layer.key[:1, None]
        kernels.append(layer.key, layer.value, end, one, one)
    assert {
        "_split_kernel",
        "append_kernel",
        "choose_kernel",
        "select_kernel",
        "gather_kernel",
        "exact_kernel",
    } <= set(launched)


def test_the_guard_makes_a_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    class Event:
        def record(self, stream: Any) -> None:
            assert stream == ("stream of", current[-1])
            self.on = current[-1]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device.index))
    with at(torch.device("cuda:1")):
        assert current == [0, 1]
    with at(torch.device("cpu")):
        assert current == [0]
    event: Any = devices.mark(torch.device("cuda:1"))
    assert event.on == 1


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.state, self.replays = "new", 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert (self.state, capture_error_mode) == ("new", "thread_local")
        self.state = "capturing"

    def capture_end(self) -> None:
        self.state = "done"

    def replay(self) -> None:
        assert self.state == "done"
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Made so far, where nobody may give memory back."""
    made: list[Graph] = []

    def refuse(*args: Any) -> None:
        raise AssertionError("memory was given back")

    @contextmanager
    def entered(*args: Any) -> Iterator[None]:
        yield

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    monkeypatch.setattr(torch._C, "_host_emptyCache", refuse, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, entered)
    return made


def test_capturing_gives_no_memory_back(graphs: list[Graph]) -> None:
    recorder = CudaGraphs(torch.device("cuda:1"))
    out = torch.ones(2)
    replay = recorder.record(lambda: out)
    assert replay() is out
    assert replay() is out
    assert [graph.replays for graph in graphs] == [2]


def test_a_failed_capture_ends(graphs: list[Graph]) -> None:
    def fail() -> torch.Tensor:
        assert graphs[0].state == "capturing"
        raise RuntimeError("asked for a value")

    with pytest.raises(RuntimeError, match="asked for a value"):
        CudaGraphs(torch.device("cuda")).record(fail)
    assert graphs[0].state == "done"


def test_parts_of_a_slab_neither_overlap_nor_outlive_it() -> None:
    slabs = PinnedSlabs(4096, pinned=False)
    parts = [slabs.take(count) for count in (100, 1, 700, 2048, 1000, 1000)]
    own = slabs.take(2049)
    spans = sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in (*parts, own))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 2
    first = parts[0].untyped_storage().data_ptr()
    assert all((part.data_ptr() - first) % 256 == 0 for part in parts[:4])
    assert own.untyped_storage().nbytes() == 2049
    made = slabs.new((3, 2, 5), torch.bfloat16)
    assert (made.shape, made.dtype) == ((3, 2, 5), torch.bfloat16)


def test_pinned_stores_have_room_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What joins at the first later compressions moves nothing."""
    monkeypatch.setattr(storage, "SLABS", PinnedSlabs(2**16, pinned=False))
    allocate = storage._allocate
    monkeypatch.setattr(storage, "_allocate", lambda shape, kind, _: allocate(shape, kind, True))
    monkeypatch.setattr(storage, "_pins", lambda tensor: True)
    key, value = torch.randn(2, 64, 1, 16)
    store = HostChunks.store(key, value)
    before = store.data.data_ptr()
    for _ in range(4):
        store = store.append(key[:2], value[:2])
    assert (store.items, store.data.data_ptr()) == (72, before)
    assert store.nbytes == 72 * store.item_bytes
    store = store.append(key[:1], value[:1])
    assert store.data.data_ptr() != before
    assert torch.equal(store.fetch(torch.arange(64), torch.device("cpu"))[:, 0], key)
    assert torch.equal(store.fetch(torch.tensor([64, 71, 72]), key.device)[:, 1], value[[0, 1, 0]])
