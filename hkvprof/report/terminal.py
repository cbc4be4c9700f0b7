"""Profiles drawn with characters: pure functions from a Profile to rich text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from hkvprof.heads import HeadType
from hkvprof.profile.budgets import INFEASIBLE
from hkvprof.profile.certificate import KEY as CERTIFICATE
from hkvprof.profile.confidence import KEY
from hkvprof.profile.record import Profile
from hkvprof.report.attention import attention
from hkvprof.report.certainty import (
    agreement_text,
    certainty,
    doubts,
    plain,
    section,
    type_agreements,
)
from hkvprof.report.folding import Cell, FoldingTable, Grid
from hkvprof.report.summary import (
    borderline,
    kappa_index,
    losses_at_budget,
    percent,
    sentence,
    strategies_used,
    unserved,
)
from hkvprof.samples.record import SAMPLES_KEY

_MOST_BORDERLINE = 12


def glyphs(ascii_only: bool) -> Glyphs:
    """The characters to draw with, Unicode or plain ASCII."""
    return ASCII if ascii_only else UNICODE


def overview(profile: Profile, tokens: int, ascii_only: bool) -> RenderableType:
    """The whole `inspect` page; its first line is one sentence."""
    marks = glyphs(ascii_only)
    return Group(
        Text(sentence(profile, tokens)),
        Text(),
        types_picture(profile, marks),
        Text(),
        budget_picture(profile, marks),
        Text(),
        *_strategies(profile),
        Text(),
        *_borderline(profile),
        Text(),
        *(Text(line) for line in certainty(profile)),
        Text(),
        *_certificate(profile),
        *(Text(line) for line in attention(profile)),
        Text(),
        *_origin(profile),
    )


def _certificate(profile: Profile) -> list[Text]:
    lines = [Text(line) for line in section(profile)]
    return [*lines, Text()] if lines else []


def types_picture(profile: Profile, marks: Glyphs) -> Grid:
    """Rows are KV heads, columns layers; the legend above."""
    types = profile.head_types
    layers, heads = types.shape

    def cell(layer: int, head: int) -> tuple[str, str]:
        if types[layer, head] == HeadType.STATIC:
            return marks.static, marks.static_style
        return marks.dynamic, marks.dynamic_style

    legend = Text("Head types: ")
    legend.append(marks.static, marks.static_style).append(" static (pruned once)  ")
    legend.append(marks.dynamic, marks.dynamic_style).append(" dynamic (fetched on demand)")
    return heads_picture(layers, heads, legend, cell)


def budget_picture(profile: Profile, marks: Glyphs) -> Grid:
    """The share that every head keeps, relative to the default budget."""
    return shares_picture(profile.budget, profile.default_budget, marks)


def _strategies(profile: Profile) -> list[Text]:
    total = profile.grid.total
    lines = [Text("Strategies:")]
    for name, count in strategies_used(profile).items():
        lines.append(Text(f"  {count:>5} of {total}  {name}"))
    return lines


def _borderline(profile: Profile) -> list[Text]:
    close = borderline(profile)
    if profile.recipe == "uniform":
        return [Text("Borderline heads: none; a uniform profile was not measured")]
    rule = "loss of the two types within 10%"
    if profile.recipe == "paper":
        rule = "sparsity within one standard error of theta"
    lines = [Text(f"Borderline heads ({rule}): {len(close)} of {profile.grid.total}")]
    if doubted := doubts(profile):
        lines.append(Text(f"  {doubted}"))
    for head in close[:_MOST_BORDERLINE]:
        lines.append(Text(f"  layer {head.layer:>3} head {head.head:>2}  {head.reason}"))
    if len(close) > _MOST_BORDERLINE:
        lines.append(Text(f"  ... and {len(close) - _MOST_BORDERLINE} more: see --json"))
    return lines


def _origin(profile: Profile) -> list[Text]:
    model, grid = profile.fingerprint, profile.grid
    lines = [
        Text("Provenance:"),
        Text(
            f"  model: {model.architecture}, {grid.layers} layers, {grid.query_heads} query and "
            f"{grid.kv_heads} KV heads of width {grid.head_dim}"
        ),
    ]
    if model.hub_id:
        lines.append(Text(f"  source: {plain(model.hub_id)} {plain(model.commit)}".rstrip()))
    weights = [model.weights_digest and f"digest {model.weights_digest}", model.quantisation]
    if any(weights):
        lines.append(Text(f"  weights: {plain(', '.join(filter(None, weights)))}"))
    if model.adapters:
        lines.append(Text(f"  adapters: {plain(', '.join(model.adapters))}"))
    lines.append(
        Text(f"  recipe: {profile.recipe}, default budget {percent(profile.default_budget)}")
    )
    if short := unserved(profile):
        lines.append(Text(f"  {short}"))
    for key, value in sorted(profile.provenance.items(), key=lambda item: str(item[0])):
        if key in (KEY, CERTIFICATE, SAMPLES_KEY):  # shown above; or digests, for `certify`
            continue
        lines.append(Text(f"  {plain(key)}: {plain(value)}", overflow="fold"))
    return lines


def layer_page(profile: Profile, layer: int, ascii_only: bool) -> RenderableType:
    """One layer, head by head: a table of decisions, then one of loss curves."""
    heading, table = (
        Text(f"Layer {layer} of {profile.grid.layers}"),
        _decisions(profile, layer, glyphs(ascii_only)),
    )
    if not profile.has_curves and profile.recipe != "uniform":
        return Group(heading, table, Text("Loss curves: none; recipe 'paper' measures none"))
    return Group(
        heading,
        table,
        Text("Loss by share kept (* chosen strategy, - does not fit):"),
        _losses(profile, layer),
    )


def _decisions(profile: Profile, layer: int, marks: Glyphs) -> FoldingTable:
    kappa = kappa_index(profile)
    label = "" if kappa is None else f" (top {percent(profile.kappas[kappa])})"
    columns = ["head", "type", "strategy", "kept", "loss"]
    sure = type_agreements(profile, layer)
    if sure:
        columns.append("samples that agree on the type")
    table = FoldingTable(*columns, f"sparsity per query head{label}")
    for head in range(profile.grid.kv_heads):
        number = int(profile.strategy[layer, head])
        strategy = profile.strategies[number]
        static = strategy.head_type is HeadType.STATIC
        glyph, style = (
            (marks.static, marks.static_style) if static else (marks.dynamic, marks.dynamic_style)
        )
        table.add_row(
            str(head),
            Text(f"{glyph} {strategy.head_type.name.lower()}", style),
            strategy.name,
            percent(float(profile.budget[layer, head])),
            _loss(losses_at_budget(profile, layer, head)[number]),
            *([agreement_text(sure[head])] if sure else []),
            "" if kappa is None else _sparsity(profile, kappa, layer, head),
        )
    return table


def _sparsity(profile: Profile, kappa: int, layer: int, head: int) -> str:
    group = profile.grid.group
    queries = range(head * group, (head + 1) * group)
    return " ".join(
        f"{profile.sparsity_mean[kappa, layer, q]:.3f}+-{profile.sparsity_std[kappa, layer, q]:.3f}"
        for q in queries
    )


def _losses(profile: Profile, layer: int) -> FoldingTable:
    ratios = (percent(float(ratio)) for ratio in profile.ratios)
    table = FoldingTable("head", "strategy", *ratios, keys=2)
    loss = profile.loss_at(profile.usual_tokens)
    for head in range(profile.grid.kv_heads):
        for number, strategy in enumerate(profile.strategies):
            star = "* " if profile.strategy[layer, head] == number else "  "
            curve = [_loss(value) for value in loss[number, layer, head]]
            table.add_row(str(head), star + strategy.name, *curve)
    return table


def _loss(value: float) -> str:
    return "-" if value >= INFEASIBLE else f"{value:.3g}"


# -- grids: one character per head or layer; columns are layers, rows what is asked of them --------


@dataclass(frozen=True)
class Glyphs:
    """One set of characters; `shades` are five, from light to dark. Styles are rich's."""

    static: str
    dynamic: str
    shades: str
    whole: str
    static_style: str = ""
    dynamic_style: str = ""


