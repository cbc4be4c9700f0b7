"""What the projected index finds of keys with biases: as part of a constant mean, and turned.

    python -m tools.studies.key_bias CHECKPOINT [--fit 3] [--samples 2] [--tokens 1500] [--bits 32]

Per layer the attention mass, in rows that decode replies, on a share of the prompt's tokens chosen
by an index that takes the key projection's bias for a constant, by one that turns it with
positions, and by exact keys; reranked by 64 exact keys in the second pair of columns. Prompts are
of the set `longtext`; the index is fitted on other prompts than it is judged on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

import hkvprof
from hkvprof.calibration.index_fit import Moments, tables_of_layer
from hkvprof.calibration.probe import Probe, ProbedModel
from hkvprof.evaluate.longtext import TASKS, make_sample
from hkvprof.models.attention import hooked_attention
from hkvprof.models.rotary import rotating_keys
from hkvprof.selection.index import HeadTables, ProjectedIndex, Ranking
from hkvprof.selection.rotary import Positions, RotatingKeys

RERANK = 64
COLUMNS = ("constant", "turned", "constant, reranked", "turned, reranked", "exact keys")


@dataclass
class Seen:
    """Stands in for Moments: keeps a sample's keys, positions and scaled queries by layer."""

    rotating: RotatingKeys | None
    keys: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    positions: Positions | None = None

    def add_keys(self, layer: int, key: Tensor, sample: str, positions: Positions | None) -> None:
        """As `Moments.add_keys`."""
        self.keys[layer], self.positions = key.float().clone(), positions

    def add_queries(self, layer: int, query: Tensor, scaling: float) -> None:
        """As `Moments.add_queries`."""
        self.queries[layer] = query.float() * scaling


def main() -> None:
    """Fit both indexes, print what they find."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--fit", type=int, default=3, help="prompts that indexes are fitted on")
    parser.add_argument("--samples", type=int, default=2, help="prompts that they are judged on")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.05)
    args = parser.parse_args()
    model, processor = hkvprof.load_model(args.model, dtype="bfloat16")
    probed = ProbedModel.of(model, processor, hkvprof.Recipe())
    view = probed.view
    rotating = rotating_keys(model, view)
    if rotating is None:
        raise SystemExit(f"{args.model}: no key biases that turn")
    both = Moments(view.grid), Moments(view.grid, rotating)
    with hooked_attention(model):
        for seen in (_seen(probed, rotating, "calibration", i, args) for i in range(args.fit)):
            for layer, keys in seen.keys.items():
                for moments in both:
                    moments.add_keys(layer, keys, f"{id(seen)}", seen.positions)
                    moments.add_queries(layer, seen.queries[layer], 1.0)
        judged = [_seen(probed, rotating, "heldout", i, args) for i in range(args.samples)]
    fitted = [moments.fit((args.bits,)) for moments in both]
    sys.stdout.write("layer: " + " | ".join(COLUMNS) + "\n")
    rows = []
    for layer in range(view.grid.layers):
        tables = [tables_of_layer(one, layer, torch.device("cpu")) for one in fitted]
        found = torch.stack([_layer(seen, layer, tables, args) for seen in judged]).mean(0)
        rows.append(found)
        sys.stdout.write(f"{layer}: " + " | ".join(f"{x:.3f}" for x in found.tolist()) + "\n")
        sys.stdout.flush()
    mean = torch.stack(rows).mean(0).tolist()
    sys.stdout.write("mean: " + " | ".join(f"{x:.3f}" for x in mean) + "\n")
    bias, turning = fitted[1].key_bias, len(rotating.frequency)
    assert bias is not None
    pairs = (bias[..., :turning] ** 2 + bias[..., turning : 2 * turning] ** 2 > 0).sum(-1)
    sys.stdout.write(f"pairs per head: mean {pairs.mean():.1f}, most {pairs.max()}\n")


def _seen(
    probed: ProbedModel, rotating: RotatingKeys, split: str, number: int, args: argparse.Namespace
) -> Seen:
    """Keys and queries of one prompt of `longtext`."""
    tasks = list(TASKS)
    task = tasks[number % len(tasks)]

    def count(text: str) -> int:
        return len(probed.processor.encode_text(text))

    sample = make_sample(task, number, args.tokens, split, followups=1, count_tokens=count)
    seen = Seen(rotating)
    Probe(probed, sample).add_moments(seen)  # type: ignore[arg-type]
    return seen


def _layer(
    seen: Seen,
    layer: int,
    tables: list[dict[tuple[int, int], HeadTables]],
    args: argparse.Namespace,
) -> Tensor:
    """Mean over heads and rows of the mass that is found, one figure for each of COLUMNS."""
    keys, queries = seen.keys[layer], seen.queries[layer]
    group, hot = len(queries) // len(keys), max(1, int(args.share * keys.shape[1]))
    heads = []
    for head, own in enumerate(keys):
        query = queries[head * group : (head + 1) * group].transpose(0, 1)
        logits = query @ own.T
        mass = logits.softmax(-1).mean(1)
        found = []
        for more in (0, RERANK):
            for one in tables:
                index = ProjectedIndex.build(own, one[head, args.bits], seen.positions)
                best = Ranking(index.score(query, 1.0), logits).best(hot, more)
                found.append(mass.gather(1, best).sum(1).mean())
        found.append(mass.topk(hot).values.sum(1).mean())
        heads.append(torch.stack(found))
    return torch.stack(heads).mean(0)


if __name__ == "__main__":
    main()
