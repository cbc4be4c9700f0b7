"""The benchmark: every context, every method, the same tokens, steps interleaved in rounds.

`bench_prompts` has a loaded model read real prompts. `bench_filled` fills the caches of a published
shape by hand, because at 131,072 tokens and 32 rows prefill would take longer than the benchmark;
it is saved after each context, and goes on where it ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.compare import compare
from hkvprof.bench.contestant import (
    Contestant,
    FilledContestant,
    HostItems,
    PromptContestant,
    Subject,
)
from hkvprof.bench.filled import (
    DRIFT,
    KEEP,
    Keys,
    drifting_tokens,
    filled_profiles,
    weight_bytes,
)
from hkvprof.bench.machine import device_name, host_free, measure_links, no_collector
from hkvprof.bench.methods import (
    COMPRESSING,
    Kind,
    Method,
    check_budgets,
    filled_methods,
    methods,
    reason_not,
)
from hkvprof.bench.prompts import Prompt, PromptMaker, random_prompt
from hkvprof.bench.records import BenchResult, Context, Links, PrefillTime, Regime, Row, resume
from hkvprof.errors import BudgetError, HkvError, UsageError
from hkvprof.lazy import no_triton
from hkvprof.models.adapter import view_model
from hkvprof.models.outline import context_limit
from hkvprof.models.shapes import SHAPES, build_shape
from hkvprof.profile.budgets import Budget
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply, kernels
from hkvprof.runtime.graph import AHEAD

MIN_STEPS = 32
LEAST_TOKENS = 64
WARM_STEPS = 3
"""Steps before the first timed one; kernels are compiled and graphs recorded in them."""
LAYERS_AT_WORK = 4
"""Dense layers' worth of memory that filling may take beside the caches."""
PROMPT_SHARE, FILLED_SHARE = 0.6, 0.9
"""Of the free memory, what caches may take; where prompts are read, activations need the rest."""
CAUTION = 1.5
"""A further context is begun if this many times the longest one so far is left."""
_PREFILLS = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class PromptSetup:
    """What is asked of a loaded model: contexts in tokens, budgets, `rounds` of `new_tokens` in
    all, batch.

    `strict`: a budget that the profile itself cannot meet at a context is an error, not a row
    that says so.
    """

    contexts: tuple[int, ...]
    budgets: tuple[str, ...]
    new_tokens: int = 64
    rounds: int = 8
    batch: int = 1
    preallocated: bool = True
    strict: bool = True

    def __post_init__(self) -> None:
        """Raises UsageError."""
        if not self.contexts or min(self.contexts) < 1:
            raise UsageError("no context: expected prompt lengths in tokens such as 2048,8192")
        if min(self.batch, self.new_tokens, self.rounds) < 1:
            raise UsageError("batch, new tokens and rounds must be at least 1 each")
        timed = (self.block - 1) * self.rounds
        if timed < MIN_STEPS:
            raise UsageError(
                f"{self.new_tokens} new tokens in {self.rounds} rounds leave {max(timed, 0)} timed "
                f"steps (the first of a round warms up): expected at least {MIN_STEPS}, for "
                f"example --new-tokens {MIN_STEPS + 4} --rounds 4"
            )

    @property
    def block(self) -> int:
        """Steps of one method in one round, the first one included."""
        return self.new_tokens // self.rounds


