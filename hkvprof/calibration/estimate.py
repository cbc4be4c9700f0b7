"""What a calibration will take, before it runs: tokens, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hkvprof.calibration.index_fit import Moments, is_enough, spread
from hkvprof.calibration.kept import KEPT_BYTES
from hkvprof.calibration.probe import MAX_CONTINUATION, Probe, ProbedModel
from hkvprof.calibration.query_fit import fitted
from hkvprof.errors import SampleError
from hkvprof.models.attention import hooked_attention
from hkvprof.models.outline import Outline
from hkvprof.models.processing import ChatProcessor
from hkvprof.samples.read import OnError, Sample, open_images

T = TypeVar("T")

_FLOAT = 4


@dataclass(frozen=True)
class Lengths:
    """Prompt tokens by sample id, and why samples cannot be used, by id."""

    tokens: dict[str, int]
    unusable: dict[str, str]


@dataclass(frozen=True)
class Memory:
    """Bytes on the model's device while the longest sample is measured.

    `cache`: its dense keys and values; `prompt`: activations of one layer over the prompt; `reply`:
    what the pass over the reply holds for its gradients, among it one layer's keys and values
    repeated for every query head; `statistics`: attention of one KV head's group. `prompt` and
    `reply` never exist at the same time.
    """

    weights: int
    cache: int
    prompt: int
    reply: int
    statistics: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.weights + self.cache + max(self.prompt, self.reply) + self.statistics


@dataclass(frozen=True)
class Timing:
    """What one sample of `tokens` tokens took: seconds per token of the pass over samples that the
    index is fitted to (`look`) and of the one that measures heads (in a prompt that is kept, where
    there is a first pass), seconds of the fit itself."""

    tokens: int
    look: float
    fit: float
    measure: float


def lengths(processor: ChatProcessor, samples: Iterable[Sample], on_error: OnError) -> Lengths:
    """Encode all samples, images included. Raises SampleError, with "raise", for a bad one."""
    tokens, unusable = {}, {}
    for sample in samples:
        try:
            tokens[sample.id] = processor.encode([tuple(open_images(sample))]).tokens
        except SampleError as error:
            if on_error == "raise":
                raise
            unusable[sample.id] = str(error)
    if not tokens:
        raise SampleError(f"no sample could be used: {next(iter(unusable.values()))}")
    return Lengths(tokens, unusable)


def memory(model: Outline, longest: int) -> Memory:
    """Peak bytes for a prompt of `longest` tokens, counted from shapes; a vision tower's own
    activations and the allocator's reserve come on top."""
    grid, size, new = model.grid, model.itemsize, MAX_CONTINUATION
    layer_cache = 2 * grid.kv_heads * grid.head_dim * (longest + new) * size
    per_row = 4 * model.intermediate + 6 * model.hidden
    # Of the layer where the gradients are: its keys and values repeated for every query head, and
    # the gradients of both, before and after they are summed over the group.
    held = 5 * grid.group * layer_cache
    rows = new * (per_row * model.layers * size + 4 * model.vocabulary * _FLOAT)
    return Memory(
        weights=model.weight_bytes,
        cache=model.layers * layer_cache,
        prompt=longest * per_row * size,
        reply=held + rows,
        statistics=4 * grid.group * 64 * (longest + new) * _FLOAT,
    )


def time_one(probed: ProbedModel, sample: Sample) -> Timing:
    """Do with one sample what a calibration does with all of them, after a pass that warms up."""
    moments, queries = Moments(probed.view.grid), probed.new_queries()
    with hooked_attention(probed.model):
        Probe(probed, sample).add_moments(Moments(probed.view.grid))
        probe = Probe(probed, sample)
        look, _ = _timed(lambda: probe.add_moments(moments, queries))
        sizes = probed.recipe.index_sizes
        if not sizes or not probe.pause():
            probe = Probe(probed, sample)
        fit, tables = _timed(lambda: fitted(moments, queries, sizes) if sizes else None)
        measure, row = _timed(lambda: probe.measure(tables))
    return Timing(row.tokens, look / row.tokens, fit, measure / row.tokens)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def middle(known: Lengths, samples: Sequence[Sample]) -> Sample:
    """The usable sample of median length."""
    usable = [sample for sample in samples if sample.id in known.tokens]
    return sorted(usable, key=lambda sample: known.tokens[sample.id])[len(usable) // 2]


def fitted_tokens(known: Lengths, samples: Sequence[Sample]) -> int:
    """Tokens of the samples that the index will be fitted to."""
    used = total = 0
    for sample in spread(sorted(samples, key=lambda sample: sample.id)):
        if is_enough(used, total):
            break
        if sample.id in known.tokens:
            used, total = used + 1, total + known.tokens[sample.id]
    return total


def kept_tokens(model: Outline, fitted: int) -> int:
    """Of the tokens that the index will be fitted to, those whose prompts are then kept."""
    return min(fitted, KEPT_BYTES // model.grid.token_bytes(model.itemsize))


def seconds(timing: Timing, fitted: int, measured: int, again: int) -> float:
    """Time for so many tokens to fit the index to (0: it is there), to measure, and, of the latter,
    to read once more."""
    fit = timing.fit if fitted else 0.0
    return timing.look * (fitted + again) + fit + timing.measure * measured
