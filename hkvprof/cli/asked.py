"""`hkvprof eval --engine vllm`: which evaluations an engine can be asked for, and its processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hkvprof.errors import UsageError

if TYPE_CHECKING:
    from hkvprof.evaluate.contest import ComparisonPlan, ProfiledModel
    from hkvprof.evaluate.outside import OutsideEngine
    from hkvprof.evaluate.records import TaskSet
    from hkvprof.models.processing import ChatProcessor
    from hkvprof.profile.record import Profile

ENGINES = ("vllm",)
DTYPES = ("float32", "bfloat16")
_ROOM = 256
"""Tokens of later questions and their chat format, beside replies."""


def check_asked(
    comparison: ComparisonPlan, profile: Profile, processor: ChatProcessor, given: dict[str, Any]
) -> None:
    """Raise HkvError, by name, for what an engine cannot be asked; `given` are options that it has
    no use for."""
    from hkvprof.engines.vllm.bench import BLOCK, require_engine
    from hkvprof.models.processing import TextProcessor
    from hkvprof.profile.blocks import plan_blocks

    name = comparison.engine
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: expected {', '.join(ENGINES)}")
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} is not for --engine: it has static heads alone, on the CPU, and is "
                "compared with hkvprof in transformers under its own plan: leave it out"
            )
    steps = [regime for regime in comparison.regimes if regime.endswith("_steps")]
    if steps:
        raise UsageError(
            f"--regimes {', '.join(steps)}: an engine is always fed token by token: ask for "
            f"{', '.join(one.removesuffix('_steps') for one in steps)}"
        )
    if not isinstance(processor, TextProcessor):
        raise UsageError(
            "--engine asks text models alone: pictures inside the engine are not tested"
        )
    for budget in comparison.budgets:
        plan_blocks(profile, budget, BLOCK)
    require_engine()


@contextmanager
def asked_engines(
    names: tuple[str, Path], profiled: ProfiledModel, tasks: TaskSet, comparison: ComparisonPlan
) -> Iterator[dict[str, OutsideEngine]]:
    """Start an engine for every budget, with room for the longest prompt, and end them. `names` are
    those of the model, as the user gave it, and of the profile's file. Raises UsageError."""
    from hkvprof.cli.output import say
    from hkvprof.engines.vllm.bench import EngineSetup
    from hkvprof.engines.vllm.quality import questioned
    from hkvprof.models.load import resolve_source
    from hkvprof.models.outline import context_limit

    dtype = str(profiled.model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UsageError(f"--engine runs in {' or '.join(DTYPES)}, found {dtype}: give --dtype")
    encode = profiled.processor.encode
    longest = max(encode([list(sample.messages)]).tokens for sample in tasks.samples)
    more = _ROOM + max(comparison.steps, tasks.max_new_tokens) + tasks.max_new_tokens
    limit = context_limit(profiled.model)
    more = more if limit is None else max(1, min(more, limit - longest))
    setup = EngineSetup(
        resolve_source(names[0]), str(names[1]), comparison.budgets, longest, more, pool=2,
        dtype=dtype,
    )  # fmt: skip
    with ExitStack() as stack:
        made: dict[str, OutsideEngine] = {}
        for budget in comparison.budgets:
            say(f"starting {comparison.engine} at budget {budget}")
            made[budget] = stack.enter_context(questioned(setup, budget))
        yield made
