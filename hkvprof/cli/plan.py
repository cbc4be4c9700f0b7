"""`hkvprof plan`: what a profile's budgets hold, and whether they fit a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hkvprof.cli import options
from hkvprof.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from hkvprof.profile.budgets import Fetch
    from hkvprof.profile.capacity import Fit, Room
    from hkvprof.profile.forecast import Forecast
    from hkvprof.profile.record import Profile

EXAMPLES = """\b
Examples:
  hkvprof plan tinyvl.profile.safetensors
  hkvprof plan p.safetensors --gpu 24GiB --weights 15.2GiB --context 32768 --batch 4
  hkvprof plan p.safetensors --budget 0.05,4096,2GiB --context 131072 --dtype float16
  hkvprof plan p.safetensors --budget 0.05 --fetch 0.5%
  hkvprof plan p.safetensors --gpu 80GB --weights 15.2GiB --json | jq .fit.largest_budget.share"""

_BUDGETS = "0.05,0.10,0.20,0.50"
_RESERVE = "1GiB"
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def plan(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile made by `hkvprof calibrate`.")
    ],
    context: Annotated[
        int, typer.Option("--context", min=1, help="Prompt tokens of every row.")
    ] = 32768,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of equal length.")] = 1,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="The device's memory: does it fit?")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="SIZE", help="With --gpu: the model's weights."),
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
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            callback=options.full_dtype,
            help="Of keys and values: bfloat16, float16 or float32.",
        ),
    ] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII alone.")] = False,
) -> None:
    """Foretell bytes, reads, loss and fit of budgets, without the model."""
    from hkvprof.cli.output import draws_ascii, stdout
    from hkvprof.profile.budgets import Fetch
    from hkvprof.profile.capacity import find_fit
    from hkvprof.profile.record import load_profile
    from hkvprof.report import forecast
    from hkvprof.runtime.options import MIN_TOKENS

    room = _room(gpu, weights, reserve)
    itemsize = _item_bytes(dtype)
    asked, reads = _budgets(budget), Fetch.parse(fetch)
    loaded = load_profile(profile)

    def ask(share: float, tokens: int, rows: int) -> Forecast:
        return loaded.plan(share, tokens, itemsize, rows, reads)

    fit = None if room is None else find_fit(ask, context, batch, loaded.default_budget, room)
    plans = {text: _plan(loaded, text, reads, (context, itemsize, batch)) for text in asked}
    if budget is not None and all(isinstance(found, str) for found in plans.values()):
        loaded.plan(asked[0], context, itemsize, batch, reads)  # says what is wrong with it
    dense = ask(1.0, context, batch)
    outlook = forecast.Outlook(
        dtype=dtype,
        dense=dense,
        budgets=tuple(plans.items()),
        drawn=_drawn(loaded, reads, None if budget is None else plans[asked[0]], dense, fit),
        fit=fit,
        min_tokens=MIN_TOKENS,
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


def _room(gpu: str | None, weights: str | None, reserve: str | None) -> Room | None:
    from hkvprof.profile.budgets import parse_size
    from hkvprof.profile.capacity import Room

    if gpu is None:
        if weights is None and reserve is None:
            return None
        name = "--reserve" if weights is None else "--weights"
        raise UsageError(f"{name} without --gpu: give the device's memory too, such as --gpu 24GiB")
    if weights is None:
        raise UsageError(
            "--gpu needs --weights SIZE, which a profile does not know: give the size of the "
            "checkpoint's weight files, such as --weights 15.2GiB"
        )
    size = parse_size(gpu, "--gpu")
    if size < 1:
        raise UsageError(f"--gpu {gpu} holds nothing: give the device's memory, such as 24GiB")
    kept = parse_size(_RESERVE if reserve is None else reserve, "--reserve")
    return Room(size, parse_size(weights, "--weights"), kept)


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
