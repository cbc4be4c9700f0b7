"""What turns with a position: queries and keys, and the bias that a key projection adds to keys.

A key is R(p) (W x + b): its bias is the same for all tokens but for the rotation by its position p,
and is known. The projected index therefore encodes k - R(p) b and adds q . R(p) b to a logit,
which is exact whatever p is: a wrong p costs precision of what is encoded, nothing else. Per rotary
pair with the bias (u, v), the query's (x, y) and the angle a = p w:

    q . R(p) b = (x u + y v) cos a + (y u - x v) sin a
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions of consecutive tokens, as rotary embeddings see them.

    They count up by one from `first`, on every axis; or `told` [axes, tokens] (int32) says what
    they are, as for images under Qwen-VL's three axes. One axis stands for all.
    """

    first: int
    count: int
    told: Int[Tensor, "axes tokens"] | None = None

    @classmethod
    def of(cls, told: Int[Tensor, "axes tokens"]) -> Positions:
        """Of what rotary embeddings were told; kept in full only where they do not count up."""
        first, count = int(told[0, 0]) if told.shape[1] else 0, told.shape[1]
        counted = torch.arange(first, first + count, device=told.device)
        plain = bool((told == counted).all())
        return cls(first, count, None if plain else told.int())

    @property
    def next(self) -> int:
        """Of the token that follows: one above the last token's, on the axis that is ahead."""
        if self.told is None or not self.count:
            return self.first + self.count
        return int(self.told[:, -1].max()) + 1

    def part(self, begin: int, count: int) -> Positions:
        """Those of `count` tokens from number `begin` on."""
        told = None if self.told is None else self.told[:, begin : begin + count]
        return Positions(self.first + begin, count, told)

    def along(self, axes: Int[Tensor, " pairs"], device: Any) -> Float[Tensor, "tokens pairs"]:
        """Positions on each pair's axis, as the floats that rotary embeddings multiply."""
        if self.told is None:
            count = torch.arange(self.first, self.first + self.count, device=device)
            return count.float()[:, None].expand(-1, len(axes))
        told = self.told.to(device)
        if len(told) == 1:
            return told[0].float()[:, None].expand(-1, len(axes))
        return told.index_select(0, axes).T.float()


