"""`python -m hkvprof.bench.account`: what a decoding step costs on a GPU, counted without one.

One layer of a published shape is compressed on the CPU, and takes a step through the runtime's own
path with Triton's kernels bound and their launches taken down (bench.watch). That gives launches
and allocations. Kernels are compiled for the cards' compute capabilities (bench.compiled). Bytes
follow from the layer's layout (bench.traffic). It predicts; `make bench-gpu` measures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hkvprof.bench.compiled import MachineCode, compile_launch, inspect_code
from hkvprof.bench.contestant import BenchModel, FilledContestant
from hkvprof.bench.filled import KEEP, Keys, filled_profiles
from hkvprof.bench.methods import COMPRESSING, Kind, Method
from hkvprof.bench.traffic import BITS, BLOCKS, DEVICE, LISTING, HeadStep
from hkvprof.bench.watch import TritonLaunch, Watched, watched
from hkvprof.errors import HkvError, UsageError
from hkvprof.heads import EXACT_BITS, HeadType, Strategy
from hkvprof.lazy import no_triton
from hkvprof.models.attention import AttentionCall
from hkvprof.models.shapes import SHAPES, Shape, make_shape
from hkvprof.profile.costs import quantised_bytes
from hkvprof.runtime import ragged

HITS = 0.9
"""Share of the hot items that a step keeps, where nobody says otherwise: an assumption."""
SCHEDULERS = 4
"""Warp instructions that a multiprocessor can issue in a cycle."""


@dataclass(frozen=True)
class Card:
    """Figures of a data sheet: bytes per second of memory, of the host link as copies reach it,
    cycles per second (boost), multiprocessors; `capability` its kernels are compiled for."""

    name: str
    memory: float
    link: float
    clock: float
    multiprocessors: int
    capability: int


CARDS = (
    Card("H200, PCIe 5", 4.8e12, 55e9, 1.98e9, 132, 90),
    Card("L40S, PCIe 4", 0.864e12, 26e9, 2.52e9, 142, 89),
    Card("A10, PCIe 4", 0.6e12, 26e9, 1.695e9, 72, 80),
)


@dataclass(frozen=True)
class Plan:
    """What is asked: a shape, prompt tokens, batch rows, a share of dense, types, hits, and bits of
    what is resident."""

    shape: str = "qwen2.5-vl-7b"
    tokens: int = 32768
    batch: int = 1
    budget: str = "0.10"
    kind: Kind = Kind.PROFILE
    hits: float = HITS
    bits: int = EXACT_BITS

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if self.shape not in SHAPES:
            raise UsageError(f"unknown shape {self.shape!r}: expected {' or '.join(SHAPES)}")
        if self.bits not in (EXACT_BITS, 8, 4):
            raise UsageError(f"{self.bits} bits: expected {EXACT_BITS}, 8 or 4")
        if self.tokens < 1024 or self.batch < 1 or not 0 <= self.hits <= 1:
            raise UsageError(
                f"{self.tokens} tokens, batch {self.batch}, hits {self.hits}: expected at least "
                "1024 tokens, 1 row, and hits from 0 to 1"
            )


@dataclass(frozen=True)
class Account:
    """A layer's step. `resident` are bytes that attention reads and `dense` what it would read of a
    dense cache, for one row; `heads` the steps of one row's dynamic heads."""

    plan: Plan
    watched: Watched
    resident: int
    dense: int
    heads: tuple[HeadStep, ...]

    def device_bytes(self, kernel: str) -> int:
        """Of all launches of a kernel in the layer, all rows."""
        if kernel == "_split_kernel":
            return self.resident * self.plan.batch
        return self.plan.batch * sum(DEVICE.get(kernel, lambda _: 0)(one) for one in self.heads)

    @property
    def host_bytes(self) -> int:
        """Over the host link in the layer, all rows."""
        return self.plan.batch * sum(one.host_bytes for one in self.heads)