@dataclass(frozen=True)
class FilledSetup:
    """What is asked of a shape. `steps` are the timed ones of a method, `minutes` is when no
    further context is begun; `layers` None: the shape's."""

    shape: str = "qwen2.5-vl-7b"
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 32)
    budgets: tuple[str, ...] = ("0.20", "0.10", "0.05")
    layers: int | None = None
    dtype: str = "auto"
    device: str = "cuda"
    steps: int = 32
    rounds: int = 4
    prefill_tokens: int = 32768
    link_megabytes: float = 1024
    minutes: float = 9.0

    def __post_init__(self) -> None:
        """Raises UsageError or BudgetError."""
        if self.shape not in SHAPES:
            raise UsageError(f"unknown shape {self.shape!r}: expected {' or '.join(SHAPES)}")
        check_budgets(self.budgets)
        for text in self.budgets:
            if Budget.parse(text).share is None:
                raise UsageError(
                    f"budget {text}: expected shares of the dense cache such as 0.10, because they "
                    "are compared across contexts and batches"
                )
        if not self.contexts or min(self.contexts) < LEAST_TOKENS:
            raise UsageError(f"expected contexts of at least {LEAST_TOKENS} tokens such as 8192")
        if not self.batches or min(self.batches) < 1:
            raise UsageError("expected batches of at least 1 row such as 1,8,32")
        if self.prefill_tokens < LEAST_TOKENS or self.minutes <= 0 or self.link_megabytes <= 0:
            raise UsageError(
                f"expected a prefill of at least {LEAST_TOKENS} tokens, and minutes above 0"
            )
        self._check_steps()

    def _check_steps(self) -> None:
        if self.rounds < 1 or self.steps // self.rounds < 2 or self.steps % self.rounds:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds: expected at least 2 in each, the "
                "same number in all"
            )
        if self.all_steps > AHEAD - 4:
            raise UsageError(
                f"{self.steps} steps in {self.rounds} rounds reach into the next compression: "
                "expected fewer, such as --steps 32 --rounds 4"
            )

    @property
    def block(self) -> int:
        """Steps of one method in one round, the first one, which is not timed, included."""
        return self.steps // self.rounds + 1

    @property
    def all_steps(self) -> int:
        """Steps that a method takes."""
        return WARM_STEPS + self.rounds * self.block

    @property
    def wanted(self) -> tuple[tuple[int, int], ...]:
        """Contexts and batches, smallest first."""
        pairs = {(context, batch) for context in self.contexts for batch in self.batches}
        return tuple(sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair)))


def describe(model: Any, name: str, profile: str, setup: PromptSetup) -> Regime:
    """The regime of a benchmark of `model` in this process; `name` and `profile` as asked for."""
    return Regime(
        model=name, profile=profile, batch=setup.batch, steps=setup.new_tokens,
        rounds=setup.rounds, **_here(model),
    )  # fmt: skip


def describe_filled(model: Any, setup: FilledSetup) -> Regime:
    """The regime of a model made for this setup."""
    return Regime(
        model=setup.shape, profile="uniform", batch=None, steps=setup.steps, rounds=setup.rounds,
        budgets=setup.budgets, prefill_tokens=setup.prefill_tokens, drift=DRIFT,
        weight_bytes=weight_bytes(model),
        token_bytes=view_model(model).grid.token_bytes(model.dtype.itemsize),
        **_here(model),
    )  # fmt: skip


