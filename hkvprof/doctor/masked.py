"""A recorded run against the unmodified model's dense attention under a mask per head.

The reference is the stock model with a stock DynamicCache: the same passes, full keys and values.
Which tokens a head may see is read from the recorded segments by comparing their bytes with the
dense keys and values, so that wrong bookkeeping shows. The first run hands on what the runtime had
computed after judging it, layer by layer: errors do not add up, all later keys must be equal to the
bit, and so must the logits. The second hands on its own results: plain masked dense attention.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.doctor import contents, selection
from hkvprof.doctor.attention import Exact, attend
from hkvprof.doctor.prompts import Patient
from hkvprof.doctor.recording import Call, Recording
from hkvprof.doctor.records import FaultError
from hkvprof.doctor.script import play
from hkvprof.doctor.seam import Seen, watched_attention

_GROUPING = "head grouping: query heads are mapped to the wrong KV head"
_SCALING = "the scaling of attention logits is not the model's"
_KERNEL = (
    "the decode kernel or the mask of this pass: its output is not attention over these tokens"
)
_PREFILL = "the prompt's own attention is not handed to the model's implementation as it was"
_SILENT = "attention does not pass through hkvprof, or layers kept their dense keys"
_BEYOND = (
    "something else than attention differs between the runs: positions, masks of layers that are "
    "not covered, or state on the model"
)


@dataclass(frozen=True)
class Agreement:
    """How well a recorded run agrees with masked dense attention.

    `worst` is the largest error of a layer's attention over the tolerance for its dtype; `logits`
    the difference of logits after whole passes (root mean square, relative; None: not compared).
    """

    worst: float
    logits: float | None
    layers: int
    passes: int
    kept: float

    def __str__(self) -> str:
        logits = "" if self.logits is None else f", logits within {self.logits:.1g} (relative)"
        return (
            f"{self.layers} layers, {self.passes} passes over {self.kept:.0%} of the tokens: "
            f"attention within {self.worst:.0%} of the tolerance{logits}"
        )


def agree(patient: Patient, recording: Recording, compare_logits: bool = False) -> Agreement:
    """Raise FaultError where a recording cannot be right; else say how near it is.

    The second run, for `compare_logits`, takes as long again.
    """
    if recording.compressed_layers < len(patient.view.attention):
        raise FaultError(
            f"{recording.compressed_layers} of {len(patient.view.attention)} covered layers were "
            "compressed",
            _SILENT,
        )
    reference = _Reference(patient, recording)
    logits = reference.play(judge=True)
    for number, (mine, theirs) in enumerate(zip(logits, recording.logits, strict=True)):
        if not torch.equal(mine, theirs):
            raise FaultError(
                f"pass {number}: logits differ although every layer's attention agrees", _BEYOND
            )
    distance = _compare_logits(patient, recording, reference) if compare_logits else None
    share = float(torch.tensor(reference.shares).mean())
    return Agreement(reference.worst, distance, len(recording.calls), len(logits), share)


def _compare_logits(patient: Patient, recording: Recording, reference: _Reference) -> float:
    """The largest difference of a pass's logits from masked dense attention's."""
    logits = zip(recording.logits, reference.play(judge=False), strict=True)
    distance = max(_relative(mine, theirs) for mine, theirs in logits)
    limit = _LOGITS * torch.finfo(patient.model.dtype).eps ** 0.5
    if not distance <= limit:
        raise FaultError(
            f"logits differ from masked dense attention by {distance:.2g} (relative; tolerance "
            f"{limit:.2g})",
            _KERNEL,
        )
    return distance


_LOGITS = 3.0
"""In roots of the dtype's epsilon: rounding errors grow from layer to layer."""


def _relative(mine: Tensor, theirs: Tensor) -> float:
    difference = (mine.double() - theirs.double()).square().mean().sqrt()
    spread = (theirs.double() - theirs.double().mean()).square().mean().sqrt()
    return float(difference / spread.clamp(min=1e-30))


