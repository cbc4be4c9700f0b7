"""One context and batch: which methods fit, side by side, and what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import median, quantiles
from typing import Any

import torch

from hkvprof.bench.gpu.entrants import WHOLE, Entrant, Hosts, Method, methods
from hkvprof.bench.gpu.links import Links
from hkvprof.bench.gpu.machine import Lap, Machine, host_free
from hkvprof.bench.gpu.material import Keys, drifting_tokens
from hkvprof.bench.gpu.records import Cell, Regime, Row
from hkvprof.errors import HkvError
from hkvprof.models.adapter import ModelView
from hkvprof.profile.record import Profile

WARM = 3
"""Steps before the first timed one; kernels are compiled and graphs recorded in them."""
LAYERS_AT_WORK = 4
"""Dense layers' worth of memory that filling may take beside the caches."""

Say = Callable[[str], None]


@dataclass
class Bench:
    """What all cells share. `block` steps are timed per method and round, after a first one."""

    model: Any
    view: ModelView
    machine: Machine
    keys: Keys
    profiles: Mapping[str, Profile]
    regime: Regime
    links: Links
    say: Say
    free: Callable[[], int] = field(default=lambda: 0)
    host_free: Callable[[], int] = host_free

    def __post_init__(self) -> None:
        self.free = self.machine.free

    @property
    def block(self) -> int:
        """Timed steps of a round."""
        return self.regime.steps // self.regime.rounds

    @property
    def room(self) -> int:
        """All steps of a method."""
        return steps_in_all(self.regime.steps, self.regime.rounds)


