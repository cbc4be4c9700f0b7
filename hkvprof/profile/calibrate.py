"""The calibration loop: samples in, profile out.

Per sample: prefill under the model's own attention, teacher-force the reply and the follow-up turns
in one pass, and reduce every layer to small rows of figures. Rows are merged in the order of their
sample ids, in float64, so that the order of samples does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import hkvprof
from hkvprof.artifact import Profile, ProjectedIndexTables
from hkvprof.errors import SampleError, UsageError
from hkvprof.heads import KeepRule, Modality, Strategy
from hkvprof.models.adapter import ModelView, output_projection, view_model
from hkvprof.models.attention import AttentionCall, hooked_attention
from hkvprof.models.forward import last_row_only
from hkvprof.models.processing import ChatProcessor
from hkvprof.policy.budget import INFEASIBLE, token_floor
from hkvprof.profile import classify
from hkvprof.profile.continuation import Continuation, build_continuation
from hkvprof.profile.fit import Moments, tables_of_layer
from hkvprof.profile.observe import ObservedCache, Observer
from hkvprof.profile.samples import Sample, open_images
from hkvprof.profile.statistics import (
    DecodeRows,
    layer_losses,
    sample_text_rows,
    text_sparsity,
)

T = TypeVar("T")
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
Recipe = Literal["paper", "measured"]

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.065, 0.08, 0.10, 0.12, 0.15, 0.20, 0.30, 0.50, 0.70, 1.0)
KAPPAS = (0.02, 0.05, 0.10, 0.20)
THETA_KAPPA = 0.10
FIT_SAMPLES = 64
FIT_TOKENS = 65_536
"""The index is fitted on up to FIT_SAMPLES samples, but at least 16 and then no more than these."""
MAX_REPLY_TOKENS = 48
MAX_CONTINUATION = 192


@dataclass(frozen=True)
class SampleRow:
    """What one sample contributes; L layers, see statistics for the terms."""

    id: str
    task: str
    tokens: int
    sparsity: NDArray[np.float32]
    losses: NDArray[np.float32]


def calibrate(
    model: Any,
    processor: ChatProcessor,
    samples: Sequence[Sample],
    *,
    recipe: Recipe = "measured",
    theta: float = 0.9,
    budget: float = 0.10,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    track: Track | None = None,
    keep: KeepRule | None = None,
) -> Profile:
    """Measure every KV head of `model` on `samples` and decide types and budgets.

    `recipe="measured"` chooses strategy and ratio per head to minimise the loss at the head's
    output and at the reply (docs/method.md); `"paper"` applies HybridKV's rule: static when
    text-centric sparsity reaches `theta`. `budget` is the profile's default share. With
    `on_error="skip"`, samples that cannot be used are left out; the provenance counts and names
    them (`skipped`, `skipped_ids`).
    `track(iterable, description, total)` may wrap the loops to show progress.

    Raises ModelError for unsupported models, SampleError for bad samples, UsageError for options
    out of range.
    """
    _check_options(recipe, theta, budget, on_error, samples)
    keep = keep or (KeepRule() if recipe == "paper" else classify.MEASURED_KEEP)
    run = _Run(model, processor, recipe, keep, on_error, track or _untracked)
    ordered = sorted(samples, key=lambda sample: sample.id)
    tables = None
    with hooked_attention(model):
        if recipe == "measured":
            tables = run.fit(_spread(ordered)[:FIT_SAMPLES])
        rows = run.rows(ordered, tables)
    return _build_profile(run, rows, tables, theta=theta, budget=budget, seed=seed)


def _check_options(
    recipe: str, theta: float, budget: float, on_error: str, samples: Sequence[Sample]
) -> None:
    if recipe not in ("paper", "measured"):
        raise UsageError(f"unknown recipe {recipe!r}: expected paper or measured")
    if not 0 < theta <= 1:
        raise UsageError(f"theta must lie in (0, 1], found {theta}")
    if not 0 < budget <= 1:
        raise UsageError(f"the default budget must be a share in (0, 1], found {budget}")
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
    if not samples:
        raise SampleError("there are no samples to calibrate on: expected at least one")


def _untracked(iterable: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return iterable


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in an order of which every beginning is spread evenly over the list."""
    golden = (math.sqrt(5) - 1) / 2
    places = sorted(range(len(samples)), key=lambda i: (i * golden) % 1.0)
    return [samples[i] for i in places]