def take_account(plan: Plan) -> Account:
    """Compress one layer of one row, and watch a step."""
    shape = SHAPES[plan.shape]
    subject = BenchModel.of(
        make_shape(replace(shape, mlp=64, layers=1), 1, torch.bfloat16, torch.device("cpu"), 64)
    )
    keys = Keys(subject.view, torch.bfloat16, torch.device("cpu"))
    profile = filled_profiles(subject.model, subject.view, keys)[plan.kind]
    menu = tuple(_in_bits(strategy, plan.bits) for strategy in profile.strategies)
    profile = replace(profile, strategies=menu)
    forced = [torch.zeros(1, 1, dtype=torch.long)]
    method = Method(plan.kind, plan.budget, profile)
    one = FilledContestant(subject, method, plan.tokens, forced, keys)
    with torch.no_grad():
        key, value = keys.layer(0, 1, plan.tokens)
        one.fill(0, keys.queries(0, 1, KEEP.window), key, value, {})
        layer = one.cache.covered[0]
        with _triton_on_cpu():
            given = [*keys.layer(0, 1, 1), keys.queries(0, 1, 1)]
            _step(layer, *given)  # the storage grows, and kernels are bound
            with watched() as seen:
                _step(layer, *given)
    own = layer.ragged
    heads = tuple(_head_step(head, shape, plan.hits) for head in own.dynamic.values())
    resident = sum(own.storage.lengths) * own.storage.token_bytes
    resident += 0 if own.quantised is None else own.quantised.rows.nbytes
    return Account(plan, seen, resident, plan.tokens * 4 * shape.kv_heads * shape.head_dim, heads)


@torch.no_grad()
def _step(layer: Any, key: Tensor, value: Tensor, query: Tensor) -> None:
    given, _ = layer.update(key, value)
    module, scaling = torch.nn.Identity(), key.shape[-1] ** -0.5
    layer.attend(AttentionCall(module, query, given, value, None, scaling, lambda: (key, None)))


@contextmanager
def _triton_on_cpu() -> Iterator[None]:
    """Triton's kernels for CPU tensors, launching nothing."""
    from hkvprof.runtime.kernels.triton_backend import TritonKernels

    kernels = TritonKernels(torch.bfloat16)
    with mock.patch.object(ragged, "for_device", return_value=kernels), watched():
        yield
    assert not kernels.notes, f"plain torch took over: {list(kernels.notes)}"


def _in_bits(strategy: Strategy, bits: int) -> Strategy:
    """With residents in so many bits; dynamic heads have 8 at least."""
    least = 8 if strategy.head_type is HeadType.DYNAMIC else 4
    return replace(strategy, resident_bits=max(bits, least))


def _head_step(head: Any, shape: Shape, hits: float) -> HeadStep:
    seen, width = head.described(0, 0), shape.head_dim
    return HeadStep(
        items=seen.items,
        hot=seen.hot,
        picked=seen.picked,
        missed=min(round((1 - hits) * seen.hot), (seen.picked or seen.items) - seen.hot),
        group=shape.query_heads // shape.kv_heads,
        dim=width,
        itemsize=2,
        codes=head.index.codes.shape[1],
        channels=head.index.tables.codebook.shape[1],
        hot_bytes=4 * width if head.bits == EXACT_BITS else quantised_bytes(head.bits, width),
    )


# -- what it comes to on a card -----------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Milliseconds per token of all layers: `memory` at full bandwidth, weights included, `link`
    over the host's, `alone` of kernels that select, at perfect issue."""

    dense: float
    memory: float
    link: float
    alone: float

    @property
    def exact(self) -> float:
        """One after the other."""
        return self.memory + self.link + self.alone

    @property
    def hidden(self) -> float:
        """With prefetch, where the link and what is alone run beside the rest."""
        return max(self.memory, self.link + self.alone)


def bound(account: Account, card: Card, code: dict[str, MachineCode]) -> Bound:
    """What a card cannot be faster than, as far as these figures go."""
    plan, shape = account.plan, SHAPES[account.plan.shape]
    weights = 2 * (shape.layers * shape.layer_parameters + shape.vocabulary * shape.hidden)
    names = {launch.name for launch in account.watched.triton}
    own = sum(account.device_bytes(name) for name in names)
    dense = account.dense * plan.batch
    alone = sum(
        _alone(account, launch, code[launch.name], card)
        for launch in account.watched.triton
        if launch.name in LISTING and launch.name in code
    )
    return Bound(
        dense=1e3 * (weights + shape.layers * dense) / card.memory,
        memory=1e3 * (weights + shape.layers * own) / card.memory,
        link=1e3 * shape.layers * account.host_bytes / card.link,
        alone=1e3 * shape.layers * alone,
    )


