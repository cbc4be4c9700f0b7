"""One method with a cache of its own: filled layer by layer, then stepped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hkvprof.bench.gpu.dense import DenseSteps, dense_cache
from hkvprof.bench.gpu.machine import Machine
from hkvprof.bench.gpu.material import TYPES
from hkvprof.models.adapter import ModelView
from hkvprof.models.attention import AttentionCall
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply, measure_storage
from hkvprof.runtime.graph import GraphDecoder
from hkvprof.runtime.host import HostChunks
from hkvprof.runtime.options import PREFETCH

WHOLE = "0.9999"
"""A budget at which ours keeps all but a few tokens: its kernel on what is nearly a dense cache."""

Hosts = dict[tuple[int, int], HostChunks]
"""Host items by layer and segment: budgets differ in what is hot, not in what is on the host."""


@dataclass(frozen=True)
class Method:
    """`types`: DynamicCache, preallocated, whole, or one of TYPES. `mode`: eager or graph.

    `control`: host items lie on the device instead, so that nothing crosses the host link.
    """

    types: str
    budget: str = ""
    mode: str = "graph"
    prefetch: bool = False
    control: bool = False

    @property
    def name(self) -> str:
        """Unique within a cell."""
        parts = [f"{self.types} {self.budget}".strip(), self.mode]
        parts += ["prefetch"] if self.prefetch else []
        return ", ".join([*parts, "items on the device"] if self.control else parts)

    @property
    def is_ours(self) -> bool:
        """Whether hkvprof holds the cache."""
        return self.types in (*TYPES, "whole")


def methods(budgets: tuple[str, ...]) -> tuple[Method, ...]:
    """All rows of a cell. What is measured at one budget only is at the middle one."""
    middle = budgets[len(budgets) // 2]
    return (
        Method("DynamicCache", mode="eager"),
        Method("preallocated", mode="eager"),
        Method("preallocated"),
        Method("whole"),
        *(Method(types, budget) for budget in budgets for types in TYPES),
        *(Method(types, middle, "eager") for types in TYPES),
        *(Method(types, middle, "eager", prefetch=True) for types in TYPES[1:]),
        *(Method(types, middle, control=True) for types in TYPES[1:]),
    )


class Entrant:
    """A method at work. `held` is what filling it took on the device."""

    def __init__(
        self,
        model: Any,
        view: ModelView,
        method: Method,
        profiles: Mapping[str, Profile],
        tokens: int,
        rows: int,
        room: int,
    ) -> None:
        self.method, self.held = method, 0
        self._model, self._view, self._tokens, self._rows, self._room = (
            model, view, tokens, rows, room,
        )  # fmt: skip
        self._profile = profiles.get("static" if method.types == "whole" else method.types)
        self._steps: Any = None
        if self._profile is None:
            preallocated = method.types == "preallocated"
            layers = view.grid.layers
            self.cache: Any = dense_cache(view.text_config, layers, room if preallocated else None)
        else:
            with self.hooked() as handle:
                self.cache = handle.new_cache(tokens)

    @contextmanager
    def hooked(self) -> Iterator[Any]:
        """The model as this method sees it."""
        if self._profile is None:
            with nullcontext():
                yield None
            return
        budget = WHOLE if self.method.types == "whole" else self.method.budget
        prefetch = PREFETCH if self.method.prefetch else None
        with apply(
            self._model, self._profile, budget=budget, min_tokens=1, prefetch=prefetch
        ) as handle:
            yield handle

    def fill(self, number: int, query: Tensor, key: Tensor, value: Tensor, hosts: Hosts) -> None:
        """Layer `number`: dense keys and values as if its prompt had passed, `query` of its end."""
        if self._profile is None:
            layer = self.cache.layers[number]
            if self.method.types == "preallocated":
                layer.fill(key, value)
            else:
                layer.update(key.clone(), value.clone())
            return
        layer = self.cache.covered[number]
        layer.update(key, value)
        scaling = key.shape[-1] ** -0.5
        module = torch.nn.Identity()
        layer.attend(AttentionCall(module, query, key, value, None, scaling, lambda: (key, None)))
        for segment, head in layer.ragged.dynamic.items():
            # Pinned memory is dear, and every entrant has the same items of a head.
            head.host = hosts.setdefault((number, segment), head.host)
            head.host.shared = True
            if self.method.control and key.is_cuda:
                data, scale = head.host.data.to(key.device), head.host.scale
                scale = None if scale is None else scale.to(key.device)
                head.host = HostChunks(data, scale, head.host.items, head.host.dtype, pinned=False)

    def prepare(self, machine: Machine) -> None:
        """Ready for steps; on the device a graph is recorded at the first of them."""
        graph = self.method.mode == "graph"
        if self._profile is None:
            recorder = machine.recorder(lambda steps: None) if graph else None
            self._steps = DenseSteps(self._model, self.cache, self._tokens, self._rows, recorder)
        elif graph:
            recorder = machine.recorder(self.cache.advance)
            self._steps = GraphDecoder(self._model, self.cache, self._room, recorder)
        else:
            self._steps = DenseSteps(self._model, self.cache, self._tokens, self._rows, None)

    def step(self, ids: Tensor) -> Tensor:
        """Logits; within `hooked`."""
        return self._steps(ids)

    @property
    def stored_bytes(self) -> int:
        """Of the cache's own tensors on the device."""
        if self._profile is not None:
            return measure_storage(self.cache)[0]
        return sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))

    @property
    def read_bytes(self) -> int:
        """Keys and values that attention reads in the next step, all layers."""
        if self._profile is None:
            return self.stored_bytes
        return sum(
            sum(layer.ragged.storage.lengths) * layer.ragged.storage.token_bytes
            for layer in self.cache.covered
        )

    def attend(self, queries: list[Tensor]) -> Tensor:
        """Attention of all layers alone, given [rows, query_heads, 1, dim] for each."""
        outs = []
        for number, query in enumerate(queries):
            if self._profile is None:
                layer = self.cache.layers[number]
                outs.append(
                    F.scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)
                )
            else:
                outs.append(self.cache.covered[number].ragged.attend_resident(query))
        return outs[-1]

    @property
    def corrected_share(self) -> float | None:
        """Of selections with prefetch, those that had to precede attention."""
        counts = steps = 0
        for layer in self.cache.covered if self._profile is not None else ():
            retriever = layer.ragged.retriever
            if retriever.prefetch is not None:
                counts += int(retriever.prefetch.corrected.sum())
                steps += retriever.steps * len(retriever.prefetch.corrected)
        return counts / steps if steps else None
