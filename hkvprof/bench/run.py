"""The benchmark: every context, every method, the same prompts, steps interleaved in rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

from hkvprof.bench.contestant import Contestant
from hkvprof.bench.memory import available_bytes, no_collector, process_bytes
from hkvprof.bench.methods import Kind, Method, methods, reason_not
from hkvprof.bench.prompts import Prompt, PromptMaker
from hkvprof.bench.records import Context, Row, Sizes
from hkvprof.bench.verify import verify
from hkvprof.errors import BudgetError, UsageError
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.outline import context_limit
from hkvprof.profile.budgets import Budget
from hkvprof.profile.record import Profile
from hkvprof.runtime import apply

MIN_STEPS = 32
_WARM_STEPS = 2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """What is asked for: contexts in tokens, budgets, `rounds` of `new_tokens` in all, batch.

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
        """Steps of one method in one round."""
        return self.new_tokens // self.rounds


def bench(
    model: Any,
    profiles: Mapping[Kind, Profile],
    make_prompt: PromptMaker,
    setup: Setup,
    say: Say = lambda line: None,
) -> tuple[Context, ...]:
    """Measure all methods at all contexts, shortest first.

    Raises UsageError and BudgetError for what cannot be measured, before anything runs, and
    CompressionError for a row that does not do what it claims.
    """
    rows, reasons = foresee(model, profiles, setup, model.dtype.itemsize)
    if profiles:  # a foreign profile is refused before anything is timed
        apply(model, next(iter(profiles.values())), budget=setup.budgets[0], min_tokens=1).detach()
    view = view_model(model)
    results: list[Context] = []
    for tokens in sorted(set(setup.contexts)):
        run = _Run(model, view, rows, make_prompt(tokens), setup, say)
        run.reasons = {method: reasons[method, tokens] for method in rows}
        with no_collector():
            results.append(run.measure(warm=not results))
        broken = results[-1].rows[1].reason if setup.preallocated else ""
        if broken:
            reasons |= {(rows[1], later): broken for later in setup.contexts}
    return tuple(results)


def foresee(
    model: Any, profiles: Mapping[Kind, Profile], setup: Setup, itemsize: int
) -> tuple[list[Method], dict[tuple[Method, int], str]]:
    """All rows, and why some cannot run at a context; the model may be without weights.

    `itemsize` is bytes per K/V element. Raises UsageError and BudgetError as `bench`.
    """
    _check_contexts(model, setup.contexts)
    rows = methods(profiles, setup.budgets, setup.preallocated)
    return rows, _reasons(rows, setup, itemsize)


def _check_contexts(model: Any, contexts: Sequence[int]) -> None:
    limit = context_limit(model)
    if limit is not None and max(contexts) > limit:
        raise UsageError(
            f"a context of {max(contexts)} tokens is over the model's limit of {limit}: give "
            f"--context {limit} or less"
        )


def _reasons(rows: Sequence[Method], setup: Setup, itemsize: int) -> dict[tuple[Method, int], str]:
    """Why methods cannot run at contexts, from plans alone. Raises BudgetError when strict."""
    found = {
        (method, tokens): reason_not(method, tokens, itemsize, setup.batch)
        for method in rows
        for tokens in setup.contexts
    }
    for (method, tokens), reason in found.items():
        if setup.strict and reason and method.kind is Kind.PROFILE:
            raise BudgetError(f"at a context of {tokens} tokens: {reason}")
    return found


