"""A dynamic head's chunks in host memory, its index, and the hot buffer's slot map."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.heads import Strategy
from hkvprof.policy.costs import DynamicLayout
from hkvprof.policy.index import HeadTables, KeyIndex, build_index


@dataclass(frozen=True)
class HostChunks:
    """Keys and values of the chunked region, K and V of a chunk adjacent; never written again.

    `data` [items, 2, chunk, dim], pinned where the device is CUDA.
    """

    data: Float[Tensor, "items 2 chunk dim"]

    @classmethod
    def store(
        cls, key: Float[Tensor, "items chunk dim"], value: Float[Tensor, "items chunk dim"]
    ) -> HostChunks:
        """Copy to the host. Raises CompressionError when host memory cannot be had."""
        items, chunk, dim = key.shape
        try:
            data = torch.empty(
                (items, 2, chunk, dim), dtype=key.dtype, pin_memory=key.device.type == "cuda"
            )
        except (RuntimeError, MemoryError) as error:
            size = 2 * key.numel() * key.element_size() / 2**20
            raise CompressionError(
                f"host memory for a dynamic head ({size:.1f} MiB) cannot be allocated "
                f"({str(error).splitlines()[0]}): free host memory, lower the batch or the prompt, "
                "or use a profile with static heads only"
            ) from error
        data[:, 0].copy_(key)
        data[:, 1].copy_(value)
        return cls(data)

    def fetch(
        self, items: Int[Tensor, " n"], device: torch.device
    ) -> Float[Tensor, "n 2 chunk dim"]:
        """Chosen chunks on the device."""
        return self.data[items.cpu()].to(device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Host bytes."""
        return self.data.untyped_storage().nbytes()


@dataclass(frozen=True)
class DynamicHead:
    """One (batch row, KV head): host chunks, device index, and which chunk every hot slot holds.

    Its storage segment is laid out [sinks | recent | hot slots | generated tokens].
    """

    layout: DynamicLayout
    host: HostChunks
    index: KeyIndex
    slots: Int[Tensor, " hot"]

    @classmethod
    def build(
        cls,
        key: Float[Tensor, "tokens dim"],
        value: Float[Tensor, "tokens dim"],
        query: Float[Tensor, "group dim"],
        scaling: float,
        strategy: Strategy,
        layout: DynamicLayout,
        tables: HeadTables | None,
    ) -> DynamicHead:
        """Move a prompt's chunks to the host; the hot set starts from the last row's query."""
        region = slice(layout.sinks, layout.sinks + layout.items * layout.chunk)
        chunked_key = key[region].view(layout.items, layout.chunk, -1)
        chunked_value = value[region].view(layout.items, layout.chunk, -1)
        index = build_index(strategy, chunked_key, tables)
        slots = select(index, query, scaling, layout.hot).to(torch.int32)
        return cls(layout, HostChunks.store(chunked_key, chunked_value), index, slots)

    def clone(self) -> DynamicHead:
        """A copy for another beam: shares what never changes."""
        return replace(self, slots=self.slots.clone())

    def refresh(
        self,
        query: Float[Tensor, "group dim"],
        scaling: float,
        hot_key: Float[Tensor, "hot_tokens dim"],
        hot_value: Float[Tensor, "hot_tokens dim"],
    ) -> int:
        """Select chunks for this step and load those that are not hot yet; returns how many."""
        wanted = torch.zeros(self.layout.items, dtype=torch.bool, device=self.slots.device)
        wanted[select(self.index, query, scaling, self.layout.hot)] = True
        held = self.slots.long()
        free = (~wanted[held]).nonzero()[:, 0]
        if len(free) == 0:
            return 0
        wanted[held] = False
        missing = wanted.nonzero()[:, 0]
        chunks = self.host.fetch(missing, hot_key.device)
        shape = (self.layout.hot, self.layout.chunk, -1)
        hot_key.view(shape)[free] = chunks[:, 0]
        hot_value.view(shape)[free] = chunks[:, 1]
        self.slots[free] = missing.to(torch.int32)
        return len(missing)

    @property
    def index_bytes(self) -> int:
        """Device bytes of the index."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.index.tensors())

    @property
    def slot_bytes(self) -> int:
        """Device bytes of the slot map."""
        return self.slots.untyped_storage().nbytes()


def select(
    index: KeyIndex, query: Float[Tensor, "group dim"], scaling: float, count: int
) -> Int[Tensor, " count"]:
    """Items with the highest expected attention; NaN counts as none."""
    score = torch.nan_to_num(index.score(query, scaling), nan=-1.0)
    return score.topk(count).indices
