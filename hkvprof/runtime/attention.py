"""Attention over ragged segments: the reference implementation in plain torch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.runtime.host import DynamicHead
from hkvprof.runtime.masks import View, dynamic_positions
from hkvprof.runtime.receipt import LayerAccount
from hkvprof.runtime.retrieval import Retriever
from hkvprof.runtime.storage import RaggedStorage


def attend(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    new: Bool[Tensor, "rows rows"] | None = None,
) -> Float[Tensor, "group rows dim"]:
    """One KV head's attention of a group of query heads.

    Every row sees all tokens except, where `new` is given, the last `rows` tokens, of which row i
    sees those that `new[i]` marks (causality among the rows of this pass).
    """
    rows = query.shape[1]
    if new is None:
        return _attend(query, key, value, scaling, None)
    mask = torch.ones(rows, len(key), dtype=torch.bool, device=key.device)
    mask[:, len(key) - rows :] = new
    return _attend(query, key, value, scaling, mask)


def attend_where(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    visible: Bool[Tensor, "rows tokens"],
) -> Float[Tensor, "group rows dim"]:
    """The same, where row i sees the tokens that `visible[i]` marks; zeros where it sees none.

    Values of tokens that no row sees do not matter, NaN and infinity included.
    """
    seen = visible.any(dim=0)
    value = torch.where(seen[:, None], value, 0.0)
    key = torch.where(seen[:, None], key, 0.0)
    out = _attend(query, key, value, scaling, visible)
    return torch.where(visible.any(dim=1)[:, None], out, 0.0)


def _attend(
    query: Float[Tensor, "group rows dim"],
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    scaling: float,
    visible: Bool[Tensor, "rows tokens"] | None,
) -> Float[Tensor, "group rows dim"]:
    group, rows, dim = query.shape
    mask = None if visible is None else visible.repeat(group, 1)[None, None]
    out = F.scaled_dot_product_attention(
        query.reshape(1, 1, group * rows, dim),
        key[None, None],
        value[None, None],
        attn_mask=mask,
        scale=scaling,
    )
    return out.view(group, rows, value.shape[-1])


class Kept(Protocol):
    """What a compressed layer holds, and where its tokens stand (runtime.ragged)."""

    account: LayerAccount
    dynamic: dict[int, DynamicHead]
    kv_heads: int
    retriever: Retriever
    scaling: float
    storage: RaggedStorage

    def start(self, row: int) -> int:
        """First position of a row."""
        ...

    def known_positions(self, segment: int) -> NDArray[np.int32]:
        """Of the tokens of a segment that is not dynamic."""
        ...


def attend_seeing(
    layer: Kept, query: Float[Tensor, "rows query_heads new dim"], view: View
) -> Float[Tensor, "rows new query_heads dim"]:
    """As `attend_one` and `attend_many`, of what the mask shows alone.

    In a decoding step dynamic heads select among the items that it shows. A token that sees nothing
    of what a head kept gets zeros from it.
    """
    rows, query_heads, new, dim = query.shape
    storage = layer.storage
    grouped = query.detach().reshape(storage.segments, -1, new, dim)
    if new == 1:
        layer.account.steps += 1
        if layer.dynamic:
            hidden = {
                segment: _hidden_items(layer, segment, view.visible) for segment in layer.dynamic
            }
            layer.retriever.step_seeing(storage, grouped[:, :, 0], hidden)
    else:
        layer.retriever.join()
    outputs = []
    for segment in range(storage.segments):
        row = segment // layer.kv_heads
        key, value = storage.keys(segment), storage.values(segment)
        positions = segment_positions(layer, segment, resident=new == 1)
        head = layer.dynamic.get(segment)
        if head is not None and new > 1:
            key, value = head.all_tokens(key, value)
        visible = view.visible[row].index_select(1, positions)
        outputs.append(attend_where(grouped[segment], key, value, layer.scaling, visible))
    out = torch.stack(outputs).view(rows, query_heads, new, -1)
    return out.transpose(1, 2).contiguous()


def _hidden_items(
    layer: Kept, segment: int, visible: Bool[Tensor, "rows 1 seen"]
) -> Bool[Tensor, " items"]:
    """Items of a dynamic head of which no token is seen."""
    head, row = layer.dynamic[segment], segment // layer.kv_heads
    first = layer.start(row) + head.layout.sinks
    moved = head.layout.items * head.layout.chunk
    shown = visible[row, 0, first : first + moved].view(head.layout.items, head.layout.chunk)
    return ~shown.any(dim=1)


def segment_positions(layer: Kept, segment: int, resident: bool) -> Int[Tensor, " tokens"]:
    """Positions of a segment's tokens in their order, or (of dynamic heads, unless `resident`) in
    that of `DynamicHead.all_tokens`; on the device."""
    head = layer.dynamic.get(segment)
    if head is not None:
        start = layer.start(segment // layer.kv_heads)
        return dynamic_positions(head, start, layer.storage.lengths[segment], resident)
    known = layer.known_positions(segment)
    return torch.from_numpy(known).long().to(layer.storage.key.device, non_blocking=True)
