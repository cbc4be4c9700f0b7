"""Residents in fewer bits: tokens of a static head, hot items of a dynamic one, as rows of bytes.

Keys and values are centred by the mean of the prompt's tokens, rotated by a
Hadamard matrix, so that no channel stands out (QuaRot, arXiv 2404.00456), and rounded to 8 or 4
bits. A softmax does not feel the mean key but for the tokens stored otherwise, which have none
taken off: whoever attends adds query . mean to the logits of quantised tokens, and the mean value
in proportion to their weight. Queries are rotated instead of keys, outputs instead of values.

Calibration measures with these functions what the runtime stores with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from hkvprof.profile.costs import quantised_bytes, scale_group

LEAST_SCALE = 2.0**-24
"""The least positive float16."""
MOST_SCALE = 65504.0


@dataclass(frozen=True)
class RowFormat:
    """How a token of `dim` channels lies in a row of bytes: key, then value, each its codes, then
    its scales (float16, one per `group` channels).

    8 bits: int8 codes c in -127 to 127 that stand for c * scale. 4 bits: codes c in 0 to 15 that
    stand for (c - 7.5) * scale; byte j of a group's bytes holds its channel j in the low half and
    its channel j + group / 2 in the high half.
    """

    bits: int
    dim: int

    @property
    def group(self) -> int:
        """Channels that share a scale."""
        return scale_group(self.bits, self.dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return quantised_bytes(self.bits, self.dim)

    @property
    def code_bytes(self) -> int:
        """Bytes of a key's codes; its scales follow."""
        return self.dim * self.bits // 8

    def encode(
        self, key: Float[Tensor, "tokens dim"], value: Float[Tensor, "tokens dim"]
    ) -> UInt8[Tensor, "tokens row_bytes"]:
        """Rows of centred, rotated keys and values. NaN counts as 0, infinity as the largest."""
        return torch.cat([*self._encode(key), *self._encode(value)], dim=1)

    def decode(
        self, rows: UInt8[Tensor, "tokens row_bytes"]
    ) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """Centred, rotated keys and values, float32."""
        half = self.row_bytes // 2
        return self._decode(rows[:, :half]), self._decode(rows[:, half:])

    def _encode(self, part: Tensor) -> tuple[Tensor, Tensor]:
        groups = torch.nan_to_num(part.float()).unflatten(1, (-1, self.group))
        most = 127.0 if self.bits == 8 else 7.5
        scale = (groups.abs().amax(dim=2) / most).clamp(LEAST_SCALE, MOST_SCALE).half()
        level = groups / scale.float()[..., None]
        if self.bits == 8:
            codes = level.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        else:
            four = (level + 7.5).round().clamp(0, 15).to(torch.uint8)
            low, high = four.chunk(2, dim=2)
            codes = low | (high << 4)
        return codes.flatten(1), scale.view(torch.uint8)

    def _decode(self, part: Tensor) -> Tensor:
        codes = part[:, : self.code_bytes].unflatten(1, (self.dim // self.group, -1))
        scale = part[:, self.code_bytes :].contiguous().view(torch.float16).float()
        if self.bits == 8:
            level = codes.contiguous().view(torch.int8).float()
        else:
            level = torch.cat([codes & 15, codes >> 4], dim=2).float() - 7.5
        return (level * scale[..., None]).flatten(1)


@lru_cache(maxsize=64)
def hadamard(dim: int, device: torch.device) -> Float[Tensor, "dim dim"]:
    """An orthogonal, symmetric matrix of +-1 / sqrt(block) on the diagonal's blocks; `block` is the
    largest power of two that divides `dim`."""
    block = dim & -dim
    one = torch.ones(1, 1)
    while len(one) < block:
        one = torch.cat([torch.cat([one, one], dim=1), torch.cat([one, -one], dim=1)])
    return torch.block_diag(*[one / block**0.5] * (dim // block)).to(device)


def rotate(part: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Keys, queries or values into the rotated space, or back (the matrix is its own inverse)."""
    return part.float() @ hadamard(part.shape[-1], part.device)


@dataclass(frozen=True)
class Residents:
    """Quantised tokens of one segment: `rows`, and the `mean` [2, dim] of keys and of values that
    was taken off, in the model's dtype. Never changed in place but by the hot slots of a dynamic
    head."""

    format: RowFormat
    mean: Float[Tensor, "2 dim"]
    rows: UInt8[Tensor, "tokens row_bytes"]

    @classmethod
    def around(
        cls, key: Float[Tensor, "tokens dim"], value: Float[Tensor, "tokens dim"], bits: int
    ) -> Residents:
        """None yet, of a segment whose mean is that of these tokens, at least one: all of a prompt
        between sinks and recent ones, whichever of them are kept."""
        mean = torch.stack([key.float().mean(dim=0), value.float().mean(dim=0)]).to(key.dtype)
        kind = RowFormat(bits, key.shape[1])
        rows = key.new_empty((0, kind.row_bytes), dtype=torch.uint8)
        return cls(kind, torch.nan_to_num(mean), rows)

    def encode(
        self, key: Float[Tensor, "tokens dim"], value: Float[Tensor, "tokens dim"]
    ) -> UInt8[Tensor, "tokens row_bytes"]:
        """Rows of more tokens, by the mean that there is."""
        key_mean, value_mean = self.mean.float()
        return self.format.encode(
            rotate(key.float() - key_mean), rotate(value.float() - value_mean)
        )

    def append(
        self, key: Float[Tensor, "tokens dim"], value: Float[Tensor, "tokens dim"]
    ) -> Residents:
        """With these tokens at the end."""
        return replace(self, rows=torch.cat([self.rows, self.encode(key, value)]))

    def take(self, tokens: Int[Tensor, " chosen"]) -> Residents:
        """Some of the tokens, their rows as they are."""
        return replace(self, rows=self.rows[tokens])

    def decode(self) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
        """Keys and values as they are attended to, in the model's dtype."""
        key, value = self.format.decode(self.rows)
        key_mean, value_mean = self.mean.float()
        both = rotate(key) + key_mean, rotate(value) + value_mean
        return both[0].to(self.mean.dtype), both[1].to(self.mean.dtype)

    def on(self, device: torch.device) -> Residents:
        """With its mean on this device."""
        return replace(self, mean=self.mean.to(device))

    def encode_items(
        self, key: Float[Tensor, "items chunk dim"], value: Float[Tensor, "items chunk dim"]
    ) -> UInt8[Tensor, "items chunk row_bytes"]:
        """As `encode`, of chunks of tokens."""
        return self.encode(key.flatten(0, 1), value.flatten(0, 1)).unflatten(0, key.shape[:2])

    def decode_items(
        self, rows: UInt8[Tensor, "items chunk row_bytes"]
    ) -> Float[Tensor, "items 2 chunk dim"]:
        """What rows of chunks of tokens give back: keys, then values."""
        flat = replace(self, rows=rows.flatten(0, 1)).on(rows.device)
        both = torch.stack(flat.decode(), dim=1).unflatten(0, rows.shape[:2])
        return both.transpose(1, 2)

    @cached_property
    def nbytes(self) -> int:
        """Device bytes of rows and mean."""
        return self.rows.nbytes + self.mean.nbytes


def quantised(
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    bits: int,
    first: int,
    end: int,
) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
    """A prompt's keys and values with those from `first` to `end` as residents of so many bits give
    them back."""
    if end <= first:
        return key, value
    own_key, own_value = key[first:end], value[first:end]
    middle = Residents.around(own_key, own_value, bits).append(own_key, own_value).decode()
    pairs = zip((key, value), middle, strict=True)
    whole = [torch.cat([part[:first], own, part[end:]]) for part, own in pairs]
    return whole[0], whole[1]
