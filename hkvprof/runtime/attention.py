"""Attention over ragged segments in plain torch, and the masks that say what a pass may see.

transformers gives SDPA no mask where nothing is hidden, else a boolean one [rows, 1, new, seen]
over logical positions; a user's own 4D mask may be additive. Masks are read once per pass and told
to every layer. Compressed storage has no pads before a row's start, and everything else that it
kept: hidden tokens among these are masked exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.errors import ModelError
from hkvprof.heads import EXACT_BITS
from hkvprof.runtime.accounts import LayerAccount
from hkvprof.runtime.copies import NeverCopied
from hkvprof.runtime.devices import mark
from hkvprof.runtime.kernels.interface import QuantisedRows
from hkvprof.runtime.retrieval import Retriever
from hkvprof.runtime.storage import DynamicHead, RaggedStorage

HIDES = -1e4
"""Additive masks hide by values up to this one (they use -1e4, -1e9, the least finite, -inf)."""


@dataclass(frozen=True)
class View:
    """Which of the `seen` logical positions each of a pass's new tokens sees."""

    visible: Bool[Tensor, "rows new seen"]

    @property
    def hidden(self) -> Bool[Tensor, "rows seen"]:
        """What the last token does not see, pads before a row's start included."""
        return ~self.visible[:, -1]


def to_bool(mask: Tensor, rows: int, new: int, seen: int) -> Bool[Tensor, "rows new seen"]:
    """A pass's mask, of whatever kind. Raises ModelError for masks that are more than a mask."""
    expected = f"expected a mask [{rows}, 1, {new}, {seen}] (rows, 1, new tokens, all tokens)"
    if mask.ndim != 4 or mask.shape[2:] != (new, seen) or mask.shape[0] not in (1, rows):
        raise ModelError(f"{expected}, found {list(mask.shape)}: it must be over all tokens so far")
    if mask.shape[1] != 1:
        raise ModelError(
            f"{expected}, found {mask.shape[1]} masks per row: one for every attention head is not "
            "supported; give one for all"
        )
    plain = mask[:, 0]
    if plain.is_floating_point():
        if not bool(((plain == 0) | (plain <= HIDES)).all()):
            raise ModelError(
                "the attention mask adds a bias to attention: expected 0 for tokens that are seen "
                "and the least value of its dtype for hidden ones; biases are not supported"
            )
        plain = plain == 0
    return plain.bool().expand(rows, new, seen)


def read_view(mask: Tensor | None, starts: tuple[int, ...], new: int, seen: int) -> View | None:
    """What a pass after the prompt sees; None where that is all tokens from the rows' starts on.

    Which of its own tokens a pass of several sees is then told by `own_block`. Makes the host wait
    once where there is a mask. Raises ModelError where a mask, or none, shows pads that were
    dropped.
    """
    if mask is None:
        if padded := [row for row, start in enumerate(starts) if start]:
            raise ModelError(
                f"the pass has no attention mask, or one that hides nothing, and so shows the "
                f"padding of rows {padded}, which was hidden and dropped when the prompt was "
                "compressed: give the mask over all tokens so far, padding hidden"
            )
        return None
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    visible = to_bool(mask, len(starts), new, seen)
    begin = torch.tensor(starts, device=mask.device)[:, None, None]
    kept = torch.arange(seen, device=mask.device) >= begin  # [rows, 1, seen]
    earlier = seen - new
    same = (visible[:, :, :earlier] == kept[:, :, :earlier]).all()
    if bool(same & (visible[:, -1, earlier:] == kept[:, 0, earlier:]).all()):
        return None
    shown = (visible & ~kept).any(dim=1)
    if bool(shown.any()):
        raise ModelError(
            f"the attention mask shows {_places(shown)}, which it hid when the prompt was "
            "compressed, so that they were dropped as padding: hide them in every pass, or start a "
            "new cache"
        )
    return View(visible)


def own_block(
    mask: Tensor | None, rows: int, new: int, seen: int, device: torch.device
) -> Bool[Tensor, "rows new new"]:
    """Which of this pass's own tokens each of them sees."""
    if mask is None:
        causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()
        return causal.expand(rows, new, new)
    return to_bool(mask, rows, new, seen)[:, :, seen - new :]


def row_starts(mask: Tensor | None, rows: int, new: int, seen: int) -> tuple[int, ...]:
    """First valid position per batch row, from the mask of a prompt's last pass.

    Raises ModelError unless what it hides is padding on the left.
    """
    if mask is None:
        return (0,) * rows
    visible = to_bool(mask, rows, new, seen)
    valid = visible[:, -1]
    counts = valid.sum(dim=1)
    starts = seen - counts
    padded = torch.arange(seen, device=valid.device) < starts[:, None]
    holes = ~valid & ~padded
    packed = visible.any(dim=1) & ~valid & padded
    if bool((holes | packed).any()):
        if bool(holes.any()):
            raise ModelError(
                f"the attention mask hides {_places(holes)} in the middle or on the right of a "
                "prompt: pad on the left (tokenizer.padding_side = 'left')"
            )
        raise ModelError(
            f"the attention mask shows {_places(packed)} to some tokens of the prompt and hides "
            "them from its last one (several sequences packed into a row?): give every sequence a "
            "row of its own"
        )
    return tuple(starts.tolist())


