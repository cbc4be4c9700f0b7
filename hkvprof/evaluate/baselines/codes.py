"""Keys and values in few bits, as other methods store them: codes, a scale and a least value each.

Codes are really packed and read back: what a method is said to keep are the bytes of these tensors,
and what its heads attend to is what comes out of them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

CONSTANT_BYTES = 4
"""Per group: its scale and its least value, as float16 both."""
_TINY = 2.0**-14
"""The least normal float16: a scale below it says that a group is constant."""


@dataclass(frozen=True)
class GroupCodes:
    """Numbers in `bits` bits, in groups of neighbours along the last axis (the last may be short).

    A number is `least + code * scale` of its group. `codes` lie densely, the first in the lowest
    bits of a byte.
    """

    codes: UInt8[Tensor, " bytes"]
    scale: Float[Tensor, "*rows groups"]
    least: Float[Tensor, "*rows groups"]
    bits: int
    group: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and constants together."""
        return self.codes.nbytes + self.scale.nbytes + self.least.nbytes

    def decode(self) -> Float[Tensor, "*rows width"]:
        """The numbers that the codes stand for, float32."""
        rows = self.scale.shape[:-1]
        codes = _unpack(self.codes, self.bits, rows.numel() * self.width).view(*rows, self.width)
        scale, least = (_spread(x, self.group, self.width) for x in (self.scale, self.least))
        return codes * scale + least


def encode_groups(x: Float[Tensor, "*rows width"], bits: int, group: int) -> GroupCodes:
    """Asymmetric round-to-nearest between the least and the largest number of every group."""
    width = x.shape[-1]
    low, high = _ends(x.float(), group)
    least = low.half()
    scale = ((high - least.float()) / (2**bits - 1)).clamp(min=_TINY).half()
    wide_scale, wide_least = (_spread(part, group, width) for part in (scale, least))
    codes = ((x.float() - wide_least) / wide_scale).round().clamp(0, 2**bits - 1)
    return GroupCodes(
        _pack(codes.to(torch.uint8).flatten(), bits), scale, least, bits, group, width
    )


def group_bytes(rows: int, width: int, bits: int, group: int) -> int:
    """What `encode_groups` takes for [rows, width] numbers."""
    return -(-rows * width * bits // 8) + rows * -(-width // group) * CONSTANT_BYTES


def _ends(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and largest number of every group."""
    parts = x.split(group, dim=-1)
    return (
        torch.stack([part.amin(dim=-1) for part in parts], dim=-1),
        torch.stack([part.amax(dim=-1) for part in parts], dim=-1),
    )


def _spread(constants: Tensor, group: int, width: int) -> Tensor:
    """A group's constant for each of its numbers, float32."""
    return constants.float().repeat_interleave(group, dim=-1)[..., :width]


def _pack(codes: UInt8[Tensor, " numbers"], bits: int) -> UInt8[Tensor, " bytes"]:
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).view(-1, each)
    shift = torch.arange(each, device=codes.device, dtype=torch.uint8) * bits
    return (padded << shift).sum(dim=-1, dtype=torch.uint8)


def _unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> Float[Tensor, " numbers"]:
    shift = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[:, None] >> shift) & (2**bits - 1)).flatten()[:count].float()
