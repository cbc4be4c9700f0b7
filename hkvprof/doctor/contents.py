"""Which tokens a compressed segment holds, found by its bytes, and whether that can be right."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.doctor.recording import Segment
from hkvprof.doctor.records import FaultError
from hkvprof.heads import KeepRule

_SWAPPED = "keys and values have changed places in the segment's storage"
_STARTS = "the starts of rows: padding was kept as if it were tokens"
_STALE = (
    "the hot buffer holds other tokens than its slot map says: a stale binding, or a buffer of a "
    "former request"
)
_INDICES = "the numbers of the kept tokens: off by one, or counted from another start"
_OTHER = (
    "the order of layers, heads or rows: the segment holds tokens of another one, or of a former "
    "request"
)
_POSITIONS = (
    "positions: the cache reports its stored length instead of the logical one (get_seq_length, "
    "get_mask_sizes), or the M-RoPE offset is another conversation's, so that new tokens are "
    "rotated wrongly"
)
_PARTED = "a kept key stands beside another token's value: the two were selected differently"


def positions(
    segment: Segment,
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    start: int,
    prompt: int,
) -> list[int]:
    """The position of every resident token, by comparing bytes with dense keys and values.

    `start` is the row's first valid position, `prompt` the length of the prompt. Raises FaultError.
    """
    known: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(_rows(key)):
        if place >= start:
            known[row].append(place)
    dense_values, values = _rows(value), _rows(segment.value)
    found: list[int] = []
    for number, row in enumerate(_rows(segment.key)):
        places = known.get(row)
        if not places:
            raise FaultError(
                f"resident token {number} of {len(segment.key)} is none of the model's "
                f"{len(key) - start} tokens, or is there twice",
                _stranger(segment, number, row, key, value, start, prompt, found),
            )
        same = [place for place in places if dense_values[place] == values[number]]
        if not same:
            raise FaultError(
                f"the value of the token at position {places[0]} is not its own", _PARTED
            )
        places.remove(same[0])
        found.append(same[0])
    return found


def _stranger(
    segment: Segment, number: int, row: bytes, key: Tensor, value: Tensor, start: int, prompt: int,
    found: list[int],
) -> str:  # fmt: skip
    """The likely cause of a resident key that the dense cache does not have."""
    if row in _rows(key[:start]):
        return _STARTS
    if row in _rows(value):
        return _SWAPPED
    tail = max(0, len(key) - prompt)
    if number >= len(segment.key) - tail:
        return _POSITIONS
    if segment.layout is not None and number >= segment.layout.sinks + segment.layout.recent:
        return _STALE
    return _INDICES if row in _rows(key) else _OTHER


def check_structure(
    segment: Segment, places: list[int], start: int, tokens: int, keep: KeepRule
) -> None:
    """Raise FaultError unless a segment of a row of positions `start` to `tokens` is laid out so:

    dynamic: sinks, recent, hot slots as the slot map says, tokens since; static: sinks and the
    last tokens are among those kept.
    """
    layout = segment.layout
    if layout is None:
        last = range(max(start, tokens - keep.recent), tokens)
        missing = {*range(start, min(start + keep.sinks, tokens)), *last} - set(places)
        if missing:
            raise FaultError(
                f"positions {sorted(missing)} are not resident, although sinks and recent tokens "
                "always stay",
                _INDICES,
            )
        return
    first = start + layout.sinks
    behind = first + layout.items * layout.chunk
    since = behind + layout.recent
    hot = [first + slot * layout.chunk + i for slot in segment.slots for i in range(layout.chunk)]
    expected = [*range(start, first), *range(behind, since), *hot, *range(since, tokens)]
    if places != expected:
        wrong = next((a, b) for a, b in zip(places, expected, strict=False) if a != b) if (
            len(places) == len(expected)
        ) else (len(places), len(expected))  # fmt: skip
        raise FaultError(
            f"a dynamic head's segment is not laid out as its slot map says (found {wrong[0]}, "
            f"expected {wrong[1]})",
            _STALE,
        )


def _rows(x: Tensor) -> list[bytes]:
    """Every row's bytes."""
    flat = x.detach().contiguous().view(torch.uint8).cpu().numpy()
    return [row.tobytes() for row in flat]