class _Run:
    """One calibration run over one model."""

    def __init__(
        self,
        model: Any,
        processor: ChatProcessor,
        recipe: Recipe,
        keep: KeepRule,
        on_error: str,
        track: Track,
    ) -> None:
        self.model, self.processor, self.recipe, self.keep = model, processor, recipe, keep
        self.on_error, self.track = on_error, track
        self.view: ModelView = view_model(model)
        self.menu: tuple[Strategy, ...] = (
            classify.PAPER_MENU if recipe == "paper" else classify.MEASURED_MENU
        )
        self.skipped: dict[str, str] = {}

    # -- passes over the samples ------------------------------------------------------------

    def fit(self, samples: Sequence[Sample]) -> ProjectedIndexTables:
        """First pass, a subset: fit the projected index."""
        moments = Moments(self.view.grid)
        for number, sample in enumerate(self.track(samples, "fitting the index", len(samples))):
            if number >= 16 and moments.key_rows.max() >= FIT_TOKENS:
                break
            self._guarded(sample, lambda probe: probe.add_moments(moments))
        if not bool(moments.key_rows.all()):
            raise SampleError(f"no sample could be used: {self._first_reason()}")
        sizes = tuple(sorted({s.bits for s in self.menu if s.index == "projected"}))
        return moments.fit(sizes)

    def rows(
        self, samples: Sequence[Sample], tables: ProjectedIndexTables | None
    ) -> list[SampleRow]:
        """Second pass, all samples: sparsity and loss curves."""
        rows = []
        for sample in self.track(samples, "measuring heads", len(samples)):
            row = self._guarded(sample, lambda probe: probe.measure(tables))
            if row is not None:
                rows.append(row)
        if not rows:
            raise SampleError(f"no sample could be used: {self._first_reason()}")
        return sorted(rows, key=lambda row: row.id)

    def _guarded(self, sample: Sample, work: Callable[[_Probe], T]) -> T | None:
        if sample.id in self.skipped:
            return None
        try:
            return work(_Probe(self, sample))
        except SampleError as error:
            if self.on_error != "skip":
                raise
            self.skipped[sample.id] = str(error)
            return None

    def _first_reason(self) -> str:
        return next(iter(self.skipped.values()), "none was given")