@dataclass
class _Reference:
    patient: Patient
    recording: Recording
    worst: float = 0.0
    shares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._visible: dict[tuple[int, int], Tensor] = {}
        self._ranks = {n: i for i, n in enumerate(sorted(self.recording.calls))}
        script = self.recording.script
        profile = self.recording.profile
        longest = script.tokens - min(script.starts)
        size = self.patient.model.dtype.itemsize
        self._plan = profile.allocation(self.recording.budget, longest, size, script.rows)

    def play(self, judge: bool) -> list[Tensor]:
        """The script on the stock model; the logits of every pass."""
        self._judge = judge
        self._count: dict[int, int] = defaultdict(int)
        self._window: dict[int, Tensor] = {}
        script = self.recording.script
        cache = DynamicCache(config=self.patient.view.text_config)
        with watched_attention(self.patient.view, self._attend):
            return play(self.patient.model, script, cache)

    def _attend(self, seen: Seen) -> tuple[Tensor, Any]:
        number = self._count[seen.number]
        self._count[seen.number] += 1
        calls = self.recording.calls[seen.number]
        call = calls[number]
        try:
            return self._answer(seen, number, call, calls[number - 1] if number else None), None
        except FaultError as fault:
            where = f"layer {seen.number}, pass {number}: {fault.what}"
            raise FaultError(where, fault.cause) from None

    def _answer(self, seen: Seen, number: int, call: Call, before: Call | None) -> Tensor:
        new = seen.query.shape[2]
        was_dense = before is None or before.segments is None
        if call.segments is None or (was_dense and new > 1):
            return self._prefill(seen, call)
        key = (seen.number, number)
        if self._judge:
            self._visible[key] = self._what_is_visible(seen, call)
        exact = attend(seen.query, seen.key, seen.value, self._visible[key], seen.scaling)
        if not self._judge:
            return exact.output.to(seen.query.dtype)
        self._near(seen, call, exact, self._visible[key])
        return call.output

    def _prefill(self, seen: Seen, call: Call) -> Tensor:
        """Dense attention, after which the layer may have been compressed."""
        output, _ = seen.base()
        if self._judge and not torch.equal(output, call.output):
            raise FaultError("the prompt's attention differs from the model's own", _PREFILL)
        rows = seen.query[:, :, -self.recording.profile.keep.window :]
        if seen.number in self._window:
            rows = torch.cat([self._window[seen.number], rows], dim=2)
        self._window[seen.number] = rows[:, :, -self.recording.profile.keep.window :]
        if self._judge and call.segments is not None:
            self._each_head(seen, call, after_prompt=True)
        return output

    def _what_is_visible(self, seen: Seen, call: Call) -> Tensor:
        """[rows, kv_heads, new, tokens]: resident tokens; all of a dynamic head's for passes of
        several tokens; of this pass only what is not later."""
        rows, heads, tokens, _ = seen.key.shape
        new = seen.query.shape[2]
        visible = torch.zeros(rows, heads, new, tokens, dtype=torch.bool)
        assert call.segments is not None
        places = self._each_head(seen, call, after_prompt=False)
        for row, start in enumerate(self._starts(seen)):
            for head in range(heads):
                whole = new > 1 and call.segments[row][head].layout is not None
                held = range(start, tokens) if whole else places[row][head]
                visible[row, head, :, list(held)] = True
        visible[..., tokens - new :] &= torch.ones(new, new, dtype=torch.bool).tril()
        self.shares.append(float(visible.float().mean()))
        return visible.to(seen.key.device)

    def _starts(self, seen: Seen) -> list[int]:
        return self.recording.script.starts

    def _each_head(self, seen: Seen, call: Call, after_prompt: bool) -> list[list[list[int]]]:
        """Judge all segments of a layer; the positions they hold, [row][head]."""
        assert call.segments is not None
        held = []
        for row, start in enumerate(self._starts(seen)):
            held.append([
                self._one_head(seen, call, row, head, start, after_prompt)
                for head in range(seen.key.shape[1])
            ])  # fmt: skip
        return held

    def _one_head(
        self, seen: Seen, call: Call, row: int, head: int, start: int, after_prompt: bool
    ) -> list[int]:
        assert call.segments is not None
        segment = call.segments[row][head]
        key, value = seen.key[row, head], seen.value[row, head]
        recording, keep = self.recording, self.recording.profile.keep
        try:
            places = contents.positions(segment, key, value, start, recording.script.tokens)
            contents.check_structure(segment, places, start, len(key), keep)
            if after_prompt:
                self._kept(seen, segment, places, row, head, start)
            elif self._selects_alone(segment, seen):
                group = self._group(seen, head)
                query = seen.query[row, group, -1]
                selection.check_hot(segment, query, key[start:], seen.scaling)
        except FaultError as fault:
            raise FaultError(f"row {row}, KV head {head}: {fault.what}", fault.cause) from None
        return places

    def _kept(
        self, seen: Seen, segment: Any, places: list[int], row: int, head: int, start: int
    ) -> None:
        """Right after the prompt: as many tokens as planned, and the best ones."""
        keep = self.recording.profile.keep
        rank = self._ranks[seen.number]
        strategy = self.recording.profile.strategies[self._plan.strategy[rank, head]]
        ratio, tokens = float(self._plan.ratio[rank, head]), seen.key.shape[2] - start
        smooth = self.recording.options.get("smoothing", 1.0) > 0
        selection.check_count(segment, strategy, ratio, tokens, keep, smooth)
        if segment.layout is not None or strategy.text_prior or len(places) == tokens:
            return
        window = self._window[seen.number][row, self._group(seen, head)]
        window = window[:, -min(window.shape[1], tokens) :]
        numbers = {place - start for place in places}
        pooled = strategy if strategy.index == "" else type(strategy)(strategy.head_type)
        selection.check_static(
            numbers, window, seen.key[row, head, start:], seen.scaling, pooled, keep
        )

    def _selects_alone(self, segment: Any, seen: Seen) -> bool:
        """Whether this step's query alone decides what is hot, by mean digests."""
        dynamic = [s for s in self.recording.profile.strategies if s.index]
        return (
            segment.layout is not None
            and seen.query.shape[2] == 1
            and all(s.index == "mean" for s in dynamic)
            and self.recording.options.get("smoothing") == 0
        )

    @staticmethod
    def _group(seen: Seen, head: int) -> slice:
        group = seen.query.shape[1] // seen.key.shape[1]
        return slice(head * group, (head + 1) * group)

    def _near(self, seen: Seen, call: Call, exact: Exact, visible: Tensor) -> None:
        """Raise FaultError unless the runtime's output is this attention, up to rounding."""
        error, tolerance = exact.error(call.output), exact.tolerance(seen.query.dtype)
        self.worst = max(self.worst, float((error / tolerance).max()))
        if bool((error <= tolerance).all()):
            return
        row, _, query_head = (
            int(i) for i in torch.unravel_index((error / tolerance).argmax(), error.shape)
        )
        raise FaultError(
            f"row {row}, query head {query_head}: attention over the same tokens differs by "
            f"{float(error[row, :, query_head].max()):.2g} of its size (tolerance "
            f"{float(tolerance[row, :, query_head].max()):.2g})",
            _explain(seen, call, visible),
        )


def _explain(seen: Seen, call: Call, visible: Tensor) -> str:
    """Which mistake would give what the runtime computed?"""
    heads = seen.key.shape[1]
    for shift in range(1, heads):
        key, value, mask = (x.roll(shift, dims=1) for x in (seen.key, seen.value, visible))
        if _fits(call, attend(seen.query, key, value, mask, seen.scaling), seen):
            return _GROUPING
    width = seen.query.shape[-1]
    for scaling in (1.0, width**-0.5, 1 / width, seen.scaling**2):
        if scaling == seen.scaling:
            continue
        if _fits(call, attend(seen.query, seen.key, seen.value, visible, scaling), seen):
            return _SCALING
    return _KERNEL


def _fits(call: Call, exact: Exact, seen: Seen) -> bool:
    """Whether at least one query head is as this says."""
    fine = exact.error(call.output) <= exact.tolerance(seen.query.dtype)
    return bool(fine.all(dim=(0, 1)).any())
