"""One sample on the model: prefill, reply, and what the layers showed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hkvprof.artifact import ProjectedIndexTables
from hkvprof.errors import SampleError
from hkvprof.heads import KeepRule, Modality, Strategy
from hkvprof.models.adapter import ModelView, output_projection
from hkvprof.models.attention import AttentionCall
from hkvprof.models.forward import last_row_only
from hkvprof.models.processing import ChatProcessor, Encoded
from hkvprof.policy.text_rows import sample_text_rows, text_sparsity
from hkvprof.profile.continuation import Continuation, build_continuation, opening_of_turn
from hkvprof.profile.fit import Moments, tables_of_layer
from hkvprof.profile.observe import ObservedCache, Observer
from hkvprof.profile.rows import SampleRow
from hkvprof.profile.samples import Sample, Turn, open_images
from hkvprof.profile.statistics import DecodeRows, layer_losses

RATIOS = (0.01, 0.02, 0.03, 0.05, 0.065, 0.08, 0.10, 0.12, 0.15, 0.20, 0.30, 0.50, 0.70, 1.0)
KAPPAS = (0.02, 0.05, 0.10, 0.20)
VISION = (Modality.IMAGE, Modality.VIDEO)
MAX_REPLY_TOKENS = 48
MAX_CONTINUATION = 192


@dataclass(frozen=True)
class Bench:
    """What all probes of a run share.

    `answered` holds samples whose replies were generated, so that a second pass need not do it
    again.
    """

    model: Any
    processor: ChatProcessor
    view: ModelView
    menu: tuple[Strategy, ...]
    keep: KeepRule
    own_replies: bool
    answered: dict[str, Sample] = field(default_factory=dict)


def content_digest(sample: Sample, encoded: Encoded) -> str:
    """Of what a measurement depends on: tokens and pixels of the prompt, given replies, turns."""
    said = json.dumps([sample.reply, [vars(turn) for turn in sample.followups]])
    digest = hashlib.sha256(said.encode())
    for name in sorted(encoded.inputs):
        digest.update(name.encode())
        digest.update(encoded.inputs[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


class Probe:
    """One sample on the model: prefill, reply, and what the layers showed."""

    def __init__(self, bench: Bench, sample: Sample) -> None:
        self.bench, self.sample = bench, sample
        opened = replace(sample, messages=tuple(open_images(sample)))
        self.encoded = bench.processor.encode([opened.messages])
        self.text = (self.encoded.modality[0] == Modality.TEXT).to(bench.model.device)
        self.observer = Observer(bench.keep.window)
        self.cache = ObservedCache(bench.view, self.observer)
        if self.encoded.tokens < bench.keep.floor_tokens + bench.keep.window:
            raise SampleError(
                f"sample {sample.id}: the prompt has {self.encoded.tokens} tokens, too few to "
                f"calibrate on (at least {bench.keep.floor_tokens + bench.keep.window})"
            )
        self.opened = opened

    @cached_property
    def digest(self) -> str:
        """Of the sample as it was given; see `content_digest`."""
        return content_digest(self.sample, self.encoded)

    # -- first pass -------------------------------------------------------------------------

    def add_moments(self, moments: Moments) -> None:
        """Queries of the rows that decode, and prompt keys.

        Queries of prompt rows look for other things: an index fitted to them too is worse
        (docs/experiments.md).
        """
        with torch.no_grad():
            continuation = self._prefill(None)
            self._continue(continuation)
        for layer, trace in self.observer.traces.items():
            keys = self.cache.covered[layer].keys
            assert keys is not None
            moments.add_keys(layer, keys[0, :, : self.encoded.tokens], self.sample.id)
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
                for layer in range(self.bench.view.grid.layers)
            ]
        held = self.encoded.modality[0]
        return SampleRow(
            id=self.sample.id,
            task=self.sample.task,
            tokens=self.encoded.tokens,
            sparsity=torch.stack([sparsity[i] for i in sorted(sparsity)], dim=1).cpu().numpy(),
            losses=torch.stack(losses, dim=2).cpu().numpy(),
            digest=self.digest,
            vision_tokens=int(sum((held == kind).sum() for kind in VISION)),
            context_tokens=int((held == Modality.CONTEXT).sum()),
        )

    def _layer_losses(
        self,
        layer: int,
        continuation: Continuation,
        margins: Tensor,
        tables: ProjectedIndexTables | None,
    ) -> Tensor:
        """[3 terms, strategies, kv_heads, ratios] of one layer."""
        trace, module = self.observer.traces[layer], self.bench.view.attention[layer]
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
            self.bench.menu,
            RATIOS,
            self.bench.keep,
            tables_of_layer(tables, layer, device) if tables else {},
            self.text,
            keys.element_size(),
        )
        return torch.stack([losses.output, losses.square, losses.reply])

    # -- the model --------------------------------------------------------------------------

    def _prefill(self, watch: Any) -> Continuation:
        """Run the prompt; return what follows it (the given reply, else the model's own)."""
        model = self.bench.model
        self.observer.on_prefill = watch
        with self.observer.phase("prefill"):
            inputs = self.encoded.to(model.device, model.dtype)
            output = model(**inputs, past_key_values=self.cache, **last_row_only(model))
        if self.opened.reply is None or self.bench.own_replies:
            answered = self.bench.answered.get(self.sample.id)
            if answered is None:
                answered = self._answer(output.logits[:, -1:].argmax(-1))
                self.bench.answered[self.sample.id] = replace(answered, messages=())
            turns, reply = answered.followups, answered.reply
            self.opened = replace(self.opened, reply=reply, followups=turns)
        assert self.opened.reply is not None
        return build_continuation(
            self.bench.processor, self.opened, self.opened.reply, MAX_CONTINUATION
        )

    def _answer(self, token: Tensor) -> Sample:
        """The sample with the model's own replies; leaves the cache as it was."""
        model = self.bench.model
        replies = [self._greedy(token)]
        if not self.bench.own_replies:
            return replace(self.opened, reply=replies[0])
        for _ in self.opened.followups:
            ids = torch.tensor([opening_of_turn(self.bench.processor, self.opened, replies)])
            output = model(input_ids=ids.to(model.device), past_key_values=self.cache)
            replies.append(self._greedy(output.logits[:, -1:].argmax(-1)))
            self.cache.crop(-ids.shape[1])
        turns = zip(self.opened.followups, replies[1:], strict=True)
        followups = tuple(Turn(turn.question, reply) for turn, reply in turns)
        return replace(self.opened, reply=replies[0], followups=followups)

    def _greedy(self, token: Tensor) -> str:
        """The model's own reply, dense and greedy; leaves the cache as it was."""
        model, end = self.bench.model, self.bench.processor.tokenizer.eos_token_id
        reply: list[int] = []
        while len(reply) < MAX_REPLY_TOKENS and int(token) != end:
            reply.append(int(token))
            output = model(input_ids=token, past_key_values=self.cache)
            token = output.logits[:, -1:].argmax(-1)
        self.cache.crop(-len(reply))
        return self.bench.processor.decode(reply)

    def _continue(self, continuation: Continuation) -> Tensor:
        """Teacher-force the continuation; logits [T, vocabulary]."""
        model = self.bench.model
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
