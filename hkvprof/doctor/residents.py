"""Which tokens a compressed head holds, found by their bytes, and which it should have kept.

The latter is computed anew in float64 from dense keys and queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hkvprof.doctor.recording import Segment
from hkvprof.doctor.records import FaultError
from hkvprof.heads import EXACT_BITS, HeadType, KeepRule, Strategy
from hkvprof.profile.costs import SCORE_BYTES, SLOT_BYTES
from hkvprof.profile.queries import QueryTables

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
_CODES = (
    "tokens in fewer bits do not give back what was stored: codes, scales, mean or rotation, or "
    "rows of another segment"
)
_PARTED = "a kept key stands beside another token's value: the two were selected differently"


def positions(
    segment: Segment,
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    start: int,
    prompt: int,
) -> list[int]:
    """The position of every resident token, by comparing bytes with dense keys and values; of
    those in fewer bits, by the nearest key.

    `start` is the row's first valid position, `prompt` the length of the prompt. Raises FaultError.
    """
    found = _nearest(segment, key, value, start) if segment.few else []
    known: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(_rows(key)):
        if place >= start:
            known[row].append(place)
    dense_values, values = _rows(value), _rows(segment.value)
    for number, row in enumerate(_rows(segment.key)):
        if number < segment.few:
            continue
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


def _nearest(
    segment: Segment,
    key: Float[Tensor, "tokens dim"],
    value: Float[Tensor, "tokens dim"],
    start: int,
) -> list[int]:
    """The positions of the tokens in fewer bits. Raises FaultError where one is not as near as half
    a step in every channel, after any rotation, may take it."""
    step = 1 / 254 if segment.bits == 8 else 1 / 15
    limits = []
    for dense in (key[start:].double(), value[start:].double()):
        spread = (dense - dense.mean(0)).norm(dim=1).max()
        rounding = torch.finfo(key.dtype).eps * dense.norm(dim=1).max()
        limits.append(key.shape[1] ** 0.5 * step * 2 * spread + 4 * rounding)
    distance = torch.cdist(segment.key[: segment.few].double(), key[start:].double())
    places = (distance.argmin(dim=1) + start).tolist()
    apart = (segment.value[: segment.few].double() - value[places].double()).norm(dim=1)
    if len(set(places)) < len(places) or bool((distance.amin(dim=1) > limits[0]).any()):
        raise FaultError(
            "a token in fewer bits is near none of the model's, or there twice", _CODES
        )
    if bool((apart > limits[1]).any()):
        number = int(apart.argmax())
        raise FaultError(
            f"the value of the token at position {places[number]} is not its own", _PARTED
        )
    return places


def given_back(
    segment: Segment, places: list[int], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """A head's dense keys and values with those in fewer bits as the segment gives them back."""
    if not segment.few:
        return key, value
    key, value, few = key.clone(), value.clone(), places[: segment.few]
    key[few], value[few] = segment.key[: segment.few], segment.value[: segment.few]
    return key, value


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

    dynamic: sinks, recent, hot slots as the slot map says (first, where in fewer bits), tokens
    since; static: sinks and the last tokens are among those kept exactly.
    """
    layout = segment.layout
    if layout is None:
        last = range(max(start, tokens - keep.recent), tokens)
        exact = set(places[segment.few :])
        missing = {*range(start, min(start + keep.sinks, tokens)), *last} - exact
        if missing:
            raise FaultError(
                f"positions {sorted(missing)} are not resident, although sinks and recent tokens "
                "always stay as they are",
                _INDICES,
            )
        return
    first = start + layout.sinks
    behind = first + layout.items * layout.chunk
    since = behind + layout.recent
    hot = [first + slot * layout.chunk + i for slot in segment.slots for i in range(layout.chunk)]
    ends = [*range(start, first), *range(behind, since)]
    expected = [*hot, *ends] if segment.few else [*ends, *hot]
    expected += range(since, tokens)
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


_NEAR = 1e-3
"""Relative difference of scores that float32 may decide either way."""
_KEPT = "the numbers of the kept tokens: not the best by score (off by one, or wrongly mapped)"
PLAN = "the order of layers or heads: the plan of one was applied to another"
GROUPING = "head grouping: query heads are mapped to the wrong KV head"
SCALING = "the scaling of attention logits is not the model's"
_HOT = "dynamic heads fetch other chunks than the query asks for: index, query group or slot map"


def check_count(
    segment: Segment, strategy: Strategy, ratio: float, tokens: int, keep: KeepRule, smooth: bool
) -> None:
    """Raise FaultError unless a head right after compression holds what its plan buys.

    `ratio` is its share of the dense bytes of `tokens` tokens, everything counted.
    """
    held = len(segment.key)
    static = static_count(strategy, ratio, tokens, keep, segment.key)
    hot = _hot_items(strategy, ratio, tokens, keep, segment.key, smooth)
    if ratio * tokens >= tokens:
        wanted, kind = tokens, "whole"
    elif hot is None:
        wanted, kind = static, "static"
    else:
        wanted, kind = hot, "dynamic"
    dynamic = segment.layout is not None
    if held != wanted or dynamic != (kind == "dynamic"):
        name = "dynamic" if dynamic else "static or whole"
        raise FaultError(
            f"{held} resident tokens ({name}) after compression, where the plan says {wanted} "
            f"({kind}) of {tokens}",
            PLAN,
        )


def static_count(
    strategy: Strategy, ratio: float, tokens: int, keep: KeepRule, like: Tensor
) -> int:
    """Tokens that a static head keeps; `like` are keys of its width and dtype."""
    least, bits = min(tokens, keep.sinks + keep.recent), strategy.resident_bits
    if bits == EXACT_BITS:
        return min(tokens, max(int(ratio * tokens + 1e-6), least))
    width, unit = like.shape[1], 2 * like.shape[1] * like.element_size()
    row = 2 * (width * bits // 8 + 2 * (1 if bits == 8 else -(-width // _scaled(width))))
    few = int((ratio * tokens - least - 1) * unit / row + 1e-6)
    return max(least, min(tokens, least + few))


def _scaled(width: int) -> int:
    """Channels of a scale in 4 bits (docs/profile-format.md)."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0)


