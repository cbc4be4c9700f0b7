"""The benchmark: every context, every method, the same tokens, steps interleaved in rounds.

`bench_prompts` has a loaded model read real prompts. `bench_filled` fills the caches of a published
shape by hand, because at 131,072 tokens and 32 rows prefill would take longer than the benchmark;
it is saved after each context, and goes on where it ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

import hkvprof
from hkvprof.bench.compare import compare
from hkvprof.bench.contestant import (
    BenchModel,
    Contestant,
    FilledContestant,
    HostItems,
    PromptContestant,
)
from hkvprof.bench.filled import (
    DRIFT,
    KEEP,
    WARM_STEPS,
    FilledSetup,
    Keys,
    drifting_tokens,
    filled_profiles,
    weight_bytes,
)
from hkvprof.bench.machine import (
    CacheSpace,
    device_name,
    gather_groups,
    host_free,
    measure_links,
    no_collector,
)
from hkvprof.bench.methods import COMPRESSING, Kind, Method, filled_methods, methods, reason_not
from hkvprof.bench.prompts import Prompt, PromptMaker, PromptSetup, random_prompt
from hkvprof.bench.records import BenchResult, Context, PrefillTime, Regime, Row, resume
from hkvprof.errors import BudgetError, HkvError, UsageError
from hkvprof.lazy import no_triton
from hkvprof.models.adapter import view_model
from hkvprof.models.outline import context_limit
from hkvprof.models.shapes import SHAPES, build_shape
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply, kernels

LAYERS_AT_WORK = 4
"""Dense layers' worth of memory that filling may take beside the caches."""
PROMPT_SHARE, FILLED_SHARE = 0.6, 0.9
"""Of the free memory, what caches may take; where prompts are read, activations need the rest."""
CAUTION = 1.5
"""A further context is begun if this many times the longest one so far is left."""
_PREFILLS = 3

Say = Callable[[str], None]


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


def failed(error: RuntimeError) -> str:
    """What torch raised, as a reason."""
    line = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory, though it seemed to fit: {line}"
    return f"failed: {type(error).__name__}: {line}"


# -- one context: which caches are alive together, and their turns ------------------------------