class _Run:
    """One context."""

    def __init__(
        self,
        model: Any,
        view: ModelView,
        rows: Sequence[Method],
        prompt: Prompt,
        setup: Setup,
        say: Say,
    ) -> None:
        self.model, self.view, self.prompt = model, view, prompt
        self.rows, self.setup, self.say = rows, setup, say
        self.reasons: dict[Method, str] = {}
        self.found: dict[Method, Row] = {}

    def measure(self, warm: bool) -> Context:
        """All rows. `warm`: every method runs once untimed first; on CUDA that is always so."""
        if warm or self.model.device.type == "cuda":
            self._warm_up()
        able = [method for method in self.rows if not self.reasons[method]]
        together = self._dense_bytes * _copies(self, able) <= available_bytes(self.model.device)
        for group in [able] if together else [[method] for method in able]:
            self._compete([self._contestant(method) for method in group])
        rows = [self._row(method) for method in self.rows]
        dense, preallocated = (self._step_ms(kind) for kind in (Kind.DENSE, Kind.PREALLOCATED))
        rows = [
            replace(
                row,
                speedup_over_dense=_ratio(dense, row.step_ms),
                speedup_over_preallocated=_ratio(preallocated, row.step_ms),
                **self._compression(row),
            )
            for row in rows
        ]
        return Context(self.prompt.tokens, self.prompt.source, together, tuple(rows))

    @property
    def _dense_bytes(self) -> int:
        """Of the prompt and all new tokens."""
        tokens = self.prompt.tokens + self.setup.new_tokens
        return self.prompt.rows * tokens * self.view.grid.token_bytes(self.model.dtype.itemsize)

    def _contestant(self, method: Method) -> Contestant:
        return Contestant(self.model, self.view, method, self.prompt)

    def _warm_up(self) -> None:
        self.say(f"{self.prompt.tokens:,} tokens: warming up")
        for method in self.rows:
            if self.reasons[method]:
                continue
            contestant = self._contestant(method)
            try:
                contestant.prefill()
                contestant.decode(_WARM_STEPS)
            except Exception as error:
                if method.kind is not Kind.PREALLOCATED:
                    raise
                # Not ours: some classes of transformers cannot run on a StaticCache.
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.reasons[method] = f"transformers cannot: {text[:120]}"

    def _compete(self, contestants: list[Contestant]) -> None:
        """Prefill all, then let them decode in turns; fills `found`."""
        after: dict[Method, tuple[Sizes, Any, int | None]] = {}
        for contestant in contestants:
            method = contestant.method
            self.say(f"{self.prompt.tokens:,} tokens: prefill, {method.name}")
            before = process_bytes(self.model.device)
            contestant.prefill()
            held = process_bytes(self.model.device)
            grown = None if before is None or held is None else held - before
            sizes, receipt = contestant.sizes(), contestant.receipt()
            if receipt is not None:
                verify(method, self.prompt.tokens, sizes, receipt)
            after[method] = sizes, _figures(receipt), grown
        self.say(f"{self.prompt.tokens:,} tokens: decoding, {self.setup.rounds} rounds")
        for number in range(self.setup.rounds):
            first = number % len(contestants)  # nobody always follows the same other
            for contestant in contestants[first:] + contestants[:first]:
                contestant.decode(self.setup.block)
        for contestant in contestants:
            self.found[contestant.method] = _measured(contestant, *after[contestant.method])

    def _row(self, method: Method) -> Row:
        plain = Row(method.name, method.kind.name.lower(), method.budget, self.reasons[method])
        return self.found.get(method, plain)

    def _step_ms(self, kind: Kind) -> float | None:
        return next((row.step_ms for m, row in self.found.items() if m.kind is kind), None)

    def _compression(self, row: Row) -> dict[str, Any]:
        """Seconds of compression by difference where the runtime does not tell."""
        dense = next((r for m, r in self.found.items() if m.kind is Kind.DENSE), None)
        if not row.budget or row.compression_source or row.prefill_seconds is None or dense is None:
            return {}
        seconds = row.prefill_seconds - (dense.prefill_seconds or 0.0)
        return {"compression_seconds": seconds, "compression_source": "difference"}


def _copies(run: _Run, able: Sequence[Method]) -> float:
    """Dense caches' worth of memory that all methods take at once, at most."""
    on_host = 0.0 if run.model.device.type == "cuda" else 1.0
    shares = [
        Budget.parse(method.budget).resolve(run.prompt.tokens, run._dense_bytes) + on_host
        if method.budget
        else 1.0
        for method in able
    ]
    return sum(shares) + 1


def _figures(receipt: Any) -> dict[str, Any]:
    """Optional figures of a receipt: those that this runtime tells."""
    names = ("peak_bytes", "compression_seconds", "retrieval_seconds", "bytes_moved")
    return {name: getattr(receipt, name, None) for name in names}


def _measured(
    contestant: Contestant, sizes: Sizes, before: dict[str, Any], grown: int | None
) -> Row:
    receipt = contestant.receipt()
    end = _figures(receipt)
    method, seconds = contestant.method, contestant.step_seconds
    retrieval = _increase(before["retrieval_seconds"], end["retrieval_seconds"])
    moved = _increase(before["bytes_moved"], end["bytes_moved"])
    return Row(
        method=method.name,
        kind=method.kind.name.lower(),
        budget=method.budget,
        resident_bytes=sizes.resident,
        dense_share=sizes.resident / sizes.dense,
        storage_bytes=sizes.storage,
        host_bytes=sizes.host,
        process_bytes=grown,
        peak_bytes=before["peak_bytes"],
        prefill_seconds=contestant.prefill_seconds,
        compression_seconds=before["compression_seconds"],
        compression_source="" if before["compression_seconds"] is None else "runtime",
        steps=len(seconds),
        step_ms=1000 * median(seconds),
        step_ms_p90=1000 * quantiles(seconds, n=10, method="inclusive")[-1],
        retrieval_share=None if retrieval is None else retrieval / contestant.decode_seconds,
        hit_rate=getattr(receipt, "hit_rate", None),
        moved_bytes_per_step=None if moved is None else moved / sum(map(len, contestant.blocks)),
    )


def _increase(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _ratio(theirs: float | None, mine: float | None) -> float | None:
    return None if theirs is None or mine is None else theirs / mine
