"""The decode kernels in plain torch, on any device: the definition, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.policy.quantiser import encode
from hkvprof.runtime.kernels.interface import DynamicSegment

ENCODE_ROWS = 4096
"""Tokens that `encode` compares at a time: bounds its memory to 1 KiB * ENCODE_ROWS."""


class TorchKernels:
    """See interface.Kernels."""

    name = "torch"

    def attend(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        offsets: Sequence[int],
        lengths: Sequence[int],
        query: Float[Tensor, "segments group dim"],
        scaling: float,
    ) -> Float[Tensor, "segments group dim"]:
        """Products in the tensors' dtype, softmax in float32."""
        out = torch.empty_like(query)
        for segment, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
            if length == 0:
                out[segment].zero_()
                continue
            logits = torch.mm(query[segment], key[start : start + length].T)
            weights = torch.softmax(logits.float().mul_(scaling), dim=-1).to(value.dtype)
            torch.mm(weights, value[start : start + length], out=out[segment])
        return out

    def bind(
        self,
        storage_key: Float[Tensor, "capacity dim"],
        storage_value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float = 0.0,
        successors: int = 0,
    ) -> TorchRetrieval:
        """Prepare the retrieval of a layer's dynamic heads."""
        return TorchRetrieval(storage_key, storage_value, heads, scaling, smoothing, successors)

    def encode(
        self,
        projected: Float[Tensor, "tokens channels"],
        codebook: Float[Tensor, "256 channels"],
        subspaces: Sequence[tuple[int, int]],
    ) -> Int[Tensor, "tokens codes"]:
        """As calibration does it."""
        parts = [
            encode(rows.float(), codebook, tuple(subspaces))
            for rows in projected.split(ENCODE_ROWS)
        ]
        return torch.cat(parts)


class TorchRetrieval:
    """See interface.Retrieval."""

    def __init__(
        self,
        key: Float[Tensor, "capacity dim"],
        value: Float[Tensor, "capacity dim"],
        heads: Sequence[DynamicSegment],
        scaling: float,
        smoothing: float,
        successors: int,
    ) -> None:
        self.key, self.value, self.heads = key, value, tuple(heads)
        self.scaling, self.smoothing, self.successors = scaling, smoothing, successors

    def score(self, query: Float[Tensor, "segments group dim"]) -> list[Float[Tensor, " items"]]:
        """Expected attention of every item, per dynamic head."""
        return [head.index.score(query[head.segment], self.scaling) for head in self.heads]

    def step(self, query: Float[Tensor, "segments group dim"]) -> list[int]:
        """Score, then load."""
        return self.load(self.score(query))

    def load(self, scores: Sequence[Float[Tensor, " items"]]) -> list[int]:
        """Select and fetch, head by head."""
        return [self._load(head, score) for head, score in zip(self.heads, scores, strict=True)]

    def _load(self, head: DynamicSegment, score: Float[Tensor, " items"]) -> int:
        held = head.slots.long()
        due = torch.where(score.isnan(), -1.0, score.float())
        plain = due
        for step in range(1, min(self.successors, head.items - 1) + 1):
            due = torch.cat([due[:step], torch.maximum(due[step:], plain[:-step])])
        if self.smoothing > 0:
            assert head.hot_score is not None, "smoothing needs hot_score"
            due = due.clone()
            due[held] = torch.maximum(due[held], self.smoothing * head.hot_score)
        fetched = 0
        if head.hot < head.items:
            wanted = choose(due, held)
            free = (~wanted[held]).nonzero()[:, 0]
            wanted[held] = False
            missing = wanted.nonzero()[:, 0]
            fetched = len(missing)
            if fetched:
                self._fetch(head, missing, free)
                head.slots[free] = missing.to(head.slots.dtype)
        if self.smoothing > 0:
            assert head.hot_score is not None
            head.hot_score.copy_(due[head.slots.long()])
        return fetched

    def _fetch(self, head: DynamicSegment, items: Tensor, slots: Tensor) -> None:
        """Copy host items into hot slots."""
        data = head.host[items.to(head.host.device)].to(self.key.device)
        if head.scale is not None:
            groups = (items // head.items_per_group).to(head.scale.device)
            scale = head.scale[groups].to(self.key.device)
            data = (data.float() * scale[:, :, None]).to(self.key.dtype)
        end = head.hot_start + head.hot * head.chunk
        for part, storage in enumerate((self.key, self.value)):
            hot = storage[head.hot_start : end].view(head.hot, head.chunk, -1)
            hot[slots] = data[:, part]


def choose(due: Float[Tensor, " items"], held: Int[Tensor, " hot"]) -> Tensor:
    """Mark the len(held) items with the largest `due`; of equals, held ones, then lower numbers."""
    count = len(held)
    last = due.topk(count).values[-1]
    wanted = due > last
    room = count - wanted.sum()
    equal = due == last
    is_held = torch.zeros_like(equal)
    is_held[held] = True
    rank = torch.where(
        is_held,
        (equal & is_held).cumsum(0),
        (equal & is_held).sum() + (equal & ~is_held).cumsum(0),
    )
    return wanted | (equal & (rank <= room))
