"""What static heads keep of a context without a question: by its last rows, or calibrated queries.

    python -m tools.studies.static_score CHECKPOINT [--fit 6] [--samples 5] [--tokens 1200]

Contexts of the set `longtext` are pruned before their question; figures are the relative error of
attention outputs in the rows that follow (question and reply), a mean over heads, layers and
contexts. Calibrated centres are fitted to other prompts than they are judged on. `best of two`
chooses per head between the window and centres, by half of the contexts, and is judged on the
others; `oracle` asks the very queries of the rows that are judged.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.index_fit import Moments
from hkvprof.calibration.losses import DecodeRows, layer_losses
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.calibration.query_fit import CENTRES, QuerySamples, centres_of_layer, clusters
from hkvprof.evaluate.longtext import TASKS, make_sample
from hkvprof.heads import CALIBRATED, HeadGrid, HeadType, Modality, Strategy
from hkvprof.models.attention import AttentionCall, hooked_attention
from hkvprof.profile.queries import QueryTables
from hkvprof.samples.read import Sample
from hkvprof.selection.rotary import Positions, Turning
from hkvprof.selection.static import QueryCentres

COUNTS = (1, 4, 8, 16, 32)
POOLS = (1, 7)


@dataclass(frozen=True)
class Rows:
    """One layer of a context and what follows: all queries and keys, values, outputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float