class _Probe:
    """One sample on the model: prefill, reply, and what the layers showed."""

    def __init__(self, run: _Run, sample: Sample) -> None:
        self.run, self.sample = run, sample
        opened = replace(sample, messages=tuple(open_images(sample)))
        self.encoded = run.processor.encode([opened.messages])
        self.text = (self.encoded.modality[0] == Modality.TEXT).to(run.model.device)
        self.observer = Observer(run.keep.window)
        self.cache = ObservedCache(run.view, self.observer)
        if self.encoded.tokens < run.keep.floor_tokens + run.keep.window:
            raise SampleError(
                f"sample {sample.id}: the prompt has {self.encoded.tokens} tokens, too few to "
                f"calibrate on (at least {run.keep.floor_tokens + run.keep.window})"
            )
        self.opened = opened

    # -- first pass -------------------------------------------------------------------------

    def add_moments(self, moments: Moments) -> None:
        """Queries of the rows that decode, and prompt keys.

        Queries of prompt rows look for other things: leaving them out raised accuracy at 10% from
        0.72 to 0.77 on tinyvl's calibration split (docs/experiments.md).
        """
        with torch.no_grad():
            continuation = self._prefill(None)
            self._continue(continuation)
        for layer, trace in self.observer.traces.items():
            keys = self.cache.covered[layer].keys
            assert keys is not None
            moments.add_keys(layer, keys[0, :, : self.encoded.tokens])
            moments.add_queries(layer, trace.query[:, continuation.rows], trace.scaling)

    # -- second pass ------------------------------------------------------------------------

    def measure(self, tables: ProjectedIndexTables | None) -> SampleRow:
        """Sparsity during prefill; losses over the teacher-forced continuation."""
        rows = sample_text_rows(self.text)
        sparsity: dict[int, Tensor] = {}

        def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
            sparsity[layer] = text_sparsity(
                call.query[0][:, rows], call.key[0], rows, call.scaling, KAPPAS
            )

        with torch.no_grad():
            continuation = self._prefill(watch)
        with torch.enable_grad():
            logits = self._continue(continuation)
            margins = _margins(logits, continuation)
            # Gradients for the traced outputs alone: none are left on the model's parameters.
            margins.sum().backward(inputs=[t.output for t in self.observer.traces.values()])
        with torch.no_grad():
            losses = [
                self._layer_losses(layer, continuation, margins, tables)
                for layer in range(self.run.view.grid.layers)
            ]
        return SampleRow(
            id=self.sample.id,
            task=self.sample.task,
            tokens=self.encoded.tokens,
            sparsity=torch.stack([sparsity[i] for i in sorted(sparsity)], dim=1).cpu().numpy(),
            losses=torch.stack(losses, dim=2).cpu().numpy(),
        )

    def _layer_losses(
        self,
        layer: int,
        continuation: Continuation,
        margins: Tensor,
        tables: ProjectedIndexTables | None,
    ) -> Tensor:
        """[3 terms, strategies, kv_heads, ratios] of one layer."""
        trace, module = self.observer.traces[layer], self.run.view.attention[layer]
        cached = self.cache.covered[layer]
        assert cached.keys is not None
        assert cached.values is not None
        keys, values = cached.keys[0].detach(), cached.values[0].detach()
        prompt, device = self.encoded.tokens, keys.device
        rows = continuation.rows.to(device)
        projection = output_projection(module).detach()
        output = trace.output[0].detach()[rows].float()
        assert trace.output.grad is not None, "the reply's margin does not depend on this layer"
        judged = DecodeRows(
            query=trace.query[:, rows],
            key=keys[:, :prompt],
            value=values[:, :prompt],
            new_key=keys[:, prompt:],
            new_value=values[:, prompt:],
            positions=rows,
            gradient=trace.output.grad[0][rows] / margins.abs().clamp(min=1)[:, None, None],
            projection=projection,
            output_norm=(output.flatten(1) @ projection.float().T).norm(dim=-1),
            exact=continuation.exact.to(device),
            scaling=trace.scaling,
        )
        losses = layer_losses(
            judged,
            self.observer.window_query[layer],
            self.run.menu,
            RATIOS,
            self.run.keep,
            tables_of_layer(tables, layer, device) if tables else {},
            self.text,
            keys.element_size(),
        )
        return torch.stack([losses.output, losses.square, losses.reply])

    # -- the model --------------------------------------------------------------------------

    def _prefill(self, watch: Any) -> Continuation:
        """Run the prompt; return what follows it (the given reply, else the model's own)."""
        model = self.run.model
        self.observer.on_prefill = watch
        with self.observer.phase("prefill"):
            inputs = self.encoded.to(model.device, model.dtype)
            output = model(**inputs, past_key_values=self.cache, **last_row_only(model))
        reply = self.sample.reply
        if reply is None:
            reply = self._greedy(output.logits[:, -1:].argmax(-1))
        return build_continuation(self.run.processor, self.opened, reply, MAX_CONTINUATION)

    def _greedy(self, token: Tensor) -> str:
        """The model's own reply, dense and greedy; leaves the cache as it was."""
        model, end = self.run.model, self.run.processor.tokenizer.eos_token_id
        reply: list[int] = []
        while len(reply) < MAX_REPLY_TOKENS and int(token) != end:
            reply.append(int(token))
            output = model(input_ids=token, past_key_values=self.cache)
            token = output.logits[:, -1:].argmax(-1)
        self.cache.crop(-len(reply))
        return self.run.processor.decode(reply)

    def _continue(self, continuation: Continuation) -> Tensor:
        """Teacher-force the continuation; logits [T, vocabulary]."""
        model = self.run.model
        with self.observer.phase("trace"):
            ids = continuation.ids[None].to(model.device)
            output = model(input_ids=ids, past_key_values=self.cache)
        return output.logits[0]