@dataclass(frozen=True)
class RotatingBias:
    """The bias of one head on the device, as far as the index takes it out.

    `constants` holds per rotary pair the two components of the bias and the radians by which it
    turns from one position to the next; `places` its two channels and the axis of its positions.
    Pairs of nothing but zeros fill up at the end.
    """

    constants: Float[Tensor, "3 pairs"]
    places: Int[Tensor, "3 pairs"]

    @classmethod
    def load(
        cls,
        bias: NDArray[np.float32],
        frequency: NDArray[np.float32],
        axis: NDArray[np.uint8],
        room: int,
        device: torch.device,
    ) -> RotatingBias:
        """Of `bias` [dim], whose pair j is channels j and j + len(frequency): the `room` pairs that
        hold most of it, largest first."""
        turning = len(frequency)
        pairs = np.stack([bias[:turning], bias[turning : 2 * turning]])
        order = np.argsort(-(pairs**2).sum(axis=0), kind="stable")[:room]
        constants = np.stack([*pairs[:, order], frequency[order]])
        places = np.stack([order, order + turning, axis[order]])
        return cls(
            torch.from_numpy(constants.astype(np.float32)).to(device),
            torch.from_numpy(places.astype(np.int32)).to(device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The device tensors, for counting their bytes."""
        return (self.constants, self.places)

    def removed(
        self, keys: Float[Tensor, "tokens dim"], positions: Positions
    ) -> Float[Tensor, "tokens dim"]:
        """The keys less their rotated bias, in float32."""
        cosine, sine = self._turned(positions, keys.device)
        u, v = self.constants[:2]
        first, second = self.places[:2]
        keys = keys.float().clone()
        keys.index_add_(1, first, u * cosine - v * sine, alpha=-1)
        return keys.index_add_(1, second, v * cosine + u * sine, alpha=-1)

    def logits(
        self, query: Float[Tensor, "*rows dim"], positions: Positions
    ) -> Float[Tensor, "*rows tokens"]:
        """Products of queries with the rotated bias at these positions."""
        cosine, sine = self._turned(positions, query.device)
        along, across = self.waves(query)
        return along @ cosine.T + across @ sine.T

    def waves(
        self, query: Float[Tensor, "*rows dim"]
    ) -> tuple[Float[Tensor, "*rows pairs"], Float[Tensor, "*rows pairs"]]:
        """What multiplies cosine and sine of every pair's angle in a logit."""
        u, v = self.constants[:2]
        x, y = (query.float().index_select(-1, place) for place in self.places[:2])
        return x * u + y * v, y * u - x * v

    def _turned(
        self, positions: Positions, device: torch.device
    ) -> tuple[Float[Tensor, "tokens pairs"], Float[Tensor, "tokens pairs"]]:
        angle = positions.along(self.places[2], device) * self.constants[2]
        return angle.cos(), angle.sin()


@dataclass(frozen=True)
class Turning:
    """How a model's rotary embeddings turn the channels of queries and keys.

    `frequency` [pairs] float32, radians per position; `axis` [pairs] uint8, which component of a
    position turns a pair. Pair j is channels j and j + pairs; channels beyond do not turn.
    """

    frequency: NDArray[np.float32]
    axis: NDArray[np.uint8]

    def undone(
        self, rotated: Float[Tensor, "heads tokens dim"], positions: Positions
    ) -> Float[Tensor, "heads tokens dim"]:
        """Queries or keys at these positions turned back to position 0, in float32."""
        axes = torch.from_numpy(self.axis.astype(np.int64)).to(rotated.device)
        frequency = torch.from_numpy(self.frequency.copy()).to(rotated.device)
        return turned(rotated, -positions.along(axes, rotated.device) * frequency)


def turned(
    x: Float[Tensor, "*rows dim"], angle: Float[Tensor, "*some pairs"]
) -> Float[Tensor, "*rows dim"]:
    """Pair j of `x`, channels j and j + pairs, turned by `angle` (radians), in float32."""
    pairs = angle.shape[-1]
    cosine, sine = angle.cos(), angle.sin()
    first, second, rest = x.float().split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


@dataclass(frozen=True)
class RotatingKeys:
    """What a model's key projections add to keys before these are rotated, all layers and heads.

    `bias` [layers, kv_heads, dim] float32, in the scale of rotated keys; `frequency` [pairs]
    float32, radians per position; `axis` [pairs] uint8, which component of a position turns a pair.
    Pair j is channels j and j + pairs; channels beyond do not turn, and have no bias here.
    """

    bias: NDArray[np.float32]
    frequency: NDArray[np.float32]
    axis: NDArray[np.uint8]

    def where_larger(self, layer: int, energy: NDArray[np.float64]) -> RotatingKeys:
        """The same with the pairs alone of a layer whose squared bias is at least `energy`
        [kv_heads], which a pair of those heads has on average without it; others are zero."""
        pairs = len(self.frequency)
        bias = self.bias.copy()
        own = bias[layer]
        squares = own[:, :pairs] ** 2 + own[:, pairs : 2 * pairs] ** 2
        small = (squares < energy[:, None]) | (squares == 0)
        for begin in (0, pairs):
            own[:, begin : begin + pairs][small] = 0
        return replace(self, bias=bias)

    @property
    def most_pairs(self) -> int:
        """The largest number of pairs that a head's bias has."""
        return most_pairs(self.bias, len(self.frequency))

    def heads(self, layer: int, device: torch.device) -> Sequence[RotatingBias]:
        """Every head of a layer on the device."""
        fixed = (self.frequency, self.axis, self.most_pairs, device)
        return [RotatingBias.load(bias, *fixed) for bias in self.bias[layer]]


def most_pairs(bias: NDArray[np.float32], pairs: int) -> int:
    """The largest number of pairs of any head in which `bias` [..., dim] is not zero."""
    held = (bias[..., :pairs] != 0) | (bias[..., pairs : 2 * pairs] != 0)
    return int(held.sum(axis=-1).max(initial=0))
