"""Flat ragged storage of a layer's resident keys and values.

All (batch row, KV head) segments of a layer lie in one [capacity, dim] tensor for K and one for V.
A segment holds the head's prompt tokens in any order (keys carry their positions), then generated
tokens, then slack. Segments grow together; growth copies the resident bytes once every few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
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
        self, key: Float[Tensor, "segments tokens dim"], value: Float[Tensor, "segments tokens dim"]
    ) -> None:
        """Write the same number of new tokens to the end of every segment."""
        count = key.shape[1]
        if any(n + count > c for n, c in zip(self.lengths, self.capacities, strict=True)):
            self._grow(count)
        where = (self.ends[:, None] + torch.arange(count, device=self.ends.device)).reshape(-1)
        self.key.index_copy_(0, where, key.reshape(-1, key.shape[-1]))
        self.value.index_copy_(0, where, value.reshape(-1, value.shape[-1]))
        self.ends += count
        self.lengths = [n + count for n in self.lengths]

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens of every segment."""
        assert all(count <= n for n in self.lengths)
        self.lengths = [n - count for n in self.lengths]
        self.ends -= count

    def take(self, segments: Sequence[int]) -> RaggedStorage:
        """A copy holding the given segments (with repetition), without slack."""
        return RaggedStorage([self.keys(s) for s in segments], [self.values(s) for s in segments])

    def _grow(self, count: int) -> None:
        old = (self.key, self.value, self.offsets)
        slack = max(MIN_SLACK, int(SLACK_SHARE * sum(self.lengths) / self.segments))
        self.capacities = [n + count - 1 + slack for n in self.lengths]
        total = sum(self.capacities)
        self.key = old[0].new_empty((total, old[0].shape[1]))
        self.value = old[1].new_empty((total, old[1].shape[1]))
        self._locate()
        for segment, length in enumerate(self.lengths):
            source = slice(old[2][segment], old[2][segment] + length)
            target = slice(self.offsets[segment], self.offsets[segment] + length)
            self.key[target] = old[0][source]
            self.value[target] = old[1][source]
