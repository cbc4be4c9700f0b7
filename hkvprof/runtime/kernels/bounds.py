"""What compiled kernels read and write lies within the tensors that they are given.

Checked for real, also under `python -O`: what lies beyond is the memory of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.policy.index import KeyIndex, ProjectedIndex
from hkvprof.runtime.kernels.interface import DynamicSegment


def require(holds: bool, expected: str) -> None:
    """Raise CompressionError unless it holds."""
    if not holds:
        raise CompressionError(
            f"decode kernels: expected {expected}, found otherwise; nothing was read or written. "
            "This is a fault of hkvprof: please report it"
        )


def check_storage(key: Tensor, value: Tensor) -> None:
    """Flat storage [capacity, dim] of keys and values."""
    require(key.dim() == 2 and key.shape == value.shape, "keys and values of one shape")


def check_extents(starts: Sequence[int], lengths: Sequence[int], count: int, rows: int) -> None:
    """`count` segments within `rows` of storage."""
    require(len(starts) == len(lengths) == count, "a start and a length per segment")
    if count:
        require(min(starts) >= 0 <= min(lengths), "segments that begin and end in order")
        require(max(map(int.__add__, starts, lengths)) <= rows, "segments within the storage")


def check_head(head: DynamicSegment, key: Tensor, smoothing: float) -> None:
    """A dynamic head's own tensors, and its place in the storage `key` [capacity, dim]."""
    dim, host, slots = key.shape[1], head.host, head.slots
    require(head.segment >= 0 and head.chunk >= 1, "a segment and a chunk length")
    require(head.rerank == 0 or (head.rerank > 0 and head.chunk == 1), "chunks of 1 to rerank")
    require(host.shape == (len(host), 2, head.chunk, dim), "host items [items, 2, chunk, dim]")
    require(0 < head.hot <= head.items <= len(host), "hot items among those of the host")
    end = len(key) - head.hot * head.chunk
    require(0 <= head.hot_start <= end, "hot slots within the storage")
    require(slots.dtype == torch.int32 and slots.dim() == 1, "slots as int32")
    require(slots.is_contiguous(), "slots without gaps")
    _check_floats(head, dim, smoothing)
    _check_index(head.index, head.items, dim)


def check_slots(head: DynamicSegment) -> None:
    """That hot slots hold items of the host; for kernels on the CPU, because it reads the slots."""
    low, high = head.slots.aminmax()
    require(0 <= int(low) <= int(high) < head.items, "slots that hold items of the host")


def _check_floats(head: DynamicSegment, dim: int, smoothing: float) -> None:
    score, scale = head.hot_score, head.scale
    require(smoothing == 0 or score is not None, "a score per hot slot to smooth with")
    if score is not None:
        plain = score.dtype == torch.float32 and score.is_contiguous()
        require(plain and score.shape == (head.hot,), "a float32 score per hot slot")
    if scale is not None:
        require(head.items_per_group >= 1, "groups of at least one item")
        groups = -(-head.items // head.items_per_group)
        fits = scale.dim() == 3 and scale.shape[1:] == (2, dim) and len(scale) >= groups
        require(fits and scale.dtype == torch.float32, "float32 scales [groups, 2, dim]")


def _check_index(index: KeyIndex, items: int, dim: int) -> None:
    require(all(len(tensor) >= items for tensor in index.tensors()), "an index of every item")
    if not isinstance(index, ProjectedIndex):
        shapes = [tensor.shape[1:] == (dim,) for tensor in index.tensors()]
        require(all(shapes), "digests [items, dim]")
        return
    tables, codes = index.tables, index.codes
    channels = tables.codebook.shape[1]
    require(codes.dim() == 2 and codes.dtype == torch.uint8, "codes of one byte")
    require(tables.codebook.shape == (256, channels), "256 centroids per code")
    require(tables.query_projection.shape == (dim, channels), "a projection [dim, channels]")
    require(len(tables.subspaces) == codes.shape[1], "a subspace per code")
    check_subspaces(tables.subspaces, channels)


def check_subspaces(subspaces: Sequence[tuple[int, int]], channels: int) -> None:
    """First channels, and those past the last, of every code."""
    within = (0 <= first <= end <= channels for first, end in subspaces)
    require(len(subspaces) > 0 and all(within), "subspaces within the channels")