def _places(marked: Bool[Tensor, "rows seen"]) -> str:
    """Rows and positions in words; at most four rows."""
    texts = []
    for row in marked.any(dim=1).nonzero()[:, 0].tolist():
        places = marked[row].nonzero()[:, 0].tolist()
        count = "" if len(places) == places[-1] - places[0] + 1 else f" ({len(places)} of them)"
        texts.append(f"positions {places[0]} to {places[-1]}{count} of row {row}")
    more = [f"and {len(texts) - 4} more rows"] if len(texts) > 4 else []
    return ", ".join(texts[:4] + more)


class Places(NeverCopied):
    """Positions of the tokens that a static segment kept, in its order. Never changes once made."""

    def __init__(self, among: NDArray[np.int32], kept: Int[Tensor, " kept"]) -> None:
        """Tokens number `kept` among those at the positions `among`.

        A choice made on a device is copied without waiting, and waited for when it is asked for.
        """
        self._among: NDArray[np.int32] = among
        self._kept: Tensor | None = None
        self._written: torch.cuda.Event | None = None
        if not kept.is_cuda:
            self._among = among[np.from_dlpack(kept)]
            return
        self._kept = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        self._kept.copy_(kept, non_blocking=True)
        self._written = mark(kept.device)

    def read(self) -> NDArray[np.int32]:
        """The positions, in the order in which the segment tells its tokens."""
        if self._kept is not None and self._written is not None:
            self._written.synchronize()
            self._among = self._among[self._kept.numpy()]
            self._kept = self._written = None
        return self._among

    def before(self, limit: int) -> Places:
        """Without positions from `limit` on."""
        known = self.read()
        return Places(known, torch.from_numpy(np.flatnonzero(known < limit)))


def span(first: int, end: int) -> NDArray[np.int32]:
    """Positions from `first` up to `end`."""
    return np.arange(first, end, dtype=np.int32)


def dynamic_positions(
    head: DynamicHead, start: int, stored: int, resident: bool
) -> Int[Tensor, " tokens"]:
    """Positions of a dynamic head's tokens, on its device; its row begins at `start`.

    In the order of its segment, of `stored` tokens, where `resident`; else in that of all its
    tokens (`DynamicHead.all_tokens`).
    """
    layout, slots = head.layout, head.slots.long()
    moved = layout.items * layout.chunk
    whole = layout.sinks + moved + layout.recent
    tail = stored - head.hot_end

    def count(first: int, tokens: int) -> Tensor:
        return torch.arange(first, first + tokens, device=slots.device)

    if resident:
        items = (slots[:, None] * layout.chunk + count(0, layout.chunk)).flatten()
    else:
        items = count(0, moved)
    parts = [
        count(0, layout.sinks),
        count(layout.sinks + moved, layout.recent),
        layout.sinks + items,
        count(whole, tail),
    ]
    if resident and head.bits != EXACT_BITS:
        parts = [parts[2], *parts[:2], parts[3]]
    return start + torch.cat(parts)


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


class HeldSegments(Protocol):
    """What a compressed layer holds, and where its tokens stand (runtime.ragged)."""

    account: LayerAccount
    dynamic: dict[int, DynamicHead]
    kv_heads: int
    quantised: QuantisedRows | None
    retriever: Retriever
    scaling: float
    storage: RaggedStorage

    def start(self, row: int) -> int:
        """First position of a row."""
        ...

    def attended(self, segment: int, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a segment that a pass of so many tokens attends to."""
        ...

    def known_positions(self, segment: int) -> NDArray[np.int32]:
        """Of the tokens of a segment that is not dynamic."""
        ...


def attend_seeing(
    layer: HeldSegments, query: Float[Tensor, "rows query_heads new dim"], view: View
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
            layer.retriever.step_seeing(storage, layer.quantised, grouped[:, :, 0], hidden)
    else:
        layer.retriever.join()
    outputs = []
    for segment in range(storage.segments):
        row = segment // layer.kv_heads
        key, value = layer.attended(segment, new)
        positions = segment_positions(layer, segment, resident=new == 1)
        visible = view.visible[row].index_select(1, positions)
        outputs.append(attend_where(grouped[segment], key, value, layer.scaling, visible))
    out = torch.stack(outputs).view(rows, query_heads, new, -1)
    return out.transpose(1, 2).contiguous()


def _hidden_items(
    layer: HeldSegments, segment: int, visible: Bool[Tensor, "rows 1 seen"]
) -> Bool[Tensor, " items"]:
    """Items of a dynamic head of which no token is seen."""
    head, row = layer.dynamic[segment], segment // layer.kv_heads
    first = layer.start(row) + head.layout.sinks
    moved = head.layout.items * head.layout.chunk
    shown = visible[row, 0, first : first + moved].view(head.layout.items, head.layout.chunk)
    return ~shown.any(dim=1)


def segment_positions(layer: HeldSegments, segment: int, resident: bool) -> Int[Tensor, " tokens"]:
    """Positions of a segment's tokens in their order, or (of dynamic heads, unless `resident`) in
    that of `DynamicHead.all_tokens`; on the device."""
    head = layer.dynamic.get(segment)
    if head is not None:
        start = layer.start(segment // layer.kv_heads)
        return dynamic_positions(head, start, layer.storage.lengths[segment], resident)
    known = layer.known_positions(segment)
    return torch.from_numpy(known).long().to(layer.storage.key.device, non_blocking=True)
