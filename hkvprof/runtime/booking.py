"""What a compressed layer writes into its account, from numbers that the host knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hkvprof.profile.costs import END_BYTES
from hkvprof.runtime.host import DynamicHead
from hkvprof.runtime.receipt import HeadAccount, LayerAccount
from hkvprof.runtime.storage import RaggedStorage


def open_heads(account: LayerAccount, names: Sequence[str], kv_heads: int) -> None:
    """A new account for every segment; what was counted over earlier steps goes on."""
    account.settle()
    account.fetches = None
    old = account.heads
    account.heads = [
        HeadAccount(segment // kv_heads, segment % kv_heads, name, 0, 0, 0)
        for segment, name in enumerate(names)
    ]
    for now, before in zip(account.heads, old, strict=False):
        now.chunks_requested = before.chunks_requested
        now.chunks_fetched = before.chunks_fetched
        now.bytes_moved = before.bytes_moved
    account.compressions += 1


def take_heads(account: LayerAccount, segments: Sequence[int], kv_heads: int) -> None:
    """The accounts of rows that were reordered, dropped or repeated."""
    account.settle()
    account.fetches = None
    old = account.heads
    account.heads = [
        HeadAccount(**{**vars(old[before]), "row": segment // kv_heads})
        for segment, before in enumerate(segments)
    ]


def measure(
    account: LayerAccount,
    storage: RaggedStorage,
    dynamic: Mapping[int, DynamicHead],
    starts: Sequence[int],
    seen: int,
) -> None:
    """Every head's tokens and bytes; `starts` of the batch rows, `seen` is the logical length."""
    total = 0
    counted: set[int] = set()  # rows of a beam share index and host items
    for segment, head in enumerate(account.heads):
        state = dynamic.get(segment)
        head.tokens_resident = storage.lengths[segment]
        head.tokens_seen = seen - starts[head.row]
        head.resident_bytes = storage.capacities[segment] * storage.token_bytes + END_BYTES
        if state is not None:
            first = id(state.host) not in counted
            counted.add(id(state.host))
            head.resident_bytes += state.slot_bytes + (state.index_bytes if first else 0)
            head.host_bytes = state.host.nbytes if first else 0
        total += head.resident_bytes
    account.tail = 0
    account.dense_bytes = storage.segments * seen * storage.token_bytes
    account.resident_bytes = total
