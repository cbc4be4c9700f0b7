"""One sample on the model: prefill, reply, and what the layers showed."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hkvprof.calibration.attention import (
    Phase,
    SampleStatistics,
    TextStatistics,
    compared,
    layer_drift,
    text_statistics,
    token_classes,
)
from hkvprof.calibration.continuation import Continuation, answered, build_continuation
from hkvprof.calibration.fitted import FittedTables
from hkvprof.calibration.index_fit import Moments, tables_of_layer
from hkvprof.calibration.losses import DecodeRows, layer_losses
from hkvprof.calibration.observe import ObservedCache, ObservedLayer, Observer, Watch
from hkvprof.calibration.query_fit import QuerySamples, centres_of_layer
from hkvprof.calibration.recipe import Recipe
from hkvprof.calibration.rows import Conditions, SampleRow
from hkvprof.errors import SampleError
from hkvprof.heads import CALIBRATED, Modality, Strategy
from hkvprof.models.adapter import ModelView, view_model
from hkvprof.models.approval import require_approval
from hkvprof.models.attention import AttentionCall
from hkvprof.models.calls import last_row_only, rope_holder, with_cache
from hkvprof.models.outline import sizes_of
from hkvprof.models.processing import ChatProcessor, Encoded
from hkvprof.models.rotary import turning, watching_positions
from hkvprof.models.weights import passing_gradients, require_gradients
from hkvprof.models.wrappers import unwrap
from hkvprof.profile.tables import PAIRS
from hkvprof.samples.read import Sample, open_images
from hkvprof.selection.rotary import Positions, Turning
from hkvprof.selection.sparsity import sample_text_rows

VISION = (Modality.IMAGE, Modality.VIDEO)
MAX_CONTINUATION = 192


@dataclass(frozen=True)
class ProbedModel:
    """The model that samples are probed on, its processor and geometry, and the recipe.

    `turning` says how its queries turn, where a score of the recipe's menu asks; None also where
    nobody knows: such scores are then left out. `answered` holds samples whose replies were
    generated, so that a second pass need not do it again.
    """

    model: Any
    processor: ChatProcessor
    recipe: Recipe
    view: ModelView
    turning: Turning | None = None
    answered: dict[str, Sample] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, processor: ChatProcessor, recipe: Recipe) -> ProbedModel:
        """Raises ModelError for a model that is not supported, or not by the recipe."""
        view = view_model(model)
        require_approval(view)
        if recipe.name == "measured":
            require_gradients(unwrap(model))
        asked = any(strategy.score == CALIBRATED for strategy in recipe.strategies)
        return cls(model, processor, recipe, view, turning(model, view) if asked else None)

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The recipe's menu, as far as it can be measured on this model."""
        menu = self.recipe.strategies
        known = self.turning is not None
        return tuple(one for one in menu if known or one.score != CALIBRATED)

    def new_queries(self) -> QuerySamples | None:
        """What gathers queries for the scores that ask them; None where none does."""
        return None if self.turning is None else QuerySamples(self.view.grid, self.turning)

    @property
    def conditions(self) -> Conditions:
        """What rows that are measured now depend on."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        conditions = Conditions.of(
            self.view.fingerprint, dtype, self.recipe, sizes_of(unwrap(self.model))
        )
        return replace(conditions, strategies=self.strategies)


def content_digest(sample: Sample, encoded: Encoded) -> str:
    """Of what a measurement depends on: tokens and pixels of the prompt, given replies, turns."""
    said = json.dumps([sample.reply, [vars(turn) for turn in sample.followups]])
    digest = hashlib.sha256(said.encode())
    for name in sorted(encoded.inputs):
        digest.update(name.encode())
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


class Probe:
    """One sample on the model: prefill, reply, and what the layers showed.

    `digest` is that of the sample as it was given (`content_digest`). Raises SampleError for images
    that cannot be read and prompts that are too short.
    """

    def __init__(self, probed: ProbedModel, sample: Sample) -> None:
        self.probed, self.sample = probed, sample
        self.keep = probed.recipe.keep_rule
        opened = replace(sample, messages=tuple(open_images(sample)))
        self.encoded = probed.processor.encode([opened.messages])
        self.text = (self.encoded.modality[0] == Modality.TEXT).to(probed.model.device)
        self.observer = Observer(self.keep.window)
        self.cache = ObservedCache(probed.view, self.observer)
        if self.encoded.tokens < self.keep.floor_tokens + self.keep.window:
            raise SampleError(
                f"sample {sample.id}: the prompt has {self.encoded.tokens} tokens, too few to "
                f"calibrate on (at least {self.keep.floor_tokens + self.keep.window})"
            )
        self.opened = opened
        self.positions: Positions | None = None
        """Of the prompt, as rotary embeddings saw them, where somebody asks."""
        self.later: Positions | None = None
        """The same of what follows it."""
        self.digest = content_digest(sample, self.encoded)
        self._shown: dict[int, TextStatistics] = {}
        self._said: Continuation | None = None
        self._paused: tuple[list[torch.device], Any] | None = None
        """Where layers keep their keys, and Qwen-VL's position offset, which is on the model."""

    # -- first pass -------------------------------------------------------------------------

    def add_moments(self, moments: Moments, queries: QuerySamples | None = None) -> None:
        """Queries of the rows that decode, and prompt keys; to `queries` those of users' turns too.

        Queries of prompt rows look for other things: an index fitted to them too is worse
        (docs/experiments.md).
        """
        asks_positions = moments.rotating is not None or queries is not None
        with torch.no_grad():
            self._prefill(self._look_at_text(), asks_positions)
            continuation = self._continuation()
            self._continue(continuation, asks_positions)
        for layer, trace in self.observer.traces.items():
            keys = self.cache.covered[layer].keys
            assert keys is not None
            own = keys[0, :, : self.encoded.tokens]
            moments.add_keys(layer, own, self.sample.id, self.positions)
            moments.add_queries(layer, trace.query[:, continuation.rows], trace.scaling)
            if queries is not None:
                assert self.later is not None
                queries.add(layer, trace.query, self.later, self.sample.id)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return sum(x.nbytes for layer in self.cache.covered for x in (layer.keys, layer.values))

    def pause(self) -> bool:
        """After the first pass: keep what the prompt left for the second one, keys and values in
        host memory, and let go of all else. False where layers cannot go back to the prompt."""
        if not all(isinstance(layer, ObservedLayer) for layer in self.cache.layers):
            return False
        self._paused = [layer.keys.device for layer in self.cache.covered], self._rope_deltas
        self.cache.crop(self.encoded.tokens - self.cache.get_seq_length())
        self._place_cache([torch.device("cpu")] * len(self.cache.covered))
        self.observer.traces.clear()
        self.encoded = replace(self.encoded, inputs={"input_ids": self.encoded.inputs["input_ids"]})
        self.opened = replace(self.opened, messages=())
        return True

    # -- second pass ------------------------------------------------------------------------

    def _resume(self, paused: tuple[list[torch.device], Any]) -> None:
        """Be as after the prompt."""
        devices, deltas = paused
        self._place_cache(devices)
        if (holder := rope_holder(self.probed.model)) is not None:
            holder.rope_deltas = deltas

    def _place_cache(self, devices: list[torch.device]) -> None:
        for layer, device in zip(self.cache.covered, devices, strict=True):
            layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)

    @property
    def _rope_deltas(self) -> Any:
        return getattr(rope_holder(self.probed.model), "rope_deltas", None)

    def measure(self, tables: FittedTables | None) -> SampleRow:
        """What text rows attend to during prefill; losses and drift over the continuation."""
        if self._paused is None:
            with torch.no_grad():
                asks = tables is not None and tables.go_by_positions
                self._prefill(self._look_at_text(), asks)
        else:
            self._resume(self._paused)
        held, shown = self.encoded.modality[0], [self._shown[i] for i in sorted(self._shown)]
        losses, drift, pairs = self._after_prompt(tables)
        return SampleRow(
            id=self.sample.id,
            task=self.sample.task,
            tokens=self.encoded.tokens,
            sparsity=_stacked([layer.sparsity for layer in shown]),
            losses=losses,
            statistics=SampleStatistics(
                modality_mass=_stacked([layer.mass for layer in shown]),
                entropy=_stacked([layer.entropy[None] for layer in shown])[0],
                drift=drift,
                compared=pairs,
            ),
            digest=self.digest,
            vision_tokens=int(sum((held == kind).sum() for kind in VISION)),
            context_tokens=int((held == Modality.CONTEXT).sum()),
        )

    def _after_prompt(
        self, tables: FittedTables | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """Losses [3 terms, strategies, layers, kv_heads, ratios], drift [PAIRS, layers,
        query_heads], and which of PAIRS there are."""
        grid, menu = self.probed.view.grid, self.probed.strategies
        if self.probed.recipe.ratios == (1.0,):  # the whole prompt loses nothing
            return (
                np.zeros((3, len(menu), grid.layers, grid.kv_heads, 1), np.float32),
                np.zeros((len(PAIRS), grid.layers, grid.query_heads), np.float32),
                np.zeros(len(PAIRS), np.uint8),
            )
        continuation = self._continuation()
        with torch.enable_grad(), passing_gradients(unwrap(self.probed.model)):
            logits = self._continue(continuation)
            margins = _margins(logits, continuation)
            # Gradients for the traced outputs alone: none are left on the model's parameters.
            margins.sum().backward(inputs=[t.output for t in self.observer.traces.values()])
        with torch.no_grad():
            layers = range(grid.layers)
            losses = [self._layer_losses(i, continuation, margins, tables) for i in layers]
            phases = [self._phases(i, continuation) for i in layers]
            drift = [self._layer_drift(i, phases[i]) for i in layers]
        pairs = compared(phases[0]).numpy().astype(np.uint8)
        return torch.stack(losses, dim=2).cpu().numpy(), _stacked(drift), pairs

    def _phases(self, layer: int, continuation: Continuation) -> list[Phase]:
        """The prompt's last rows, those that decode the reply, those of later questions."""
        window, trace = self.observer.window_query[layer], self.observer.traces[layer]
        tokens, count = self.encoded.tokens, window.shape[1]
        turns = continuation.exact.nonzero()[:, 0].tolist()  # the last row of every later question
        reply, later = continuation.rows.split(
            [turns[0], len(continuation.rows) - turns[0]] if turns else [len(continuation.rows), 0]
        )
        device = window.device
        return [
            Phase(window, torch.arange(tokens - count, tokens, device=device)),
            *(Phase(trace.query[:, at], tokens + at.to(device)) for at in (reply, later)),
        ]

    def _layer_drift(self, layer: int, phases: list[Phase]) -> Tensor:
        keys, scaling = self.cache.covered[layer].keys, self.observer.traces[layer].scaling
        assert keys is not None
        return layer_drift(phases, keys[0], self.encoded.tokens, scaling, self.keep)

    def _layer_losses(
        self,
        layer: int,
        continuation: Continuation,
        margins: Tensor,
        tables: FittedTables | None,
    ) -> Tensor:
        """[3 terms, strategies, kv_heads, ratios] of one layer."""
        trace, cached = self.observer.traces[layer], self.cache.covered[layer]
        assert cached.keys is not None
        assert cached.values is not None
        grid, queries = self.probed.view.grid, tables.queries if tables else None
        keys, values = cached.keys[0].detach(), cached.values[0].detach()
        prompt, device = self.encoded.tokens, keys.device
        rows = continuation.rows.to(device)
        projection = self.probed.view.output_projection(layer).detach()
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
            output_norm=_projected(output, projection, grid.group).norm(dim=-1),
            exact=continuation.exact.to(device),
            scaling=trace.scaling,
            rotary=self.positions,
        )
        losses = layer_losses(
            judged,
            self.observer.window_query[layer],
            self.probed.strategies,
            self.probed.recipe.ratios,
            self.keep,
            tables_of_layer(tables.index, layer, device) if tables else {},
            self.text,
            keys.element_size(),
            centres_of_layer(queries, layer, grid, device),
        )
        return torch.stack([losses.output, losses.square, losses.reply])

    # -- the model --------------------------------------------------------------------------

    def _look_at_text(self) -> Watch:
        """What keeps statistics of the rows of text."""
        rows = sample_text_rows(self.text)
        classes = token_classes(self.encoded.modality[0].to(self.text.device), self.keep)

        def watch(layer: int, call: AttentionCall, output: Tensor) -> None:
            self._shown[layer] = text_statistics(
                call.query[0], call.key[0], rows, call.scaling, self.probed.recipe.kappas, classes,
                self.keep.recent,
            )  # fmt: skip

        return watch

    def _prefill(self, watch: Watch, asks_positions: bool) -> None:
        """Run the prompt; `asks_positions` where an index goes by them."""
        model = self.probed.model
        self.observer.on_prefill = watch
        told: list[Positions] = []
        with self._watching(told, asks_positions), self.observer.phase("prefill"):
            inputs = self.encoded.to(model.device, model.dtype)
            output = model(**inputs, **with_cache(model, self.cache), **last_row_only(model))
        self.next_token = output.logits[:, -1:].argmax(-1)
        self.positions = told[-1] if told else None

    def _watching(self, told: list[Positions], asks: bool) -> AbstractContextManager[None]:
        """Within: positions of every pass join `told`, where somebody asks."""

        def see(positions: Tensor, rows: int) -> None:
            told.append(Positions.of(positions[:, 0]))

        if not asks:
            return nullcontext()
        return watching_positions(self.probed.model, self.probed.view, see)

    def _continuation(self) -> Continuation:
        """What follows the prompt: the given reply, else the model's own."""
        if self._said is None:
            self._said = self._say()
        return self._said

    def _say(self) -> Continuation:
        own = self.probed.recipe.replies == "own"
        if self.opened.reply is None or own:
            said = self.probed.answered.get(self.sample.id)
            if said is None:
                said = answered(
                    self.probed.model, self.probed.processor, self.opened, self.cache,
                    self.next_token, later=own,
                )  # fmt: skip
                self.probed.answered[self.sample.id] = replace(said, messages=())
            self.opened = replace(self.opened, reply=said.reply, followups=said.followups)
        assert self.opened.reply is not None
        return build_continuation(
            self.probed.processor, self.opened, self.opened.reply, MAX_CONTINUATION
        )

    def _continue(self, continuation: Continuation, asks_positions: bool = False) -> Tensor:
        """Teacher-force the continuation; logits [T, vocabulary]."""
        model, told = self.probed.model, list[Positions]()
        with self._watching(told, asks_positions), self.observer.phase("trace"):
            ids = continuation.ids[None].to(model.device)
            output = model(input_ids=ids, **with_cache(model, self.cache))
        self.later = told[-1] if told else None
        return output.logits[0]


def _stacked(layers: list[Tensor]) -> NDArray[np.float32]:
    """[figures, layers, heads] on the host, of [figures, heads] each."""
    return torch.stack(layers, dim=1).cpu().numpy()


def _projected(
    output: Float[Tensor, "rows query_heads dim"], projection: Tensor, group: int
) -> Float[Tensor, "rows hidden"]:
    """A layer's attention output, a few heads at a time: W_O in float32 would be a large copy."""
    total = output.new_zeros(len(output), len(projection))
    step = group * output.shape[-1]
    for first in range(0, projection.shape[1], step):
        part = slice(first, first + step)
        total += output.flatten(1)[:, part] @ projection[:, part].float().T
    return total


def _margins(logits: Tensor, continuation: Continuation) -> Tensor:
    """Log-odds of every reply token against all others, per judged row."""
    rows = logits[continuation.rows.to(logits.device)].float()
    targets = continuation.targets.to(logits.device)[:, None]
    log_p = rows.log_softmax(dim=-1).gather(-1, targets)[:, 0]
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))