def _here(model: Any) -> dict[str, Any]:
    """What the model, the machine and the process make of the regime."""
    return {
        "layers": view_model(model).grid.layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "kernels": kernels.status(),
        "versions": {
            "hkvprof": hkvprof.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


# -- which caches are alive together, and their turns -------------------------------------------


@dataclass(frozen=True)
class Room:
    """What the caches of a context of `tokens` tokens may take, in bytes.

    `dense` are those of a dense cache of so many `segments` (a KV head of a layer and row),
    `working` what is needed beside the caches. `host` is for pinned items; None where they lie in
    the device's own memory.
    """

    tokens: int
    dense: int
    segments: int
    working: int
    device: int
    host: int | None

    @property
    def for_caches(self) -> int:
        """On the device."""
        return self.device - self.working


def gather_groups(
    wanted: Sequence[Method], room: Room
) -> tuple[list[list[Method]], dict[Method, str]]:
    """Sets of methods whose caches fit together, in order; and why others fit nowhere."""
    groups: list[list[Method]] = []
    reasons: dict[Method, str] = {}
    left = 0
    for method in wanted:
        device, pinned = needs(method, room)
        if device > room.for_caches:
            reasons[method] = _too_large(device, "on the device", room.for_caches)
        elif room.host is not None and pinned > room.host:
            reasons[method] = _too_large(pinned, "of pinned host memory", room.host)
        else:
            if not groups or device > left:
                groups.append([])
                left = room.for_caches
            groups[-1].append(method)
            left -= device
    return groups, reasons


def _too_large(needed: int, where: str, had: int) -> str:
    return f"needs {needed / 1e9:.1f} GB {where}, {max(0, had) / 1e9:.1f} GB can be had"


def needs(method: Method, room: Room) -> tuple[int, int]:
    """Bytes on the device, and pinned ones on the host (which a set shares).

    torch rounds blocks of pinned memory, one per segment, up to powers of two.
    """
    if not method.kind.compresses or method.kind is Kind.WHOLE:
        return room.dense, 0
    share = Budget.parse(method.budget).resolve(room.tokens, room.dense)
    part = {Kind.STATIC: 0.0, Kind.PROFILE: 0.5, Kind.DYNAMIC: 1.0}[method.kind]
    device = share * room.dense * 1.02 + (part * room.dense if method.control else 0)
    # A set's mixed heads find their items among those of its dynamic ones, or the other way round.
    block = 1 << max(0, room.dense // room.segments - 1).bit_length()
    pinned = room.segments * block if part else 0
    return (int(device) + pinned, 0) if room.host is None else (int(device), pinned)


def take_turns(contestants: Sequence[Contestant], rounds: int, steps: int) -> None:
    """So many steps of each per round; nobody always follows the same other."""
    for number in range(rounds):
        first = number % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            contestant.decode(steps)


# -- a loaded model reads prompts ---------------------------------------------------------------


def bench_prompts(
    model: Any,
    profiles: Mapping[Kind, Profile],
    make_prompt: PromptMaker,
    setup: PromptSetup,
    say: Say = lambda line: None,
) -> tuple[Context, ...]:
    """Measure all methods at all contexts, shortest first.

    Raises UsageError and BudgetError for what cannot be measured, before anything runs, and
    CompressionError for a row that does not do what it claims.
    """
    rows, reasons = foresee(model, profiles, setup, model.dtype.itemsize)
    if profiles:  # a foreign profile is refused before anything is timed
        apply(model, next(iter(profiles.values())), budget=setup.budgets[0], min_tokens=1).detach()
    subject, contexts = Subject.of(model), list[Context]()
    for tokens in sorted(set(setup.contexts)):
        here = {method: reasons[method, tokens] for method in rows}
        run = _PromptRun(subject, make_prompt(tokens), setup, here, say)
        with no_collector():
            contexts.append(run.measure(warm=not contexts))
        if broken := here.get(Method(Kind.PREALLOCATED), ""):
            reasons |= {(Method(Kind.PREALLOCATED), later): broken for later in setup.contexts}
    return tuple(contexts)


def foresee(
    model: Any, profiles: Mapping[Kind, Profile], setup: PromptSetup, itemsize: int
) -> tuple[list[Method], dict[tuple[Method, int], str]]:
    """All rows, and why some cannot run at a context; the model may be without weights.

    `itemsize` is bytes per K/V element. Raises UsageError, and BudgetError when strict.
    """
    limit = context_limit(model)
    if limit is not None and max(setup.contexts) > limit:
        raise UsageError(
            f"a context of {max(setup.contexts)} tokens is over the model's limit of {limit}: give "
            f"--context {limit} or less"
        )
    rows = methods(profiles, setup.budgets, setup.preallocated)
    reasons = {
        (method, tokens): reason_not(method, tokens, itemsize, setup.batch)
        for method in rows
        for tokens in setup.contexts
    }
    for (method, tokens), reason in reasons.items():
        if setup.strict and reason and method.kind is Kind.PROFILE:
            raise BudgetError(f"at a context of {tokens} tokens: {reason}")
    return rows, reasons


@dataclass
class _PromptRun:
    """One context; `reasons` says of every method why it cannot run, empty where it can."""

    subject: Subject
    prompt: Prompt
    setup: PromptSetup
    reasons: dict[Method, str]
    say: Say

    def measure(self, warm: bool) -> Context:
        """All rows. `warm`: every method runs once untimed first; on CUDA that is always so."""
        began = time.perf_counter()
        if warm or self._on_cuda:
            self._warm_up()
        able = [method for method, reason in self.reasons.items() if not reason]
        rows = {method: method.row(reason) for method, reason in self.reasons.items()}
        groups, alone = gather_groups(able, self._room)
        for number, group in enumerate([*groups, *([method] for method in alone)]):
            for method, row in self._compete(group).items():
                rows[method] = replace(row, group=number)
        compared, seconds = compare(list(rows.values())), time.perf_counter() - began
        return Context(self.prompt.tokens, self.prompt.rows, self.prompt.source, compared, seconds)

    @property
    def _on_cuda(self) -> bool:
        return bool(self.subject.machine.device.type == "cuda")

    @property
    def _room(self) -> Room:
        tokens = self.prompt.tokens + self.setup.new_tokens
        dense = self.subject.dense_bytes(tokens, self.prompt.rows)
        return Room(
            tokens=self.prompt.tokens,
            dense=dense,
            segments=self.subject.view.grid.total * self.prompt.rows,
            working=dense,
            device=self.subject.machine.free(PROMPT_SHARE),
            host=host_free(PROMPT_SHARE) if self._on_cuda else None,
        )

    def _warm_up(self) -> None:
        self.say(f"{self.prompt.tokens:,} tokens: warming up")
        for method in [method for method, reason in self.reasons.items() if not reason]:
            contestant = PromptContestant(self.subject, method, self.prompt)
            try:
                contestant.prefill()
                contestant.decode(WARM_STEPS)
            except Exception as error:
                if method.kind is not Kind.PREALLOCATED:
                    raise
                # Not ours: some classes of transformers cannot run on a StaticCache.
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.reasons[method] = f"transformers cannot: {text[:120]}"

    def _compete(self, group: Sequence[Method]) -> dict[Method, Row]:
        """Prefill all, then let them decode in turns."""
        contestants = [PromptContestant(self.subject, method, self.prompt) for method in group]
        rows = [self._prefill(contestant) for contestant in contestants]
        self.say(f"{self.prompt.tokens:,} tokens: decoding, {self.setup.rounds} rounds")
        take_turns(contestants, self.setup.rounds, self.setup.block)
        return {
            contestant.method: contestant.row_after_steps(row)
            for contestant, row in zip(contestants, rows, strict=True)
        }

    def _prefill(self, contestant: PromptContestant) -> Row:
        self.say(f"{self.prompt.tokens:,} tokens: prefill, {contestant.method.name}")
        before = self.subject.machine.process_bytes()
        contestant.prefill()
        after = self.subject.machine.process_bytes()
        grown = None if before is None or after is None else after - before
        return contestant.row_after_prompt(grown)


# -- a shape's caches are filled by hand --------------------------------------------------------


@dataclass(frozen=True)
class FilledRun:
    """What all contexts of a shape share."""

    subject: Subject
    keys: Keys
    methods: tuple[Method, ...]
    setup: FilledSetup
    regime: Regime
    links: Links
    say: Say


def bench_filled(
    setup: FilledSetup, path: Path, say: Say, clock: Callable[[], float] = time.monotonic
) -> BenchResult:
    """Run what is not in `path` yet, as far as the time goes; `path` holds all of it.

    Raises UsageError, also where `path` holds another benchmark.
    """
    began = clock()
    check_device(setup.device)
    layers = setup.layers or SHAPES[setup.shape].layers
    say(f"making {layers} layers of {setup.shape} with random weights")
    vocabulary = SHAPES[setup.shape].vocabulary
    subject = Subject.of(build_shape(setup.shape, layers, setup.dtype, setup.device, vocabulary))
    model, view = subject.model, subject.view
    regime = describe_filled(model, setup)
    result = resume(path, regime)
    keys = Keys(view, model.dtype, model.device)
    profiles = filled_profiles(model, view, keys)
    if result is None:
        say("copy bandwidth, and prefill")
        links = measure_links(subject.machine, setup.link_megabytes)
        prefill = measure_prefill(subject, profiles, setup)
        result = BenchResult(regime, links=links, prefill=prefill, wanted=setup.wanted)
        result.save(path)
    else:
        say(f"{path}: {len(result.contexts)} contexts are done")
    assert result.links is not None
    rows = tuple(filled_methods(setup.budgets, profiles))
    run = FilledRun(subject, keys, rows, setup, regime, result.links, say)
    wanted = tuple(dict.fromkeys((*result.wanted, *setup.wanted)))
    return _run_contexts(run, replace(result, wanted=wanted), path, began, clock)


def _run_contexts(
    run: FilledRun, result: BenchResult, path: Path, began: float, clock: Callable[[], float]
) -> BenchResult:
    longest = 0.0
    for number, (tokens, batch) in enumerate(result.left):
        spent = clock() - began
        if number and spent + CAUTION * longest > 60 * run.setup.minutes:
            run.say(f"{spent / 60:.1f} minutes are over: run again for the rest")
            break
        start = clock()
        context = run_context(run, tokens, batch)
        longest = max(longest, clock() - start)
        result = replace(result, contexts=(*result.contexts, context))
        result.save(path)
    return result


def check_device(device: str) -> None:
    """Raise UsageError where there is no such device, or no Triton on it."""
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        raise UsageError(f"--device {device}: expected cuda, or cpu to try the benchmark")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "torch finds no CUDA device: run this on a machine that has one, or try it with "
            "--device cpu --shape tiny --context 2048 --batch 1 --prefill 1024"
        )
    if kind == "cuda" and (reason := no_triton()):
        raise UsageError(f"the benchmark is of the Triton kernels, and {reason}")


def measure_prefill(
    subject: Subject, profiles: Mapping[Kind, Profile], setup: FilledSetup
) -> tuple[PrefillTime, ...]:
    """What compression adds to the time to the first token: real prefills of random tokens.

    Medians of a few turns after a first one, all methods in each.
    """
    tokens, middle = setup.prefill_tokens, setup.budgets[len(setup.budgets) // 2]
    prompt = random_prompt(subject.model, tokens, rows=1, steps=1)
    dense = Method(Kind.DENSE)
    rows = [Method(kind, middle, profiles[kind]) for kind in COMPRESSING.values()]
    seconds: dict[Method, list[float]] = {method: [] for method in (dense, *rows)}
    for _ in range(_PREFILLS + 1):
        for method, taken in seconds.items():
            contestant = PromptContestant(subject, method, prompt)
            contestant.prefill()
            taken.append(contestant.prefill_seconds)
    medians = {method: median(taken[1:]) for method, taken in seconds.items()}
    return tuple(PrefillTime(tokens, row.name, medians[row], medians[dense]) for row in rows)


def run_context(run: FilledRun, tokens: int, batch: int) -> Context:
    """All methods; those that do not fit say why."""
    began = time.perf_counter()
    machine, view = run.subject.machine, run.subject.view
    dense = run.subject.dense_bytes(tokens, batch)
    working = LAYERS_AT_WORK * dense // view.grid.layers
    room = Room(
        tokens, dense, view.grid.total * batch, working, machine.free(FILLED_SHARE),
        host_free(FILLED_SHARE),
    )  # fmt: skip
    groups, reasons = gather_groups(run.methods, room)
    rows = {method: method.row(reason) for method, reason in reasons.items()}
    for number, group in enumerate(groups):
        names = f"{len(group)} methods" if len(group) > 1 else group[0].name
        run.say(f"{tokens:,} tokens x {batch}: {names} (set {number + 1} of {len(groups)})")
        try:
            measured = _run_group(run, group, tokens, batch)
        except torch.OutOfMemoryError as error:
            reason = f"out of memory, though it seemed to fit: {str(error).splitlines()[0]}"
            measured = {method: method.row(reason) for method in group}
        machine.free(FILLED_SHARE)  # gives back what this set held
        rows |= {method: replace(row, group=number) for method, row in measured.items()}
    compared = compare(
        [rows[method] for method in run.methods], run.links, run.regime.weight_bytes or 0, dense
    )
    seconds = time.perf_counter() - began
    return Context(tokens, batch, "filled by hand", compared, seconds)


def _run_group(
    run: FilledRun, group: Sequence[Method], tokens: int, batch: int
) -> dict[Method, Row]:
    rows: dict[Method, Row] = {}
    contestants = _fill(run, group, tokens, batch, rows)
    for contestant in contestants:
        rows[contestant.method] = contestant.row_after_prompt()
    for contestant in contestants:
        contestant.prepare()
        contestant.decode(WARM_STEPS, timed=False)
    take_turns(contestants, run.setup.rounds, run.setup.block)
    for contestant in contestants:
        row = contestant.row_after_steps(rows[contestant.method])
        rows[contestant.method] = replace(row, attend_ms=_attend_ms(run, contestant, batch))
    return rows


@torch.no_grad()
def _fill(
    run: FilledRun, group: Sequence[Method], tokens: int, batch: int, rows: dict[Method, Row]
) -> list[FilledContestant]:
    """Contestants whose caches hold the prompt, layer by layer; `rows` gets those that cannot."""
    forced = list(islice(drifting_tokens(run.subject.model, batch), run.setup.all_steps))
    contestants: dict[Method, FilledContestant] = {}
    for method in group:
        try:
            contestants[method] = FilledContestant(run.subject, method, tokens, forced)
        except HkvError as error:
            rows[method] = method.row(str(error))
    hosts: HostItems = {}
    for number in range(run.subject.view.grid.layers):
        key, value = run.keys.layer(number, batch, tokens)
        query = run.keys.queries(number, batch, KEEP.window)
        for method, contestant in list(contestants.items()):
            try:
                contestant.fill(number, query, key, value, hosts)
            except HkvError as error:
                rows[method] = method.row(str(error))
                del contestants[method]
    return list(contestants.values())


@torch.no_grad()
def _attend_ms(run: FilledRun, contestant: FilledContestant, batch: int) -> float:
    """Milliseconds of all layers' attention, recorded so that launching takes no time."""
    machine = run.subject.machine
    queries = [run.keys.queries(n, batch, 1) for n in range(run.subject.view.grid.layers)]
    contestant.attend(queries)
    replay = machine.recorder().record(partial(contestant.attend, queries))
    replay()
    return median(machine.lap(replay)() for _ in range(run.setup.rounds * 3))
