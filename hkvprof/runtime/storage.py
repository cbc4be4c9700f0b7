"""Flat ragged storage of a layer's resident keys and values.

All (batch row, KV head) segments of a layer lie in one [capacity, dim] tensor for K and one for V.
A segment holds the head's prompt tokens in any order (keys carry their positions), then generated
tokens, then slack. Segments grow together; growth copies the resident bytes once every few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hkvprof.runtime.kernels.interface import Extents, device_integers

SLACK_SHARE = 1 / 32
MIN_SLACK = 4


class RaggedStorage:
    """Segments in row-major order: segment = row * kv_heads + head."""

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "tokens dim"]],
        values: Sequence[Float[Tensor, "tokens dim"]],
    ) -> None:
        """Copy one [tokens, dim] tensor per segment, without slack."""
        self.lengths = [len(key) for key in keys]
        self.capacities = list(self.lengths)
        self.key = torch.cat(list(keys))
        self.value = torch.cat(list(values))
        self._locate()

    def _locate(self) -> None:
        """Offsets on the host; where segments start and end also on the device."""
        self.offsets = [0]
        for capacity in self.capacities[:-1]:
            self.offsets.append(self.offsets[-1] + capacity)
        ends = [o + n for o, n in zip(self.offsets, self.lengths, strict=True)]
        places = device_integers([self.offsets, ends], self.key.device, torch.int32)
        self.starts, self.ends = places
        self.longest = max(self.capacities)

    @property
    def segments(self) -> int:
        """Number of segments: rows times KV heads."""
        return len(self.lengths)

    @property
    def extents(self) -> Extents:
        """Where the segments lie now, for the kernels."""
        return Extents(self.offsets, self.lengths, self.longest, self.starts, self.ends)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one segment."""
        return self.key[:1].nbytes + self.value[:1].nbytes

    def keys(self, segment: int) -> Float[Tensor, "tokens dim"]:
        """View of a segment's keys."""
        start = self.offsets[segment]
        return self.key[start : start + self.lengths[segment]]

    def values(self, segment: int) -> Float[Tensor, "tokens dim"]:
        """View of a segment's values."""
        start = self.offsets[segment]
        return self.value[start : start + self.lengths[segment]]

    def append(
        self,
        key: Float[Tensor, "segments tokens dim"],
        value: Float[Tensor, "segments tokens dim"],
        spare: int,
    ) -> None:
        """Write the same number of new tokens to the end of every segment.

        Where there is no room for them, slack is made too, for at most `spare` tokens more.
        """
        count = key.shape[1]
        if count > self.room:
            slack = max(MIN_SLACK, int(SLACK_SHARE * sum(self.lengths) / self.segments))
            self._grow(count + max(0, min(slack - 1, spare)))
        append_rows(self.key, self.value, self.ends, key, value)
        self.advance(count)

    def advance(self, count: int) -> None:
        """Count tokens that the device has appended already (or, below 0, has not)."""
        self.lengths = [n + count for n in self.lengths]

    @property
    def room(self) -> int:
        """Tokens that every segment can take without growth."""
        return min(c - n for n, c in zip(self.lengths, self.capacities, strict=True))

    def reserve(self, count: int) -> bool:
        """Make room for `count` tokens at once; True when that replaced the tensors."""
        if count <= self.room:
            return False
        self._grow(count)
        return True

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens of every segment."""
        assert all(count <= n for n in self.lengths)
        self.lengths = [n - count for n in self.lengths]
        self.ends -= count

    def take(self, segments: Sequence[int]) -> RaggedStorage:
        """A copy holding the given segments (with repetition), without slack."""
        return RaggedStorage([self.keys(s) for s in segments], [self.values(s) for s in segments])

    def _grow(self, room: int) -> None:
        """New tensors in which every segment has room for that many more tokens."""
        old = (self.key, self.value, self.offsets)
        self.capacities = [n + room for n in self.lengths]
        total = sum(self.capacities)
        self.key = old[0].new_empty((total, old[0].shape[1]))
        self.value = old[1].new_empty((total, old[1].shape[1]))
        self._locate()
        for segment, length in enumerate(self.lengths):
            source = slice(old[2][segment], old[2][segment] + length)
            target = slice(self.offsets[segment], self.offsets[segment] + length)
            self.key[target] = old[0][source]
            self.value[target] = old[1][source]


def append_rows(
    key: Float[Tensor, "capacity dim"],
    value: Float[Tensor, "capacity dim"],
    ends: Int[Tensor, " segments"],
    new_key: Float[Tensor, "segments tokens dim"],
    new_value: Float[Tensor, "segments tokens dim"],
) -> None:
    """Write tokens behind the end of every segment and advance the ends, all on the device."""
    count = new_key.shape[1]
    where = (ends[:, None] + torch.arange(count, device=ends.device)).reshape(-1)
    key.index_copy_(0, where, new_key.reshape(-1, new_key.shape[-1]))
    value.index_copy_(0, where, new_value.reshape(-1, new_value.shape[-1]))
    ends += count
