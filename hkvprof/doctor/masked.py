"""A recorded run against the unmodified model's dense attention under a mask per head.

The reference is the stock model with a stock DynamicCache: the same passes, full keys and values.
Which tokens a head may see is read from the recorded segments by comparing their bytes with the
dense keys and values, so that wrong bookkeeping shows. The first run hands on what the runtime had
computed after judging it, layer by layer: errors do not add up, all later keys must be equal to the
bit, and so must the logits. The second hands on its own results: plain masked dense attention.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hkvprof.doctor import residents
from hkvprof.doctor.conversations import Patient, play
from hkvprof.doctor.heads import HeadJudge, Places
from hkvprof.doctor.recording import Exact, RecordedCall, Recording, Seen, attend, watched_attention
from hkvprof.doctor.records import FaultError

_KERNEL = (
    "the decode kernel or the mask of this pass: its output is not attention over these tokens"
)
_PREFILL = "the prompt's own attention is not handed to the model's implementation as it was"
_LENGTHS = (
    "the cache reports other lengths than the logical ones (get_seq_length, get_mask_sizes), or "
    "the mask of this pass is made in another way"
)
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
        self._held: dict[tuple[int, int], Places] = {}

    def play(self, judge: bool) -> list[Tensor]:
        """The script on the stock model; the logits of every pass."""
        self._judge = judge
        self._count: dict[int, int] = defaultdict(int)
        self._heads = HeadJudge(self.patient, self.recording)
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

    def _answer(
        self, seen: Seen, number: int, call: RecordedCall, before: RecordedCall | None
    ) -> Tensor:
        new = seen.query.shape[2]
        was_dense = before is None or before.segments is None
        if call.segments is None or (was_dense and new > 1):
            return self._prefill(seen, call)
        if self._judge and not _same(seen.mask, call.mask):
            raise FaultError("the mask differs from that of a stock cache", _LENGTHS)
        key = (seen.number, number)
        if self._judge:
            self._held[key] = self._heads.at_step(seen, call)
            self._visible[key] = self._what_is_visible(seen, call, self._held[key])
            self._heads.remember(seen)
        seen = self._as_held(seen, call, self._held[key])
        exact = attend(seen.query, seen.key, seen.value, self._visible[key], seen.scaling)
        if not self._judge:
            return exact.output.to(seen.query.dtype)
        self._near(seen, call, exact, self._visible[key])
        return call.output

    def _prefill(self, seen: Seen, call: RecordedCall) -> Tensor:
        """Dense attention, after which the layer may have been compressed."""
        output, _ = seen.base()
        if self._judge and not torch.equal(output, call.output):
            raise FaultError("the prompt's attention differs from the model's own", _PREFILL)
        if self._judge:
            self._heads.remember(seen)
            if call.segments is not None:
                self._heads.after_prompt(seen, call)
        return output

    def _as_held(self, seen: Seen, call: RecordedCall, held: Places) -> Seen:
        """With the keys and values that tokens in fewer bits give back in place of their own."""
        assert call.segments is not None
        key, value = seen.key.clone(), seen.value.clone()
        for row, segments in enumerate(call.segments):
            for head, segment in enumerate(segments):
                if segment.layout is not None and seen.query.shape[2] > 1:
                    continue  # it attends to all tokens on the host, exactly
                dense = key[row, head], value[row, head]
                places = held[row][head]
                key[row, head], value[row, head] = residents.given_back(segment, places, *dense)
        return replace(seen, key=key, value=value)

    def _what_is_visible(self, seen: Seen, call: RecordedCall, places: Places) -> Tensor:
        """[rows, kv_heads, new, tokens]: resident tokens; all of a dynamic head's for passes of
        several tokens; of this pass only what is not later."""
        rows, heads, tokens, _ = seen.key.shape
        new = seen.query.shape[2]
        visible = torch.zeros(rows, heads, new, tokens, dtype=torch.bool)
        assert call.segments is not None
        for row, start in enumerate(self.recording.script.starts):
            for head in range(heads):
                whole = new > 1 and call.segments[row][head].layout is not None
                held = range(start, tokens) if whole else places[row][head]
                visible[row, head, :, list(held)] = True
        visible[..., tokens - new :] &= torch.ones(new, new, dtype=torch.bool).tril()
        self.shares.append(float(visible.float().mean()))
        return visible.to(seen.key.device)

    def _near(self, seen: Seen, call: RecordedCall, exact: Exact, visible: Tensor) -> None:
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


def _same(mask: Tensor | None, other: Tensor | None) -> bool:
    if mask is None or other is None:
        return mask is other
    return torch.equal(mask, other)


def _explain(seen: Seen, call: RecordedCall, visible: Tensor) -> str:
    """Which mistake would give what the runtime computed?"""
    heads = seen.key.shape[1]
    for shift in range(1, heads):
        key, value, mask = (x.roll(shift, dims=1) for x in (seen.key, seen.value, visible))
        if _fits(call, attend(seen.query, key, value, mask, seen.scaling), seen):
            return residents.GROUPING
    for scaling in residents.other_scalings(seen.scaling, seen.query.shape[-1]):
        if _fits(call, attend(seen.query, seen.key, seen.value, visible, scaling), seen):
            return residents.SCALING
    return _KERNEL


def _fits(call: RecordedCall, exact: Exact, seen: Seen) -> bool:
    """Whether at least one query head is as this says."""
    fine = exact.error(call.output) <= exact.tolerance(seen.query.dtype)
    return bool(fine.all(dim=(0, 1)).any())
