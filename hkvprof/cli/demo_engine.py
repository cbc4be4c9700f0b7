"""`hkvprof demo --engine vllm`: the same questions of plain vLLM and of one that has a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from hkvprof.engines.vllm.crowd import Served
    from hkvprof.evaluate.records import TaskSet
    from hkvprof.models.processing import ChatProcessor

MODEL, BUDGETS = "smollm2", (None, "0.2", "0.1")
_TOKENS, _PER_TASK, _NEW_TOKENS, _POOL = "1000", 2, 24, 3
_OPENING = """SmolLM2-135M inside vLLM, on the CPU: some minutes on two cores.
{count} questions, each about a text of some {tokens} tokens, are there at once; without hkvprof
memory is enough for {pool} of them.
"""


@dataclass(frozen=True)
class AskedCrowd:
    """Questions as token numbers, and how answers to them are judged."""

    tasks: TaskSet
    processor: ChatProcessor
    prompts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tasks: TaskSet, processor: ChatProcessor) -> AskedCrowd:
        """The samples of a task set whose answers can be judged."""
        judged = tuple(sample for sample in tasks.samples if sample.reply is not None)
        ids = [processor.encode([list(one.messages)]).inputs["input_ids"][0] for one in judged]
        prompts = tuple(tuple(one.tolist()) for one in ids)
        return cls(replace(tasks, samples=judged), processor, prompts)

    def right(self, said: Sequence[Sequence[int]]) -> int:
        """How many answers, as token numbers, are right."""
        from hkvprof.evaluate.outside import until

        ends = frozenset({self.processor.tokenizer.eos_token_id})
        texts = [self.processor.decode(until(ends, one)) for one in said]
        golds = [self.tasks.gold_of(sample, 0) for sample in self.tasks.samples]
        return sum(gold.score(text) == 1 for gold, text in zip(golds, texts, strict=True))


def demonstrate(profile: Path, model: str = MODEL) -> None:
    """Ask every engine, one after another, and print the table. Raises HkvError."""
    from hkvprof.cli import options
    from hkvprof.cli.output import say, stdout
    from hkvprof.engines.vllm.bench import EngineSetup, contestant, require_engine
    from hkvprof.engines.vllm.crowd import Crowd
    from hkvprof.evaluate.tasks import load_tasks
    from hkvprof.models.load import resolve_source
    from hkvprof.profile.record import load_profile

    require_engine()
    source = resolve_source(model)
    _, processor = options.open_empty(model, load_profile(profile))
    asked = AskedCrowd.of(load_tasks("longtext", processor, _PER_TASK, _TOKENS), processor)
    longest, count = max(map(len, asked.prompts)), len(asked.prompts)
    setup = EngineSetup(source, str(profile), (), longest, _NEW_TOKENS, count, _POOL)
    crowd = Crowd(count, longest, _NEW_TOKENS, given=asked.prompts)
    typer.echo(_OPENING.format(count=count, tokens=_TOKENS, pool=_POOL))
    rows = []
    for budget in BUDGETS:
        say("plain vLLM" if budget is None else f"vLLM with hkvprof, budget {budget}")
        with contestant(setup, budget) as engine:
            made = engine.serve(crowd)
        rows.append((budget, asked.right(made.said), made, setup.groups(budget)))
    stdout().print(table(rows, count))


def table(rows: Sequence[tuple[str | None, int, Served, int]], count: int) -> Table:
    """Budget, right answers of `count`, figures and groups of heads, engine by engine."""
    from rich.table import Table

    shown = Table("", "right answers", "blocks per request", "most at once", "steps",
                  "CPU seconds")  # fmt: skip
    for budget, right, made, groups in rows:
        shown.add_row(
            "plain vLLM" if budget is None else f"hkvprof, {budget}", f"{right} of {count}",
            f"{made.held / groups:.1f}", f"{made.most}", f"{made.steps}",
            f"{made.cpu_seconds:.0f}",
        )  # fmt: skip
    shown.caption = "blocks of all heads that a running request holds in the mean, of 32 tokens"
    return shown
