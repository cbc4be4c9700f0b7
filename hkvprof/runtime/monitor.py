"""The drift sentinel: are prompts still like those that the profile was calibrated on?

On a share of requests every layer's text-centric sparsity is compared with the profile's, by the
function and over the kind of rows that calibration measures. Caches of other requests are made of
plain layers: nothing of this is on their path.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hkvprof.errors import HkvWarning, ProfileError
from hkvprof.models.attention import AttentionCall
from hkvprof.profile.domain import KEY, Domain, DomainCheck, deviations
from hkvprof.profile.record import Profile
from hkvprof.runtime.copies import NeverCopied
from hkvprof.runtime.layer import CompressedLayer
from hkvprof.runtime.plan import Planner
from hkvprof.runtime.prompt import Conversation
from hkvprof.selection.sparsity import sample_text_rows, text_sparsity

SEED = 0
_NOT_YET = DomainCheck(reason="no prompt of several tokens came in one pass")


class Monitor(NeverCopied):
    """One per applied profile: chooses requests, and warns once.

    Requests are drawn by a generator with a fixed seed, one draw per cache in the order in which
    caches are made: a run can be repeated, and periodic traffic does not hide from it.
    """

    def __init__(
        self, profile: Profile, domain: Domain, share: float, layer_ids: Sequence[int]
    ) -> None:
        self.profile, self.domain, self.layer_ids = profile, domain, tuple(layer_ids)
        self._share = share
        self._random = random.Random(SEED)
        self._has_warned = False

    @classmethod
    def of(cls, planner: Planner, layer_ids: Sequence[int]) -> Monitor | None:
        """None where nothing is to be monitored.

        Raises ProfileError for a profile that does not say what is usual.
        """
        profile, share = planner.profile, planner.options.monitor
        if not share:
            return None
        if KEY not in profile.provenance:
            raise ProfileError(
                "monitor needs a profile that records what is usual in its domain, and this one "
                "does not: calibrate (or merge rows) again with this version, or leave monitor out"
            )
        domain = Domain.from_json(profile.provenance[KEY])
        if domain.reason:
            raise ProfileError(
                f"monitor cannot compare prompts with this profile's ({domain.reason}): calibrate "
                "on other samples, or leave monitor out"
            )
        return cls(profile, domain, share, layer_ids)

    def watch(self) -> Watch | None:
        """For a new cache: a watch, if its request is drawn."""
        return Watch(self) if self._random.random() < self._share else None

    def report(self, check: DomainCheck) -> None:
        """Warn of the first request out of domain."""
        if self._has_warned or not check.out_of_domain:
            return
        self._has_warned = True
        usual = f"{check.bound:.1f} are usual (for {1 - self.domain.false_alarms:.0%} of prompts)"
        warnings.warn(
            f"out of domain: in layer {check.layer}, query head {check.query_head} gives "
            f"{check.found:.3f} of this prompt's attention to the top {check.kappa:.3g} of keys, "
            f"{check.expected:.3f} in the calibration. That is {check.deviations:.1f} standard "
            f"deviations, where {usual}: the quality measured may not hold for such prompts; "
            "calibrate on some of them (said once; Receipt.domain has it for every request)",
            HkvWarning,
            stacklevel=2,
        )


class Watch:
    """One request's comparison, layer by layer; batch rows are compared each for itself.

    `verdict` is about the head of all layers seen so far that moved most.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.verdict = _NOT_YET

    def see(
        self, number: int, call: AttentionCall, shared: Conversation, dense: Mapping[int, str]
    ) -> None:
        """Covered layer `number` has attended over a whole prompt; `dense` tells of rows that are
        kept whole why they are."""
        if number == 0:
            self.verdict = DomainCheck(reason=self._reason(call, shared, dense))
        if self.verdict.reason:
            return
        tokens = shared.goal or call.key.shape[2]
        text = shared.known_text(tokens)
        assert text is not None
        for row, start in enumerate(shared.starts):
            if row not in dense:
                self._compare(number, call, row, start, text[row, start:])
        if number == len(self._monitor.layer_ids) - 1:
            self._monitor.report(self.verdict)

    def _reason(self, call: AttentionCall, shared: Conversation, dense: Mapping[int, str]) -> str:
        """Why there is nothing to compare, else an empty text."""
        seen = call.key.shape[2]
        if (shared.goal or seen) > seen:
            return "the prompt came in several passes"
        if len(dense) == len(shared.starts):
            return f"not compressed: {dense[0]}"
        if shared.known_text(seen) is None:
            return "the tokens' ids are not known: pass input_ids to the model"
        return ""

    def _compare(
        self, number: int, call: AttentionCall, row: int, start: int, text: Tensor
    ) -> None:
        """At most 64 rows of attention are formed, one group of heads at a time."""
        profile, domain = self._monitor.profile, self._monitor.domain
        rows = sample_text_rows(text)
        if not len(rows):  # a prompt that ends with an image has no text that sees it
            return
        end = start + len(text)
        sparsity = (
            text_sparsity(
                call.query[row, :, start:end][:, rows].detach(),
                call.key[row, :, start:end].detach(),
                rows,
                call.scaling,
                profile.kappas,
            )
            .cpu()
            .numpy()
            .astype(np.float64)
        )
        mean = profile.sparsity_mean[:, number].astype(np.float64)
        std = profile.sparsity_std[:, number].astype(np.float64)
        moved = deviations(sparsity, mean, std, domain.samples)
        kappa, head = np.unravel_index(int(moved.argmax()), moved.shape)
        if moved[kappa, head] > self.verdict.deviations:
            self.verdict = DomainCheck(
                layer=self._monitor.layer_ids[number],
                query_head=int(head),
                kappa=profile.kappas[kappa],
                expected=float(mean[kappa, head]),
                found=float(sparsity[kappa, head]),
                deviations=float(moved[kappa, head]),
                bound=domain.bound,
                out_of_domain=bool(moved[kappa, head] > domain.bound),
            )


class WatchedLayer(CompressedLayer):
    """A layer of a monitored request."""

    def __init__(self, number: int, shared: Conversation, watch: Watch) -> None:
        super().__init__(number, shared)
        self._watch = watch

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """As the plain layer; then, after a prompt's first pass, a look at its text rows."""
        first = self._seen == call.query.shape[2] > 1
        result = super().attend(call)
        if first:
            self._watch.see(self.number, call, self._shared, self._whole_rows())
        return result

    def _whole_rows(self) -> dict[int, str]:
        """Rows that are not compressed, and why."""
        if self.ragged is None:
            return dict.fromkeys(range(len(self._shared.starts)), self.account.reason)
        rows = enumerate(self.ragged.rows)
        return {number: row.plan.dense_reason for number, row in rows if row.is_whole}
