"""Throw-away heads that make the small model learn, with losses annealed to zero.

Without them the model never ties an image to its label: answers alone are too weak a signal. The
heads read what a visual token is (label, row, column, colour, ...) off early layers, and with the
same weights what the question asks for, so that both come to lie in the same directions and
attention only has to compare them. Aggregation gets regressions on what is to be summed up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hkvprof.testbed.vocabulary import IMAGE_PAD, MAX_LABEL, TOKEN_IDS
from tools.tinyvl.architecture import HIDDEN
from tools.tinyvl.batching import Batch
from tools.tinyvl.fastmodel import Trace
from tools.tinyvl.roles import HISTOGRAM_SIZE, IGNORE, ROLE_INDEX, ROLES

_OWN_ROLES = ("label", "row", "column", "colour", "shape", "glyph")
_PREVIOUS_ROLES = ("previous colour", "previous shape", "previous glyph")
_FEW = 8
"""Regressions on fewer questions than this are left out of a step."""

SPREAD_HEADS = (0, 1, 6, 7)
"""Query heads of the new layers that the entropy floor keeps spread: KV heads 0 and 3."""


@dataclass(frozen=True)
class Depths:
    """The text layers (0-based outputs) that the heads read."""

    image: int
    question: int
    changed: int
    total: int = 0
    number: int = 0
    last: int = 0


LOOKUP_DEPTHS = Depths(image=0, question=1, changed=2)
GROWN_DEPTHS = Depths(image=0, question=1, changed=3, total=2, number=4, last=5)


def _normed(hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (HIDDEN,)).float()


class AuxiliaryHeads(torch.nn.Module):
    """Linear heads on normed hidden states; the aggregation heads start at zero."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.roles = torch.nn.ModuleList(
                torch.nn.Linear(HIDDEN, classes) for classes in ROLES.values()
            )
        self.histogram = torch.nn.Linear(HIDDEN, HISTOGRAM_SIZE)
        self.last_histogram = torch.nn.Linear(HIDDEN, HISTOGRAM_SIZE)
        self.shares = torch.nn.Linear(HIDDEN, MAX_LABEL + 1)
        self.number = torch.nn.Linear(HIDDEN, 1)
        for head in (self.histogram, self.last_histogram, self.shares, self.number):
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)

    def role_loss(self, batch: Batch, trace: Trace, depths: Depths) -> Tensor:
        """Cross-entropy of the roles on context tokens and on answer positions."""
        has_roles = (batch.roles[..., ROLE_INDEX["colour"]] != IGNORE) & ~batch.selected
        context = (batch.ids == TOKEN_IDS[IMAGE_PAD]) | has_roles
        image, question = trace.hidden[depths.image], trace.hidden[depths.question]
        changed = trace.hidden[depths.changed]
        total = self._read(image, context, batch.roles, _OWN_ROLES)
        total = total + self._read(question, context, batch.roles, _PREVIOUS_ROLES)
        total = total + self._read(changed, context, batch.roles, ("changed",))
        total = total + self._read(question, batch.selected, batch.roles, _OWN_ROLES)
        return total / 8

    def _read(self, hidden: Tensor, rows: Tensor, roles: Tensor, names: tuple[str, ...]) -> Tensor:
        states, wanted = _normed(hidden[rows]), roles[rows]
        total = states.new_zeros(())
        for name in names:
            target = wanted[:, ROLE_INDEX[name]]
            known = target != IGNORE
            if not known.any():
                continue
            # Changed cells are rare, so they weigh more.
            weight = states.new_tensor([1.0, 8.0]) if name == "changed" else None
            logits = self.roles[ROLE_INDEX[name]](states[known])
            total = total + F.cross_entropy(logits, target[known], weight=weight)
        return total

    def sum_loss(self, batch: Batch, trace: Trace, depths: Depths) -> Tensor:
        """Regressions on histograms, label shares and numbers, on first answer positions."""
        total = trace.hidden[0].new_zeros((), dtype=torch.float32)
        if len(batch.histogram_rows) > _FEW:
            early = self._rows(trace, depths.total, batch.histogram_rows)
            late = self._rows(trace, depths.last, batch.histogram_rows)
            total = total + 12 * _squared(self.histogram(early), batch.histograms)
            total = total + 6 * _squared(self.last_histogram(late), batch.histograms)
        if len(batch.share_rows) > _FEW:
            logits = self.shares(self._rows(trace, depths.total, batch.share_rows))
            total = total - 0.5 * (batch.shares * logits.log_softmax(-1)).sum(-1).mean()
        if len(batch.number_rows) > _FEW:
            read = self.number(self._rows(trace, depths.number, batch.number_rows))
            total = total + _squared(read, batch.numbers[:, None] / 4)
        return total

    @staticmethod
    def _rows(trace: Trace, layer: int, rows: Tensor) -> Tensor:
        return _normed(trace.hidden[layer].reshape(-1, HIDDEN)[rows])


def _squared(read: Tensor, wanted: Tensor) -> Tensor:
    return ((read - wanted) ** 2).sum(-1).mean()


def entropy_floor_loss(batch: Batch, trace: Trace, floor: float) -> Tensor:
    """How far the watched heads' attention of text rows is below a normalised entropy of `floor`.

    Rows that see fewer than 25 tokens are left out.
    """
    total = trace.hidden[0].new_zeros((), dtype=torch.float32)
    for weights in trace.attention:
        count = len(weights)
        seen = batch.mask[:count, 0].sum(-1)
        ids = batch.ids[:count]
        rows = (ids != TOKEN_IDS[IMAGE_PAD]) & (ids != 0) & (seen >= 25)
        chosen = weights.float().transpose(1, 2)[rows]
        entropy = -(chosen * chosen.clamp_min(1e-9).log()).sum(-1)
        relative = entropy / seen[rows].float().log()[:, None]
        total = total + F.relu(floor - relative).mean()
    return total