def passes(check: Callable[..., None], *given: Any) -> bool:
    """Whether a check finds nothing, to try what a mistake would explain."""
    try:
        check(*given)
    except FaultError:
        return False
    return True


def other_scalings(scaling: float, width: int) -> list[float]:
    """Mistakes that one makes: none, of the width, applied twice."""
    mistakes = (1.0, width**-0.5, 1 / width, scaling**2)
    return [mistake for mistake in mistakes if mistake != scaling]


def _hot_items(
    strategy: Strategy, ratio: float, tokens: int, keep: KeepRule, key: Tensor, smooth: bool
) -> int | None:
    """Resident tokens of a dynamic head; None where it is static or has no room for its index."""
    if strategy.head_type is HeadType.STATIC:
        return None
    dim, size, chunk = key.shape[1], key.element_size(), strategy.chunk
    items = max(0, tokens - keep.sinks - keep.recent) // chunk
    recent = tokens - keep.sinks - items * chunk
    digest = {"mean": dim * size, "minmax": 2 * dim * size, "projected": strategy.bits // 8}
    token = 2 * dim * size
    left = ratio * tokens * token - items * digest[strategy.index] - (keep.sinks + recent) * token
    if strategy.resident_bits == 8:  # and the mean that was taken off
        left, token = left - token, 2 * dim + 4
    hot = int(left // (chunk * token + SLOT_BYTES + (SCORE_BYTES if smooth else 0)))
    if items < 1 or hot < 1:
        return None
    return keep.sinks + recent + min(hot, items) * chunk


def check_static(
    kept: set[int],
    query: Float[Tensor, "group window dim"],
    key: Float[Tensor, "tokens dim"],
    scaling: float,
    pool: int,
    keep: KeepRule,
) -> None:
    """Raise FaultError unless the kept tokens (numbered within `key`) score best.

    Score: softmax per row of the observation window, maximum over the window, mean over the group
    (docs/method.md).
    """
    tokens, window = len(key), query.shape[1]
    logits = query.double() @ key.double().T * scaling
    rows = torch.arange(tokens - window, tokens, device=key.device)[:, None]
    logits = logits.masked_fill(torch.arange(tokens, device=key.device) > rows, -torch.inf)
    _check_pooled(kept, logits.softmax(-1).amax(1).mean(0), pool, keep)


def check_calibrated(
    kept: set[int], asked: Asked, key: Float[Tensor, "tokens dim"], scaling: float, pool: int,
    keep: KeepRule,
) -> None:  # fmt: skip
    """The same of a calibrated score: softmax per centre, weighted mean, mean over the group."""
    angle = asked.position * asked.frequency
    pairs = len(angle)
    turn = torch.polar(torch.ones_like(angle), angle)
    still = asked.centres
    moved = torch.complex(still[..., :pairs], still[..., pairs : 2 * pairs]) * turn
    query = torch.cat([moved.real, moved.imag, still[..., 2 * pairs :]], dim=-1)
    shares = (query.to(key.device) @ key.double().T * scaling).softmax(-1)
    weighted = shares * asked.weights.to(key.device)[..., None]
    _check_pooled(kept, weighted.sum(1).mean(0), pool, keep)


@dataclass(frozen=True)
class Asked:
    """What a calibrated score asks of one head: `centres` [group, centres, dim] and their `weights`
    [group, centres], standing at `position` once turned by `frequency` [pairs]; all float64."""

    centres: Tensor
    weights: Tensor
    frequency: Tensor
    position: int

    @classmethod
    def of(cls, queries: QueryTables, layer: int, heads: slice, position: int) -> Asked:
        """Of the query `heads` of one KV head."""
        parts = queries.centres[layer, heads], queries.weights[layer, heads], queries.frequency
        centres, weights, frequency = (torch.tensor(part.astype("float64")) for part in parts)
        return cls(centres, weights, frequency, position)


def _check_pooled(kept: set[int], score: Tensor, pool: int, keep: KeepRule) -> None:
    """The kept tokens must score best on the average over `pool` neighbours."""
    half = pool // 2
    around = torch.stack([score, torch.ones_like(score)])
    summed = F.pad(around, (half, half)).unfold(-1, pool, 1).sum(-1)
    score = summed[0] / summed[1]
    score[: keep.sinks] = torch.inf
    score[len(score) - keep.recent :] = torch.inf
    _check_best(kept, score, 1 - _NEAR, "token", _KEPT)


def check_hot(
    segment: Segment,
    query: Float[Tensor, "group dim"],
    key: Float[Tensor, "tokens dim"],
    scaling: float,
) -> None:
    """Raise FaultError unless the hot items score best by this query and mean keys."""
    layout = segment.layout
    assert layout is not None
    begin = layout.sinks
    region = key[begin : begin + layout.items * layout.chunk]
    digest = region.float().view(layout.items, layout.chunk, -1).mean(1).to(key.dtype)
    logits = query.double() @ digest.double().T * scaling
    score = logits.softmax(-1).mean(0)
    off = 4 * torch.finfo(key.dtype).eps * float(1 + logits.abs().max())
    _check_best(set(segment.slots), score, (1 - _NEAR) * float(torch.exp(torch.tensor(-off))),
                "chunk", _HOT)  # fmt: skip


def _check_best(chosen: set[int], score: Tensor, slack: float, what: str, cause: str) -> None:
    """The worst of the chosen must not score less than `slack` times the best of the others."""
    picked = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    picked[sorted(chosen)] = True
    if bool(picked.all()):
        return
    worst, best = score[picked].min(), score[~picked].max()
    if bool(worst < best * slack):
        number = int(torch.where(picked, -1.0, score).argmax())
        raise FaultError(
            f"{what} {number} has score {float(best):.3g} and was left out, {float(worst):.3g} was "
            "enough for another",
            cause,
        )