@dataclass
class ContextRun:
    """One context and batch; `reasons` says of every method why it cannot run, empty where it can.

    Where prompts are read and where caches are filled differ in `groups` and `start`.
    """

    subject: BenchModel
    setup: PromptSetup | FilledSetup
    tokens: int
    batch: int
    reasons: dict[Method, str]
    say: Say
    rows: dict[Method, Row] = field(default_factory=dict, init=False)

    def groups(self) -> list[list[Method]]:
        """Sets of methods that take turns; what fits nowhere gets a reason."""
        raise NotImplementedError

    def start(self, group: Sequence[Method]) -> Iterable[Contestant]:
        """Those whose caches hold the prompt; `rows` gets their bytes, or why others cannot run."""
        raise NotImplementedError

    def measure_rows(self) -> list[Row]:
        """Of all methods, not yet compared."""
        groups = self.groups()
        self.rows = {method: method.row(reason) for method, reason in self.reasons.items()}
        for number, group in enumerate(groups):
            names = f"{len(group)} methods" if len(group) > 1 else group[0].name
            self.say(f"{self.tokens:,} tokens x {self.batch}: {names}, {number + 1}/{len(groups)}")
            try:
                self._compete(group)
            except RuntimeError as error:
                reason = failed(error)
                self.rows |= {method: method.row(reason) for method in group}
            self.subject.machine.free(1.0)  # gives back what this set held
            self.rows |= {method: replace(self.rows[method], group=number) for method in group}
        return list(self.rows.values())

    def _compete(self, group: Sequence[Method]) -> None:
        contestants = list(self.start(group))
        for number in range(self.setup.rounds):
            contestants = [one for one in contestants if not self.reasons[one.method]]
            first = number % max(1, len(contestants))  # nobody always follows the same other
            for contestant in [*contestants[first:], *contestants[:first]]:
                with self.named(contestant.method):
                    contestant.decode(self.setup.block)
        for one in [one for one in contestants if not self.reasons[one.method]]:
            with self.named(one.method):
                self.rows[one.method] = one.row_after_steps(self.rows[one.method])

    @contextmanager
    def named(self, method: Method) -> Iterator[None]:
        """What torch raises within becomes the method's reason; others go on."""
        try:
            yield
        except RuntimeError as error:
            self.reasons[method] = failed(error)
            self.rows[method] = method.row(self.reasons[method])

    def space(self, working: int, share: float, pinned: bool) -> CacheSpace:
        """For caches, beside `working` bytes: a share of what is free."""
        return CacheSpace(
            tokens=self.tokens,
            dense=self.subject.dense_bytes(self.tokens, self.batch),
            segments=self.subject.view.grid.total * self.batch,
            working=working,
            device=self.subject.machine.free(share),
            host=host_free(share) if pinned else None,
        )


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
    subject, contexts = BenchModel.of(model), list[Context]()
    for tokens in sorted(set(setup.contexts)):
        here = {method: reasons[method, tokens] for method in rows}
        run = PromptRun(subject, setup, tokens, setup.batch, here, say, make_prompt(tokens))
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
    rows = methods(profiles, setup.budgets, setup.preallocated, setup.fetch)
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
class PromptRun(ContextRun):
    """Every method reads the same prompt and continues with the same tokens."""

    prompt: Prompt

    def measure(self, warm: bool) -> Context:
        """All rows, compared. `warm`: every method runs once untimed first, as always on CUDA."""
        began = time.perf_counter()
        if warm or self._on_cuda:
            self._warm_up()
        rows = compare(self.measure_rows())
        seconds = time.perf_counter() - began
        return Context(self.tokens, self.batch, self.prompt.source, rows, seconds)

    @property
    def _on_cuda(self) -> bool:
        return bool(self.subject.machine.device.type == "cuda")

    def _warm_up(self) -> None:
        self.say(f"{self.tokens:,} tokens: warming up")
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

    def groups(self) -> list[list[Method]]:
        """What seems to fit nowhere is tried alone."""
        able = [method for method, reason in self.reasons.items() if not reason]
        tokens = self.tokens + self.setup.rounds * self.setup.block
        working = self.subject.dense_bytes(tokens, self.batch)
        groups, alone = gather_groups(able, self.space(working, PROMPT_SHARE, self._on_cuda))
        return [*groups, *([method] for method in alone)]

    def start(self, group: Sequence[Method]) -> Iterator[Contestant]:
        """All read the prompt."""
        machine = self.subject.machine
        for method in group:
            contestant = PromptContestant(self.subject, method, self.prompt)
            self.say(f"{self.tokens:,} tokens: prefill, {method.name}")
            before = machine.process_bytes()
            contestant.prefill()
            after = machine.process_bytes()
            grown = None if before is None or after is None else after - before
            self.rows[method] = contestant.row_after_prompt(grown)
            yield contestant


# -- a shape's caches are filled by hand --------------------------------------------------------