def _alone(account: Account, launch: TritonLaunch, code: MachineCode, card: Card) -> float:
    """Seconds of a launch whose programs issue much, one program per multiprocessor."""
    name, heads = launch.name, account.heads
    issued = max(map(LISTING[name], heads)) * code.instructions + BITS.get(name, 0) * code.loop
    programs = account.plan.batch * sum(BLOCKS.get(name, lambda _: 1)(one) for one in heads)
    waves = -(-programs // card.multiprocessors)
    return waves * issued * code.warps / SCHEDULERS / card.clock


def code_of(account: Account, capability: int) -> dict[str, MachineCode]:
    """Machine code by kernel; the last launch's where a kernel is launched in two variants."""
    return {
        one.name: inspect_code(compile_launch(one, capability)) for one in account.watched.triton
    }


# -- as text ------------------------------------------------------------------------------------


def render(account: Account, codes: dict[int, dict[str, MachineCode]]) -> str:
    """Tables of launches, machine code and bounds, as Markdown."""
    plan = account.plan
    title = (
        f"{plan.shape}, {plan.tokens:,} tokens, batch {plan.batch}, {plan.budget}, "
        f"{plan.kind}, {plan.hits:.0%} of hot items stay, {plan.bits} bits"
    )
    return "\n".join([title, "", *_launch_lines(account), "", *_code_lines(codes), "",
                      *_bound_lines(account, codes), ""])  # fmt: skip


def _launch_lines(account: Account) -> list[str]:
    seen = account.watched
    lines = ["| launch | times | MB asked of the device |", "|---|---|---|"]
    for name, times in Counter(one.name for one in seen.triton).items():
        lines.append(f"| {name} | {times} | {account.device_bytes(name) / 1e6:.2f} |")
    lines += [f"| torch: {name} | {n} | |" for name, n in Counter(seen.operators).items()]
    lines += ["", f"launches {seen.launches}, allocations {len(seen.allocated)}, host link "
              f"{account.host_bytes / 1e6:.3f} MB per layer and step"]  # fmt: skip
    return lines


def _code_lines(codes: dict[int, dict[str, MachineCode]]) -> list[str]:
    if not codes:
        return ["not compiled"]
    lines = [
        "| kernel | sm | registers | stack | shared | instructions |",
        "|---|---|---|---|---|---|",
    ]
    for capability, kernels in codes.items():
        lines += [
            f"| {name} | {capability} | {c.registers} | {c.stack} | {c.shared} | {c.instructions} |"
            for name, c in kernels.items()
        ]
    return lines


def _bound_lines(account: Account, codes: dict[int, dict[str, MachineCode]]) -> list[str]:
    lines = [
        "| ms per token | dense | memory | host link | serial | sum | with prefetch |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        b = bound(account, card, codes.get(card.capability, {}))
        figures = (b.dense, b.memory, b.link, b.alone, b.exact, b.hidden)
        lines.append(f"| {card.name} | {' | '.join(f'{one:.2f}' for one in figures)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m hkvprof.bench.account", description=__doc__)
    add, usual = parser.add_argument, Plan()
    add("--shape", default=usual.shape)
    add("--context", type=int, default=usual.tokens, help="prompt tokens; default %(default)s")
    add("--batch", type=int, default=usual.batch, help="rows; default %(default)s")
    add("--budget", default=usual.budget, help="share of dense; default %(default)s")
    add("--types", default="profile", choices=list(COMPRESSING), help="default: every other head")
    add("--hits", type=float, default=HITS, help="hot items that a step keeps; default %(default)s")
    add("--bits", type=int, default=EXACT_BITS, help="of what is resident; default %(default)s")
    add("--compile", default="80,89,90", help="compute capabilities; empty: none")
    given = parser.parse_args(arguments)
    try:
        if reason := no_triton():
            raise UsageError(f"this account is of the Triton kernels, and {reason}")
        plan = Plan(given.shape, given.context, given.batch, given.budget,
                    COMPRESSING[given.types], given.hits, given.bits)  # fmt: skip
        account = take_account(plan)
        wanted = [int(part) for part in given.compile.split(",") if part]
        codes = {capability: code_of(account, capability) for capability in wanted}
    except HkvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(render(account, codes))
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
