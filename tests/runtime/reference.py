"""Dense attention over just the tokens that a compressed cache kept: the runtime's reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hkvprof.models.attention import AttentionCall, MarkedLayer, hooked_attention
from hkvprof.models.calls import with_cache
from hkvprof.runtime.layer import CompressedLayer

EXACT = "donot_use_mm_for_euclid_dist"


def kept_positions(layer: CompressedLayer, dense_key: Tensor) -> list[list[set[int]]]:
    """[row][head] positions among the dense ones whose keys a compressed layer holds now.

    Found by comparing stored keys with the dense ones (the nearest, which must be near), so that
    wrong bookkeeping shows. Tokens after the dense ones are held whole and not named.
    """
    assert layer.ragged is not None
    rows, heads, tokens, _ = dense_key.shape
    tail = layer.get_seq_length() - tokens
    result = []
    for row in range(rows):
        kept_row = []
        for head in range(heads):
            stored = layer.ragged.storage.keys(row * heads + head)
            stored = stored[: len(stored) - tail]
            distance = torch.cdist(stored, dense_key[row, head], compute_mode=EXACT)
            nearest = distance.min(dim=1)
            limit = 1e-4 * dense_key[row, head].norm(dim=-1).mean()
            assert bool((nearest.values <= limit).all()), "a stored key is none of the dense ones"
            kept_row.append({int(i) for i in nearest.indices})
            assert len(kept_row[-1]) == len(stored), "a token is stored twice"
        result.append(kept_row)
    return result


class MaskedLayer(MarkedLayer):
    """A dense layer that attends, in decoding steps, to given prompt positions only."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[list[set[int]]] | None = None
        self.prompt = 0

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        if self.kept is None or call.query.shape[2] != 1:
            return call.dense()
        rows, query_heads, _, dim = call.query.shape
        heads, tokens = call.key.shape[1], call.key.shape[2]
        group = query_heads // heads
        visible = torch.zeros(rows, heads, tokens, dtype=torch.bool)
        visible[:, :, self.prompt :] = True
        for row, kept_row in enumerate(self.kept):
            for head, kept in enumerate(kept_row):
                visible[row, head, sorted(kept)] = True
        query = call.query.view(rows, heads, group, dim).double()
        logits = torch.einsum("bhgd,bhnd->bhgn", query, call.key.double()) * call.scaling
        weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(dim=-1)
        out = torch.einsum("bhgn,bhnd->bhgd", weights, call.value.double())
        return out.reshape(rows, 1, query_heads, -1).to(call.query.dtype), None


def masked_cache(model: Any) -> DynamicCache:
    """A dense cache with a MaskedLayer for every layer that would grow; others stay stock."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [MaskedLayer() if type(old) is DynamicLayer else old for old in cache.layers]
    return cache


@torch.no_grad()
def masked_step(
    model: Any, cache: DynamicCache, kept: list[list[list[set[int]]]], prompt: int, **inputs: Any
) -> Tensor:
    """Logits of one decoding step in which masked layer i sees `kept[i]` of the prompt."""
    masked = [layer for layer in cache.layers if isinstance(layer, MaskedLayer)]
    for layer, positions in zip(masked, kept, strict=True):
        layer.kept, layer.prompt = positions, prompt
    with hooked_attention(model):
        return model(**inputs, **with_cache(model, cache)).logits