def bench_filled(
    setup: FilledSetup, path: Path, say: Say, clock: Callable[[], float] = time.monotonic
) -> BenchResult:
    """Run what is not in `path` yet, as far as the time goes; `path` holds all of it.

    Raises UsageError, also where `path` holds another benchmark.
    """
    began, longest = clock(), 0.0
    subject = _make_shape(setup, say)
    regime = describe_filled(subject.model, setup)
    result = resume(path, regime)
    keys = Keys(subject.view, subject.model.dtype, subject.model.device)
    profiles = filled_profiles(subject.model, subject.view, keys)
    if result is None:
        say("copy bandwidth, and prefill")
        links = measure_links(subject.machine, setup.link_megabytes)
        result = BenchResult(regime, links=links)
        try:
            result = replace(result, prefill=measure_prefill(subject, profiles, setup))
        except RuntimeError as error:
            result = replace(result, no_prefill=failed(error))
            say(f"no prefill: {result.no_prefill}")
    result = replace(result, wanted=tuple(dict.fromkeys((*result.wanted, *setup.wanted))))
    result.save(path)
    rows = filled_methods(setup.budgets, profiles)
    for number, (tokens, batch) in enumerate(result.left):
        spent = clock() - began
        if number and spent + CAUTION * longest > 60 * setup.minutes:
            say(f"{spent / 60:.1f} minutes are over: run again for the rest")
            break
        start, assumed = clock(), dict.fromkeys(rows, "")
        context = FilledRun(subject, setup, tokens, batch, assumed, say, keys, result).measure()
        longest = max(longest, clock() - start)
        result = replace(result, contexts=(*result.contexts, context))
        result.save(path)
    return result


def _make_shape(setup: FilledSetup, say: Say) -> BenchModel:
    check_device(setup.device)
    shape = SHAPES[setup.shape]
    layers = setup.layers or shape.layers
    say(f"making {layers} layers of {setup.shape} with random weights")
    return BenchModel.of(
        build_shape(setup.shape, layers, setup.dtype, setup.device, shape.vocabulary)
    )


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
    subject: BenchModel, profiles: Mapping[Kind, Profile], setup: FilledSetup
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


@dataclass
class FilledRun(ContextRun):
    """Every method's cache gets the same keys and values; methods that do not fit say why.

    `result` is what was measured so far: the regime and the machine's links.
    """

    keys: Keys
    result: BenchResult

    def measure(self) -> Context:
        """All rows, compared with the machine's links too."""
        began = time.perf_counter()
        dense, regime = self.subject.dense_bytes(self.tokens, self.batch), self.result.regime
        rows = compare(self.measure_rows(), self.result.links, regime.weight_bytes or 0, dense)
        seconds = time.perf_counter() - began
        return Context(self.tokens, self.batch, "filled by hand", rows, seconds)

    def groups(self) -> list[list[Method]]:
        """What fits nowhere does not run."""
        dense = self.subject.dense_bytes(self.tokens, self.batch)
        working = LAYERS_AT_WORK * dense // self.subject.view.grid.layers
        space = self.space(working, FILLED_SHARE, pinned=True)
        groups, reasons = gather_groups(list(self.reasons), space)
        self.reasons |= reasons
        return groups

    @torch.no_grad()
    def start(self, group: Sequence[Method]) -> Sequence[Contestant]:
        """Caches are filled layer by layer; then come steps that compile kernels and record."""
        model, steps = self.subject.model, WARM_STEPS + self.setup.rounds * self.setup.block
        forced = list(islice(drifting_tokens(model, self.batch), steps))
        contestants: dict[Method, FilledContestant] = {}
        for method in group:
            with self._reason(method):
                contestants[method] = FilledContestant(
                    self.subject, method, self.tokens, forced, self.keys
                )
        hosts: HostItems = {}
        for number in range(self.subject.view.grid.layers):
            key, value = self.keys.layer(number, self.batch, self.tokens)
            query = self.keys.queries(number, self.batch, KEEP.window)
            for method in [method for method in contestants if not self.reasons[method]]:
                with self._reason(method):
                    contestants[method].fill(number, query, key, value, hosts)
        filled = [one for method, one in contestants.items() if not self.reasons[method]]
        del contestants, hosts
        for one in filled:
            self.rows[one.method] = one.row_after_prompt()
        for one in filled:
            with self._reason(one.method):
                one.prepare()
                one.decode(WARM_STEPS, timed=False)
        return [one for one in filled if not self.reasons[one.method]]

    @contextmanager
    def _reason(self, method: Method) -> Iterator[None]:
        """What is refused or fails within becomes the method's reason."""
        try:
            with self.named(method):
                yield
        except HkvError as error:
            self.reasons[method] = str(error)
            self.rows[method] = method.row(str(error))