ASCII = Glyphs(static="#", dynamic="o", shades=".-=%@", whole="W")
UNICODE = Glyphs(
    static="■",
    dynamic="○",
    shades="·░▒▓█",
    whole="▲",
    static_style="blue",
    dynamic_style="yellow",
)


BOUNDS = (0.5, 0.8, 1.25, 2.0)
"""Where the five shades of a value begin, relative to the mean."""


def heads_picture(layers: int, heads: int, legend: Text, cell: Cell) -> Grid:
    """One row per KV head, under the legend."""
    return Grid(layers, [f"head {head:>3}" for head in range(heads)], legend, cell)


def shares_picture(shares: NDArray[np.floating], mean: float, marks: Glyphs) -> Grid:
    """The share that every head keeps [layers, heads], shaded relative to `mean`."""
    layers, heads = shares.shape

    def cell(layer: int, head: int) -> tuple[str, str]:
        return shade(float(shares[layer, head]) / mean, marks), ""

    ranges = [f"< {percent(BOUNDS[0] * mean)}"]
    ranges += [f">= {percent(bound * mean)}" for bound in BOUNDS if bound * mean <= 1]
    legend = Text("Share kept: ")
    legend.append("  ".join(f"{s} {r}" for s, r in zip(marks.shades, ranges, strict=False)))
    return heads_picture(layers, heads, legend, cell)


def shade(relative: float, marks: Glyphs) -> str:
    """The shade of a value that is `relative` times the mean."""
    return marks.shades[sum(relative >= bound for bound in BOUNDS)]
