"""Arguments beyond the bounds of tensors, for compiled kernels. `python -O -m` this prints, as
JSON, what each of them met."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hkvprof.runtime.kernels import Extents, QuantisedRows
from hkvprof.runtime.kernels.interface import Kernels, Retrieval
from hkvprof.selection.index import MeanIndex, MinMaxIndex, ProjectedIndex
from hkvprof.selection.residents import Residents, RowFormat
from tests.runtime.kernels.cases import Layer, make_layer

DTYPE = torch.float32
ITEMS, HOT, DIM = 40, 8, 32


def layer(kind: str = "mean", **options: Any) -> Layer:
    """One dynamic head."""
    return make_layer(0, kind, [ITEMS], [HOT], group=2, dim=DIM, dtype=DTYPE, **options)


def changed(**values: Any) -> Callable[[Kernels], object]:
    """Bind a head with these fields."""

    def act(kernels: Kernels) -> object:
        made = layer()
        return kernels.bind(made.key, made.value, [replace(made.heads[0], **values)], 0.2)

    return act


def tables(**values: Any) -> Callable[[Kernels], object]:
    """Bind a head with a projected index whose tables have these fields."""

    def act(kernels: Kernels) -> object:
        made = layer("projected")
        head = made.heads[0]
        assert isinstance(head.index, ProjectedIndex)
        index = replace(head.index, tables=replace(head.index.tables, **values))
        return kernels.bind(made.key, made.value, [replace(head, index=index)], 0.2)

    return act


def attend(starts: list[int], lengths: list[int], segments: int, dim: int = DIM) -> Any:
    """Attend with these extents to a storage of 20 rows."""

    def act(kernels: Kernels) -> object:
        query = torch.ones(segments, 2, dim)
        extents = Extents(starts, lengths, 1, torch.tensor(starts), torch.tensor(lengths))
        return kernels.attend(torch.ones(20, DIM), torch.ones(20, DIM), extents, query, 0.2)

    return act


def held(**values: Any) -> Callable[[Kernels], object]:
    """Attend to two segments of two tokens in 8 bits, told with these fields."""

    def act(kernels: Kernels) -> object:
        key = torch.ones(2, DIM)
        own = Residents.around(key, key, 8).append(key, key)
        rows = QuantisedRows.of(dict.fromkeys(range(2), own))
        assert rows is not None
        query = torch.ones(2, 2, DIM)
        extents = Extents.of([0, 2], [2, 0])
        return kernels.attend(key, key, extents, query, 0.2, replace(rows, **values))

    return act


ROW = RowFormat(8, DIM).row_bytes


def bound(act: Callable[[Retrieval], object]) -> Callable[[Kernels], object]:
    """Use a sound head with unsound arguments."""

    def bind(kernels: Kernels) -> object:
        made = layer()
        return act(kernels.bind(made.key, made.value, made.heads, 0.2))

    return bind


def storage(rows: int) -> Callable[[Kernels], object]:
    """Bind values of fewer rows than keys."""

    def act(kernels: Kernels) -> object:
        made = layer()
        return kernels.bind(made.key, made.value[:rows].contiguous(), made.heads, 0.2)

    return act


def encode(channels: int, subspaces: list[tuple[int, int]], width: int = 6) -> Any:
    """Encode with a codebook of `width` channels."""
    return lambda kernels: kernels.encode(
        torch.ones(5, channels), torch.ones(256, width), subspaces
    )


def hot(**values: Any) -> Callable[[Kernels], object]:
    """Bind a head whose hot slots and host items are rows of 8 bits, of which the former have these
    fields."""

    def act(kernels: Kernels) -> object:
        made = layer(bits=(8, 8))
        head = made.heads[0]
        assert head.held is not None
        own = replace(head, held=replace(head.held, **values))
        return kernels.bind(made.key, made.value, [own], 0.2)

    return act


def hosted(host: torch.Tensor) -> Callable[[Kernels], object]:
    """Bind a head whose host items in 8 bits are these."""

    def act(kernels: Kernels) -> object:
        made = layer(bits=(16, 8))
        return kernels.bind(made.key, made.value, [replace(made.heads[0], host=host)], 0.2)

    return act


def smoothed(kernels: Kernels) -> object:
    """Smoothing without scores to smooth with."""
    made = layer()
    return kernels.bind(made.key, made.value, made.heads, 0.2, smoothing=0.5)


def counted(kernels: Kernels) -> object:
    """A counter for fewer heads than there are."""
    made = layer()
    none = torch.zeros(0, dtype=torch.int64)
    return kernels.bind(made.key, made.value, made.heads, 0.2, counted=(none, none, none))


def integers(*numbers: int, dtype: torch.dtype = torch.int32) -> Any:
    """Slots."""
    return torch.tensor(numbers, dtype=dtype)


QUANTISED: dict[str, Callable[[Kernels], object]] = {
    "a row that ends past the bytes": held(starts=[0, 2 * ROW + 1]),
    "a row that begins before them": held(starts=[-1, 2 * ROW]),
    "more rows than bytes": held(counts=[2, 3]),
    "a negative count": held(counts=[2, -1]),
    "fewer counts than segments in fewer bits": held(counts=[2]),
    "more of them than starts": held(segments=[0, 1, 2]),
    "tokens of 2 bits": held(bits=[2, 8]),
    "a segment in fewer bits that does not exist": held(segments=[0, 2]),
    "a segment in fewer bits before the first": held(segments=[-1, 1]),
    "a segment told twice": held(segments=[1, 1]),
    "means of fewer segments": held(mean=torch.ones(1, 2, DIM)),
    "means that are too narrow": held(mean=torch.ones(2, 2, DIM - 8)),
    "means of another type": held(mean=torch.ones(2, 2, DIM, dtype=torch.float64)),
    "rows of another type": held(rows=torch.ones(4 * ROW, dtype=torch.int8)),
    "rows with gaps": held(rows=torch.ones(8 * ROW, dtype=torch.uint8)[::2]),
}
ITEMS_IN_FEWER_BITS: dict[str, Callable[[Kernels], object]] = {
    "rows of too few hot slots": hot(rows=torch.ones(HOT - 1, ROW, dtype=torch.uint8)),
    "hot rows that are too short": hot(rows=torch.ones(HOT, ROW - 1, dtype=torch.uint8)),
    "hot rows of another type": hot(rows=torch.ones(HOT, ROW, dtype=torch.int8)),
    "hot rows with gaps": hot(rows=torch.ones(HOT, 2 * ROW, dtype=torch.uint8)[:, ::2]),
    "hot rows of another width": hot(format=RowFormat(8, DIM - 8)),
    "hot rows of 2 bits": hot(format=RowFormat(2, DIM)),
    "hot rows of other bits than the host's": hot(
        format=RowFormat(4, DIM), rows=torch.ones(HOT, RowFormat(4, DIM).row_bytes).byte()
    ),
    "a mean that is too narrow": hot(mean=torch.ones(2, DIM - 8)),
    "host rows that are too short": hosted(torch.ones(ITEMS, 1, ROW - 1, dtype=torch.uint8)),
    "host rows of too few items": hosted(torch.ones(ITEMS - 1, 1, ROW, dtype=torch.uint8)),
    "host rows of longer chunks": hosted(torch.ones(ITEMS, 2, ROW, dtype=torch.uint8)),
}
BAD: dict[str, Callable[[Kernels], object]] = {
    **QUANTISED,
    **ITEMS_IN_FEWER_BITS,
    "a segment that ends past the storage": attend([0, 12], [5, 9], 2),
    "a segment that begins before it": attend([-4, 0], [4, 4], 2),
    "a negative length": attend([4], [-4], 1),
    "fewer segments than queries": attend([0], [4], 2),
    "queries wider than keys": attend([0], [4], 1, dim=64),
    "values with fewer rows than keys": storage(2),
    "hot slots past the storage": changed(hot_start=10**6),
    "hot slots before the storage": changed(hot_start=-1),
    "more items than the host has": changed(items=ITEMS + 1),
    "more hot slots than items": changed(items=HOT - 1),
    "no hot slot": changed(slots=integers()),
    "a slot past the items": changed(slots=integers(*range(HOT - 1), ITEMS)),
    "a negative slot": changed(slots=integers(-1, *range(1, HOT))),
    "slots of int64": changed(slots=integers(*range(HOT), dtype=torch.int64)),
    "slots with gaps": changed(slots=integers(*range(2 * HOT))[::2]),
    "a negative segment": changed(segment=-1),
    "chunks longer than the host's": changed(chunk=2),
    "no item that may become hot": changed(fresh=0),
    "a negative rerank": changed(rerank=-1),
    "scores of too few slots": changed(hot_score=torch.ones(HOT - 1)),
    "scores with gaps": changed(hot_score=torch.ones(2 * HOT)[::2]),
    "scores of another type": changed(hot_score=torch.ones(HOT, dtype=torch.float64)),
    "digests of too few items": changed(index=MeanIndex(torch.ones(ITEMS - 1, DIM))),
    "digests that are too narrow": changed(index=MeanIndex(torch.ones(ITEMS, DIM - 8))),
    "bounds that are too narrow": changed(
        index=MinMaxIndex(torch.ones(ITEMS, DIM), torch.ones(ITEMS, DIM - 8))
    ),
    "a narrow projection": tables(query_projection=torch.ones(DIM - 8, 9)),
    "a projection to fewer channels": tables(query_projection=torch.ones(DIM, 8)),
    "fewer subspaces than codes": tables(subspaces=((0, 3),)),
    "subspaces past the channels": tables(subspaces=((0, 3), (3, 5), (5, 7), (7, 10))),
    "subspaces before the channels": tables(subspaces=((-1, 3), (3, 5), (5, 7), (7, 9))),
    "smoothing without scores": smoothed,
    "too few counters": counted,
    "a query of too few segments": bound(lambda found: found.step(torch.ones(0, 2, DIM))),
    "a query that is too wide": bound(lambda found: found.step(torch.ones(1, 2, 2 * DIM))),
    "scores of too few heads": bound(lambda found: found.load([])),
    "scores of too few items": bound(lambda found: found.load([torch.ones(ITEMS - 1)])),
    "a codebook of fewer channels": encode(8, [(0, 4), (4, 8)]),
    "a subspace past the channels": encode(6, [(0, 3), (3, 7)]),
    "a subspace that ends before it begins": encode(6, [(0, 3), (5, 3)]),
    "no subspace": encode(6, []),
}


def main() -> None:
    """What each met, with the native kernels, after one sound call."""
    from hkvprof.runtime import kernels

    native = kernels.for_device(torch.device("cpu"), DTYPE)
    sound = torch.ones(20, DIM)
    native.attend(sound, sound, Extents.of([0], [20]), torch.ones(1, 2, DIM), 0.2)
    met = {}
    for name, act in BAD.items():
        try:
            act(native)
            met[name] = "accepted"
        except Exception as error:
            met[name] = type(error).__name__
    page = {"asserts": __debug__, "status": kernels.status(), "met": met}
    sys.stdout.write(json.dumps(page) + "\n")


if __name__ == "__main__":
    main()