def steps_in_all(steps: int, rounds: int) -> int:
    """Steps that a method takes for `steps` timed ones."""
    return WARM + rounds * (steps // rounds + 1)


def run_cell(bench: Bench, context: int, batch: int) -> Cell:
    """All methods; those that do not fit say why."""
    began = time.perf_counter()
    dense = bench.regime.token_bytes * context * batch
    segments = bench.view.grid.total * batch
    groups, reasons = gather_groups(
        methods(bench.regime.budgets), dense, segments, bench.regime.layers, bench.free(),
        bench.host_free(),
    )  # fmt: skip
    rows = {m.name: _empty(m, reason) for m, reason in reasons.items()}
    for number, group in enumerate(groups):
        names = f"{len(group)} methods" if len(group) > 1 else group[0].name
        bench.say(f"{context:,} tokens x {batch}: {names} (set {number + 1} of {len(groups)})")
        try:
            found = _run_group(bench, group, context, batch)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory, though it seemed to fit: {str(error).splitlines()[0]}"
            found = [_empty(method, reason) for method in group]
        bench.free()  # gives back what this set held
        rows |= {row.method: replace(row, group=number) for row in found}
    ordered = [rows[method.name] for method in methods(bench.regime.budgets)]
    return Cell(
        context, batch, compare(ordered, dense, bench.regime, bench.links),
        time.perf_counter() - began,
    )  # fmt: skip


def gather_groups(
    wanted: Sequence[Method], dense: int, segments: int, layers: int, free: int, host: int
) -> tuple[list[list[Method]], dict[Method, str]]:
    """Sets of methods whose caches fit together, in order; and why others fit nowhere.

    `dense` is bytes of a dense cache of so many segments (a KV head of a layer and row) in so many
    layers, `free` and `host` what may be taken on either side.
    """
    room = free - LAYERS_AT_WORK * dense // layers
    groups: list[list[Method]] = []
    reasons: dict[Method, str] = {}
    left = 0
    for method in wanted:
        device, pinned = needs(method, dense, segments)
        if device > room:
            reasons[method] = (
                f"needs {device / 1e9:.1f} GB on the device, {max(room, 0) / 1e9:.1f} GB can be had"
            )
        elif pinned > host:
            reasons[method] = (
                f"needs {pinned / 1e9:.1f} GB of pinned host memory, {host / 1e9:.1f} GB can be had"
            )
        else:
            if not groups or device > left:
                groups.append([])
                left = room
            groups[-1].append(method)
            left -= device
    return groups, reasons


def needs(method: Method, dense: int, segments: int) -> tuple[int, int]:
    """Bytes on the device, and pinned ones on the host (which a set shares).

    torch rounds blocks of pinned memory, one per segment, up to powers of two.
    """
    if not method.is_ours or method.types == "whole":
        return dense, 0
    share = float(method.budget)
    part = {"static": 0.0, "hybrid": 0.5, "dynamic": 1.0}[method.types]
    device = share * dense * 1.02 + (part * dense if method.control else 0)
    # A set's hybrid heads find their items among those of its dynamic ones, or the other way round.
    block = 1 << max(0, dense // segments - 1).bit_length()
    return int(device), segments * block if part else 0


def _run_group(bench: Bench, group: Sequence[Method], context: int, batch: int) -> list[Row]:
    entrants, refused = _fill(bench, group, context, batch)
    rows = [_sizes(entrant, bench.machine) for entrant in entrants]
    laps = _take_turns(bench, entrants, batch)
    return refused + [
        _times(bench, entrant, row, laps[number], batch)
        for number, (entrant, row) in enumerate(zip(entrants, rows, strict=True))
    ]


@torch.no_grad()
def _fill(
    bench: Bench, group: Sequence[Method], context: int, batch: int
) -> tuple[list[Entrant], list[Row]]:
    """Entrants whose caches hold the prompt, layer by layer; and rows of those that cannot."""
    machine, hosts = bench.machine, Hosts()
    entrants: dict[Method, Entrant] = {}
    reasons: dict[Method, str] = {}
    window = next(iter(bench.profiles.values())).keep.window
    for method in group:
        try:
            entrants[method] = Entrant(
                bench.model, bench.view, method, bench.profiles, context, batch, bench.room
            )
        except HkvError as error:
            reasons[method] = str(error)
    for number in range(bench.regime.layers):
        key, value = bench.keys.layer(number, batch, context)
        query = bench.keys.queries(number, batch, window)
        for method, entrant in list(entrants.items()):
            before = machine.allocated()
            try:
                entrant.fill(number, query, key, value, hosts)
            except HkvError as error:
                reasons[method] = str(error)
                del entrants[method]
            entrant.held += machine.allocated() - before
    return list(entrants.values()), [_empty(method, why) for method, why in reasons.items()]


def _take_turns(bench: Bench, entrants: Sequence[Entrant], batch: int) -> list[list[Lap]]:
    """Timed steps of every entrant, round by round; all of them see the same tokens."""
    machine = bench.machine
    tokens = list(islice(drifting_tokens(bench.model, batch), bench.room))
    laps: list[list[Lap]] = [[] for _ in entrants]
    for entrant in entrants:
        entrant.prepare(machine)
        with entrant.hooked():
            for ids in tokens[:WARM]:
                entrant.step(ids)
        machine.wait()
    for number in range(bench.regime.rounds):
        begin = WARM + number * (bench.block + 1)
        for entrant, own in zip(entrants, laps, strict=True):
            with entrant.hooked():
                entrant.step(tokens[begin])
                for ids in tokens[begin + 1 : begin + 1 + bench.block]:
                    own.append(machine.lap(partial(entrant.step, ids)))
            machine.wait()
    return laps


def _sizes(entrant: Entrant, machine: Machine) -> Row:
    row = _empty(entrant.method, "")
    held = entrant.held if machine.counts_bytes else entrant.stored_bytes
    if not entrant.method.is_ours:
        return replace(row, resident_bytes=entrant.stored_bytes, held_bytes=held)
    receipt = entrant.cache.receipt()
    tables = receipt.shared_bytes
    if machine.counts_bytes:
        held -= tables  # a property of the profile, loaded once per model
    return replace(
        row,
        resident_bytes=receipt.resident_bytes,
        held_bytes=None if entrant.method.control else held,
        host_bytes=receipt.host_bytes,
        table_bytes=tables,
    )


def _times(bench: Bench, entrant: Entrant, row: Row, laps: Sequence[Lap], batch: int) -> Row:
    step = [lap.milliseconds() for lap in laps]
    p90 = quantiles(step, n=10)[-1] if len(step) > 1 else step[0]
    row = replace(
        row,
        step_ms=median(step),
        step_ms_p90=p90,
        read_bytes=entrant.read_bytes,
        attend_ms=_attention(bench, entrant, batch),
        corrected_share=entrant.corrected_share,
    )
    if not entrant.method.is_ours:
        return row
    receipt = entrant.cache.receipt()
    moved = receipt.bytes_moved / receipt.steps if receipt.hit_rate is not None else None
    return replace(row, hit_rate=receipt.hit_rate, moved_bytes=moved)


@torch.no_grad()
def _attention(bench: Bench, entrant: Entrant, batch: int) -> float:
    """Milliseconds of all layers' attention, recorded so that launching takes no time."""
    machine = bench.machine
    queries = [bench.keys.queries(n, batch, 1) for n in range(bench.regime.layers)]
    entrant.attend(queries)
    replay = machine.recorder(lambda steps: None).record(partial(entrant.attend, queries))
    replay()
    return median(machine.lap(replay).milliseconds() for _ in range(bench.regime.rounds * 3))


def compare(rows: Sequence[Row], dense: int, regime: Regime, links: Links) -> tuple[Row, ...]:
    """Ratios between rows of a cell. `dense` is bytes of a dense cache; others: records.Row."""
    by_name = {row.method: row for row in rows}
    stock = by_name[Method("DynamicCache", mode="eager").name].step_ms
    plain = [row.step_ms for row in rows if row.types in ("DynamicCache", "preallocated")]
    best = min((ms for ms in plain if ms is not None), default=None)
    return tuple(
        row if row.reason else _ratios(row, by_name, dense, regime, links, stock, best)
        for row in rows
    )


def _ratios(
    row: Row,
    by_name: Mapping[str, Row],
    dense: int,
    regime: Regime,
    links: Links,
    stock: float | None,
    best: float | None,
) -> Row:
    assert row.step_ms is not None
    assert row.attend_ms is not None
    assert row.read_bytes is not None
    assert row.resident_bytes is not None
    weights = regime.weight_bytes
    ceiling = (weights + dense) / (weights + row.resident_bytes)
    over_best = None if best is None or row.control else best / row.step_ms
    control = by_name.get(Method(row.types, row.budget, row.mode, control=True).name)
    exposed = None
    if control is not None and control.step_ms is not None and not row.control:
        exposed = 1 - control.step_ms / row.step_ms
    link_ms = None if row.moved_bytes is None else row.moved_bytes / links.from_host / 1e6
    return replace(
        row,
        held_share=None if row.held_bytes is None else row.held_bytes / dense,
        bandwidth_share=row.read_bytes / row.attend_ms / 1e6 / links.copy,
        bound_share=(weights + row.read_bytes) / links.copy / 1e6 / row.step_ms,
        over_dynamic_cache=None if stock is None or row.control else stock / row.step_ms,
        over_best_dense=over_best,
        ceiling=ceiling,
        ceiling_share=None if over_best is None else over_best / ceiling,
        link_ms=link_ms,
        exposed_share=exposed,
    )


def _empty(method: Method, reason: str) -> Row:
    budget = WHOLE if method.types == "whole" else method.budget
    return Row(method.name, method.types, budget, method.mode, reason, method.control)
