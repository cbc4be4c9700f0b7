"""RDKV: one allocation of bits says what is evicted and what is kept how exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.evaluate.baselines.base import (
    Choice,
    Kept,
    LayerPrompt,
    PromptView,
    Selection,
    baseline,
)
from hkvprof.evaluate.baselines.codes import CONSTANT_BYTES, encode_groups
from hkvprof.evaluate.baselines.scores import observed

VALUE_BITS = (0, 2, 4, 8, 16)
KEY_BITS = (0, 2, 4, 8)
KEY_SHARE = 0.5
"""Part of a head's room that its keys take."""
POOL = 5
_ROUNDS = 60
_SEGMENT_COUNTS = 16
"""Bytes of a head that say how many tokens have 2, 4, 8 and 16 bits; they lie in this order."""


@baseline("rdkv", "RDKV-like", "arXiv 2605.08317")
def rdkv(prompt: PromptView) -> Selection:
    """Bits of tokens (values) and of channels (keys) that lose least by reverse water-filling.

    A token without bits is evicted, key and value. Tokens weigh the attention of the last rows,
    channels the second moments of queries and keys. What bits lose is measured on the prompt's own
    keys and values, where the original calibrates it offline.
    """
    return [_layer(prompt, layer) for layer in prompt.layers]


@dataclass(frozen=True)
class BitPrices:
    """What an element loses (of its variance) and takes (bytes) with each of `bits`."""

    bits: tuple[int, ...]
    loss: tuple[float, ...]
    bytes: tuple[float, ...]

    def allocate(self, weight: Float[Tensor, " elements"], room: float) -> Int[Tensor, " elements"]:
        """Bits of every element, by one price of a byte for all of them, within `room` bytes.

        Elements of the same weight have the same bits. None fits where not even the least does.
        """
        loss, size = (torch.tensor(x, dtype=torch.float64) for x in (self.loss, self.bytes))
        bits, own = torch.tensor(self.bits), weight.double().cpu()[:, None]

        def chosen(price: float) -> Tensor:
            return (own * loss + price * size).argmin(dim=-1)

        if float(size[chosen(0.0)].sum()) <= room:
            return bits[chosen(0.0)]
        low, high = 0.0, max(float(own.max()), 1e-300)
        while float(size[chosen(high)].sum()) > room and high < 1e300:
            high *= 2
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            fits = float(size[chosen(middle)].sum()) <= room
            low, high = (low, middle) if fits else (middle, high)
        return bits[chosen(high)]


def _layer(prompt: PromptView, layer: LayerPrompt) -> list[Choice]:
    tokens, channels = token_weights(layer), channel_weights(layer)
    return [
        coded(prompt, layer.key[head], layer.value[head], tokens[head], channels[head])
        for head in range(len(layer.key))
    ]


def token_weights(layer: LayerPrompt) -> Float[Tensor, "kv_heads tokens"]:
    """Attention of the last rows and the group, averaged over five neighbours (mirrored ends)."""
    weight = observed(layer).view(len(layer.key), -1, layer.key.shape[1]).sum(dim=1)
    margin = min(POOL // 2, weight.shape[-1] - 1)
    padded = torch.nn.functional.pad(weight[:, None], (margin, margin), mode="reflect")
    return torch.nn.functional.avg_pool1d(padded, 2 * margin + 1, stride=1)[:, 0]


def channel_weights(layer: LayerPrompt, window: int = 16) -> Float[Tensor, "kv_heads dim"]:
    """Second moment of the last rows' queries times that of the keys, per channel."""
    query = layer.query[:, -window:].float().square().mean(dim=1)
    query = query.view(len(layer.key), -1, query.shape[-1]).mean(dim=1)
    return query * layer.key.float().square().mean(dim=1)


def coded(
    prompt: PromptView,
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    tokens: Float[Tensor, " tokens"],
    channels: Float[Tensor, " dim"],
) -> Kept:
    """One head: values first, then keys of the tokens that are left, in the rest of the room."""
    dim = key.shape[-1]
    room = prompt.share * prompt.tokens * prompt.token_bytes - _SEGMENT_COUNTS - dim / 4
    by_token = value_prices(value, prompt.itemsize)
    bits = by_token.allocate(tokens, (1 - KEY_SHARE) * room)
    kept = torch.cat([(bits == width).nonzero()[:, 0] for width in VALUE_BITS[1:]])
    taken = sum(by_token.bytes[VALUE_BITS.index(int(width))] for width in bits[kept])
    of_key = key_prices(key, len(kept)).allocate(channels, room - taken)
    at = kept.to(key.device)
    held = [_by_token(value[at], bits[kept], prompt.itemsize), _by_channel(key[at], of_key)]
    stored = sum(size for _, size in held) + _SEGMENT_COUNTS + -(-dim // 4)
    return Kept(held[1][0].to(key.dtype), held[0][0].to(value.dtype), stored)


def value_prices(value: Float[Tensor, "tokens dim"], itemsize: int) -> BitPrices:
    """Of one token's value: bits for all channels, one scale and least value."""
    dim = value.shape[-1]
    loss = [_lost(value, bits) for bits in VALUE_BITS[1:-1]]
    size = [dim * bits / 8 + CONSTANT_BYTES for bits in VALUE_BITS[1:-1]]
    return BitPrices(VALUE_BITS, (1.0, *loss, 0.0), (0.0, *size, float(dim * itemsize)))


def key_prices(key: Float[Tensor, "tokens dim"], kept: int) -> BitPrices:
    """Of one channel of all keys that are kept: bits for all tokens, one scale and least value."""
    loss = [_lost(key.T, bits) for bits in KEY_BITS[1:]]
    size = [float(-(-kept * bits // 8) + CONSTANT_BYTES) for bits in KEY_BITS[1:]]
    return BitPrices(KEY_BITS, (1.0, *loss), (0.0, *size))


def _lost(rows: Float[Tensor, "rows width"], bits: int) -> float:
    """Squared error of coding every row by itself, over the variance."""
    error = (encode_groups(rows, bits, rows.shape[-1]).decode() - rows.float()).square().mean()
    return min(1.0, float(error / rows.float().var().clamp(min=1e-30)))


def _by_token(
    value: Float[Tensor, "kept dim"], bits: Int[Tensor, " kept"], itemsize: int
) -> tuple[Tensor, int]:
    """Values through their codes, in segments of equal bits, and the bytes of these."""
    parts, stored = [value[:0].float()], 0
    for width in VALUE_BITS[1:]:
        rows = value[(bits == width).to(value.device)]
        if width == VALUE_BITS[-1]:
            parts.append(rows.float())
            stored += rows.numel() * itemsize
        elif len(rows):
            codes = encode_groups(rows, width, rows.shape[-1])
            parts.append(codes.decode())
            stored += codes.nbytes
    return torch.cat(parts), stored


def _by_channel(key: Float[Tensor, "kept dim"], bits: Int[Tensor, " dim"]) -> tuple[Tensor, int]:
    """Keys through their codes, channel by channel; channels without bits are zero."""
    made, stored = torch.zeros(key.shape, device=key.device), 0
    for width in KEY_BITS[1:]:
        which = (bits == width).nonzero()[:, 0].to(key.device)
        if len(which) and len(key):
            codes = encode_groups(key[:, which].T, width, len(key))
            made[:, which] = codes.decode().T
            stored += codes.nbytes
    return made, stored