def main() -> None:
    """Fit centres, print the errors of every score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--fit", type=int, default=6, help="prompts that centres are fitted on")
    parser.add_argument("--samples", type=int, default=5, help="contexts that are judged")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--share", type=float, default=0.18, help="of the tokens that is kept")
    args = parser.parse_args()
    model, processor = hkvprof.load_model(args.model, dtype="float32")
    probed = ProbedModel.of(model, processor, hkvprof.Recipe())
    turning = probed.turning
    assert turning is not None
    queries = probed.new_queries()
    with hooked_attention(model):
        for number in range(args.fit):
            sample = _sample(probed, "calibration", number, args.tokens)
            Probe(probed, sample).add_moments(Moments(probed.view.grid), queries)
        assert queries is not None
        fitted = {count: _fit(queries, count) for count in COUNTS}
        found = [
            _judge(probed, _sample(probed, "heldout", number, args.tokens), fitted, args.share)
            for number in range(args.samples)
        ]
    names = list(found[0])
    errors = {name: torch.stack([one[name] for one in found]) for name in names}
    for name, values in errors.items():
        sys.stdout.write(f"{name}: {values.mean():.4f}\n")
    for pool in POOLS:
        pair = [errors[f"{kind}, pool {pool}"] for kind in ("window", f"{CENTRES} centres")]
        sys.stdout.write(f"best of two per head, pool {pool}: {_best(pair):.4f}\n")


def _best(pair: list[Tensor]) -> float:
    """Of two scores [contexts, layers, heads], chosen per head by the other half of contexts."""
    both = torch.stack(pair)
    halves = both[:, ::2], both[:, 1::2]
    total = []
    for chosen_by, judged in (halves, halves[::-1]):
        better = chosen_by.mean(1).argmin(0)
        total.append(torch.where(better[None] == 0, judged[0], judged[1]).flatten(1).mean(1))
    return float(torch.cat(total).mean())


def _sample(probed: ProbedModel, split: str, number: int, tokens: int) -> Sample:
    tasks = list(TASKS)

    def count(text: str) -> int:
        return len(probed.processor.encode_text(text))

    task = tasks[number % len(tasks)]
    return make_sample(task, number, tokens, split, followups=1, count_tokens=count)


def _fit(queries: QuerySamples, count: int) -> QueryTables:
    """As `QuerySamples.fit`, with so many centres."""
    fits = [clusters(layer.keys.float(), count) for layer in queries._drawn]
    return QueryTables(
        torch.stack([centres for centres, _ in fits]).half().numpy(),
        torch.stack([weights for _, weights in fits]).numpy(),
        queries.turning.frequency,
    )


def _judge(
    probed: ProbedModel, sample: Sample, fitted: dict[int, QueryTables], share: float
) -> dict[str, Tensor]:
    """Errors [layers, kv_heads] by the name of a score."""
    probe, seen = Probe(probed, sample), list[Rows]()

    def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
        query, result = call.query[0].detach().clone(), output[0].detach().clone()
        seen.append(Rows(query, call.key[0], call.value[0], result, call.scaling))

    with torch.no_grad():
        probe._prefill(watch, asks_positions=False)
        continuation = probe._continuation()
        probe._continue(continuation)
    context = int((probe.encoded.modality[0] == Modality.CONTEXT).nonzero().max()) + 1
    layers: dict[str, list[Tensor]] = {}
    for number, rows in enumerate(seen):
        trace, cached = probe.observer.traces[number], probe.cache.covered[number]
        assert cached.keys is not None
        assert cached.values is not None
        whole = Rows(
            torch.cat([rows.query, trace.query], dim=1), cached.keys[0], cached.values[0],
            torch.cat([rows.output, trace.output[0]]), rows.scaling,
        )  # fmt: skip
        for name, error in _layer(probed, number, whole, context, fitted, share).items():
            layers.setdefault(name, []).append(error)
    return {name: torch.stack(errors) for name, errors in layers.items()}


def _layer(
    probed: ProbedModel, layer: int, rows: Rows, context: int, fitted: dict[int, QueryTables],
    share: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Errors [kv_heads] of one layer by the name of a score."""
    grid, keep, turning = probed.view.grid, probed.recipe.keep_rule, probed.turning
    assert turning is not None
    projection = probed.view.output_projection(layer).detach()
    later = rows.query[:, context:]
    count = later.shape[1]
    judged = DecodeRows(
        query=later,
        key=rows.key[:, :context],
        value=rows.value[:, :context],
        new_key=rows.key[:, context:],
        new_value=rows.value[:, context:],
        positions=torch.arange(count),
        gradient=torch.zeros(count, *rows.output.shape[1:]),
        projection=projection,
        output_norm=(rows.output[context:].flatten(1) @ projection.T).norm(dim=-1),
        exact=torch.zeros(count, dtype=torch.bool),
        scaling=rows.scaling,
        rotary=Positions(0, context),
    )
    window = rows.query[:, context - keep.window : context]
    asked = {
        f"{count} centres": centres_of_layer(one, layer, grid, torch.device("cpu"))
        for count, one in fitted.items()
    }
    asked["window, mean"] = _as_they_are(window, context, turning, grid)
    asked["oracle"] = _as_they_are(later, context, turning, grid)
    pairs = zip(asked["window, mean"], asked[f"{CENTRES} centres"], strict=True)
    asked[f"{CENTRES} centres and window"] = [_both(*pair) for pair in pairs]
    found: dict[str, Tensor] = {}
    for pool in POOLS:
        plain = Strategy(HeadType.STATIC, pool=pool)
        for name, centres in asked.items():
            menu = (plain, replace(plain, score=CALIBRATED))
            text = torch.ones(context, dtype=torch.bool)
            losses = layer_losses(judged, window, menu, (share, 1.0), keep, {}, text, 4, centres)
            found[f"window, pool {pool}"] = losses.output[0, :, 0]
            found[f"{name}, pool {pool}"] = losses.output[1, :, 0]
    return found


def _as_they_are(
    query: Tensor, position: int, turning: Turning, grid: HeadGrid
) -> list[QueryCentres]:
    """Centres that are these very queries once they are turned to `position`."""
    still = turning.undone(query, Positions(position, 1))
    weights = torch.full(still.shape[:2], 1 / still.shape[1])
    frequency = torch.from_numpy(turning.frequency.copy())
    groups = [slice(i * grid.group, (i + 1) * grid.group) for i in range(grid.kv_heads)]
    return [QueryCentres(still[group], weights[group], frequency) for group in groups]


def _both(first: QueryCentres, second: QueryCentres) -> QueryCentres:
    """Half the weight for each."""
    centres = torch.cat([first.centres, second.centres], dim=1)
    weights = torch.cat([first.weights, second.weights], dim=1) / 2
    return QueryCentres(centres, weights, first.frequency)


if __name__ == "__main__":
    main()
