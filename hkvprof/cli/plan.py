"""`hkvprof plan`: what a profile's budgets hold, and whether they fit a device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hkvprof.cli import options
from hkvprof.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from hkvprof.profile.budgets import Fetch
    from hkvprof.profile.capacity import Ask, Fit
    from hkvprof.profile.forecast import Forecast
    from hkvprof.profile.record import Profile
    from hkvprof.report.measured import MeasuredQuality

EXAMPLES = """\b
Examples:
  hkvprof plan tinyvl.profile.safetensors
  hkvprof plan p.safetensors --gpu 24GiB --context 32768 --batch 4
  hkvprof plan p.safetensors --budget 0.05,4096,2GiB --context 131072 --dtype float16
  hkvprof plan p.safetensors --budget 0.05 --fetch 0.5%
  hkvprof plan p.safetensors --eval out/
  hkvprof plan p.safetensors --gpu 80GB --weights 15.2GiB --json | jq .fit.largest_budget.share"""

_BUDGETS = "0.05,0.10,0.20,0.50"
_RESERVE = "1GiB"
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def plan(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile made by `hkvprof calibrate`.")
    ],
    context: options.Context = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of equal length.")] = 1,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="The device's memory: does it fit?")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="SIZE",
            help="With --gpu: the model's weights; default: as the profile tells.",
        ),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            "--reserve",
            metavar="SIZE",
            help=f"With --gpu: for activations and generated tokens; default {_RESERVE}.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help=f"Shares, tokens or bytes, separated by commas; default {_BUDGETS}. The first is "
            "drawn; by default the largest that fits, or the profile's own.",
        ),
    ] = None,
    fetch: options.Fetch = None,
    evaluation: options.Evaluation = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            callback=options.full_dtype,
            help="Of weights, keys and values: bfloat16, float16 or float32.",
        ),
    ] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII alone.")] = False,
) -> None:
    """Foretell bytes, reads, quality and fit of budgets, without the model."""
    from hkvprof.cli.output import draws_ascii, stdout
    from hkvprof.profile.budgets import Fetch
    from hkvprof.profile.record import load_profile
    from hkvprof.profile.sizes import context_for
    from hkvprof.report import forecast
    from hkvprof.runtime.options import MIN_TOKENS

    given = _sizes(gpu, weights, reserve)
    itemsize = _item_bytes(dtype)
    asked, reads = _budgets(budget), Fetch.parse(fetch)
    loaded = load_profile(profile)
    tokens = context_for(loaded.provenance, context)
    quality = _quality(profile, loaded, evaluation)

    def ask(share: float, tokens: int, rows: int) -> Forecast:
        return loaded.plan(share, tokens, itemsize, rows, reads)

    fit = None if given is None else _fit(ask, loaded, given, (tokens, itemsize, batch))
    plans = {text: _plan(loaded, text, reads, (tokens, itemsize, batch)) for text in asked}
    if budget is not None and all(isinstance(found, str) for found in plans.values()):
        loaded.plan(asked[0], tokens, itemsize, batch, reads)  # says what is wrong with it
    dense = ask(1.0, tokens, batch)
    outlook = forecast.Outlook(
        dtype=dtype,
        dense=dense,
        budgets=tuple(plans.items()),
        drawn=_drawn(loaded, reads, None if budget is None else plans[asked[0]], dense, fit),
        fit=fit,
        min_tokens=MIN_TOKENS,
        quality=quality,
        fetch=reads,
    )
    if as_json:
        typer.echo(json.dumps(forecast.to_json(outlook), indent=2, sort_keys=True))
        return
    plain = draws_ascii(ascii_only)
    stdout(plain).print(forecast.page(outlook, plain))


def _plan(
    profile: Profile, budget: str | float, fetch: Fetch, prompts: tuple[int, int, int]
) -> Forecast | str:
    """The forecast of a budget, or why it is too small; `prompts`: their tokens, bytes per element,
    and how many."""
    try:
        return profile.plan(budget, *prompts, fetch)
    except BudgetError as error:
        return f"{budget}: {error}"


def _drawn(
    profile: Profile, fetch: Fetch, first: Forecast | str | None, dense: Forecast, fit: Fit | None
) -> Forecast | None:
    """The first budget asked for; else the largest that fits, else the default one."""
    if first is None and fit is not None and not fit.dense_fits and fit.best is not None:
        return fit.best
    if first is None:
        prompts = (dense.tokens, dense.itemsize, dense.rows)
        first = _plan(profile, profile.default_budget, fetch, prompts)
    return None if isinstance(first, str) else first


def _quality(file: Path, profile: Profile, evaluation: Path | None) -> MeasuredQuality | None:
    """What was measured of answers. Raises UsageError for another's folder."""
    from hkvprof.report.measured import measured

    if evaluation is not None:
        from hkvprof.evaluate.belonging import check_belongs

        check_belongs(evaluation, file, profile)
    return measured(profile, evaluation)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the device, of the weights (None: as the profile tells), and in reserve."""

    gpu: int
    weights: int | None
    reserve: int


def _sizes(gpu: str | None, weights: str | None, reserve: str | None) -> _Sizes | None:
    """What --gpu and its companions say. Raises UsageError."""
    from hkvprof.profile.budgets import parse_size

    if gpu is None:
        if weights is None and reserve is None:
            return None
        name = "--reserve" if weights is None else "--weights"
        raise UsageError(f"{name} without --gpu: give the device's memory too, such as --gpu 24GiB")
    size = parse_size(gpu, "--gpu")
    if size < 1:
        raise UsageError(f"--gpu {gpu} holds nothing: give the device's memory, such as 24GiB")
    known = None if weights is None else parse_size(weights, "--weights")
    return _Sizes(size, known, parse_size(_RESERVE if reserve is None else reserve, "--reserve"))


def _fit(ask: Ask, profile: Profile, given: _Sizes, prompts: tuple[int, int, int]) -> Fit:
    """What fits; `prompts`: their tokens, bytes per element, and how many. Raises UsageError."""
    from hkvprof.profile.capacity import Room, find_fit

    tokens, itemsize, batch = prompts
    told = profile.sizes
    if given.weights is None and told is None:
        raise UsageError(
            "--gpu needs --weights SIZE, which this profile does not tell: give the size of the "
            "checkpoint's weight files, such as --weights 15.2GiB"
        )
    weights = told.weights(itemsize) if given.weights is None and told else given.weights
    room = Room(given.gpu, weights or 0, given.reserve)
    longest = {"longest": told.longest_context} if told and told.longest_context else {}
    return find_fit(ask, tokens, batch, profile.default_budget, room, **longest)


def _item_bytes(dtype: str) -> int:
    if dtype not in _ITEM_BYTES:
        names = ", ".join(_ITEM_BYTES)
        raise UsageError(f"--dtype {dtype!r} is not known here: expected one of {names}")
    return _ITEM_BYTES[dtype]


def _budgets(text: str | None) -> list[str]:
    """Budgets as written, each understood. Raises BudgetError."""
    from hkvprof.profile.budgets import Budget

    asked = options.listed(_BUDGETS if text is None else text)
    if not asked:
        raise UsageError(f"--budget {text!r} lists nothing: expected budgets such as {_BUDGETS}")
    for entry in asked:
        Budget.parse(entry)
    return asked