def _margins(logits: Tensor, continuation: Continuation) -> Tensor:
    """Log-odds of every reply token against all others, per judged row."""
    rows = logits[continuation.rows.to(logits.device)].float()
    targets = continuation.targets.to(logits.device)[:, None]
    log_p = rows.log_softmax(dim=-1).gather(-1, targets)[:, 0]
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))


# -- merging --------------------------------------------------------------------------------


def _build_profile(
    run: _Run,
    rows: list[SampleRow],
    tables: ProjectedIndexTables | None,
    *,
    theta: float,
    budget: float,
    seed: int,
) -> Profile:
    grid = run.view.grid
    ratios = np.array(RATIOS, dtype=np.float32)
    stacked = np.stack([row.sparsity for row in rows]).astype(np.float64)
    mean, std = stacked.mean(axis=0), stacked.std(axis=0)
    curves = classify.Curves(*_mean_losses(rows))
    loss = classify.planning_loss(curves, ratios)
    tokens = [row.tokens for row in rows]
    floor = token_floor(run.keep.floor_tokens, math.ceil(float(np.mean(tokens))))
    if run.recipe == "paper":
        at = KAPPAS.index(THETA_KAPPA)
        types = classify.classify_by_sparsity(
            mean[at].astype(np.float32), std[at].astype(np.float32), len(rows), theta, grid
        )
        chosen = classify.allocate_by_sparsity(
            types, mean[at].astype(np.float32), budget, floor, grid
        )
    else:
        chosen = classify.allocate_measured(loss, ratios, budget, floor)
    return Profile(
        fingerprint=run.view.fingerprint,
        recipe=run.recipe,
        default_budget=budget,
        keep=run.keep,
        strategies=run.menu,
        kappas=KAPPAS,
        ratios=ratios,
        strategy=chosen.strategy,
        budget=chosen.ratio,
        sparsity_mean=mean.astype(np.float32),
        sparsity_std=std.astype(np.float32),
        loss=loss,
        output_error=curves.output.astype(np.float32),
        index=tables,
        provenance=_provenance(run, rows, theta=theta, seed=seed),
    )


def _mean_losses(rows: list[SampleRow]) -> NDArray[np.float64]:
    """[3, strategies, layers, kv_heads, ratios]: means over the samples where a point fits.

    A point that does not fit most samples is INFEASIBLE.
    """
    stacked = np.stack([row.losses for row in rows]).astype(np.float64)
    fits = stacked[:, :1] < INFEASIBLE
    count = fits.sum(axis=0)
    total = np.where(fits, stacked, 0).sum(axis=0)
    mean = total / np.maximum(count, 1)
    return np.where(count * 2 > len(rows), mean, float(INFEASIBLE))


def _provenance(run: _Run, rows: list[SampleRow], *, theta: float, seed: int) -> dict[str, Any]:
    import transformers

    tasks = [row.task for row in rows]
    tokens = [row.tokens for row in rows]
    return {
        "samples": len(rows),
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "tokens": {
            "min": min(tokens),
            "mean": round(float(np.mean(tokens)), 1),
            "max": max(tokens),
        },
        "skipped": len(run.skipped),
        **({"skipped_ids": sorted(run.skipped)} if run.skipped else {}),
        "theta": theta,
        "theta_kappa": THETA_KAPPA,
        "seed": seed,
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "versions": {
            "hkvprof": hkvprof.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
