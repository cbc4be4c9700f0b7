"""What the layers of one cache share about a conversation."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hkvprof.errors import CompressionError
from hkvprof.heads import HeadGrid
from hkvprof.runtime.accounts import Meter
from hkvprof.runtime.attention import View, read_view, row_starts, to_bool
from hkvprof.runtime.plan import Planner, RowPlan
from hkvprof.runtime.positions import SeenPositions


@dataclass
class Conversation:
    """State that a cache and its layers share; refers to neither, so that nothing is a cycle.

    `goal` is the number of tokens of the prompt where it is known (`generate` knows it): passes up
    to it are prefill, tokens of the same pass beyond it (guesses of assisted decoding) are not
    prompt. `generating` says that `generate` runs: passes of several tokens beyond the goal are
    guesses then, and a turn's tokens otherwise. `starts` is the first valid position of every batch
    row (left padding before it). `view` is what the running pass sees of compressed layers and
    `hidden` what the last one hid from its last token, both None where nothing is hidden; `looked`
    is the mask that they were read from.
    `token_ids` [rows, tokens] is filled where a strategy asks which tokens are text, or the monitor
    (`watched`). `positions` are filled where an index or a score goes by them.
    """

    planner: Planner
    grid: HeadGrid
    layer_ids: tuple[int, ...]
    goal: int | None = None
    generating: bool = False
    watched: bool = False
    starts: tuple[int, ...] = ()
    view: View | None = None
    looked: weakref.ref[Tensor] | None = None
    hidden: Bool[Tensor, "rows seen"] | None = None
    token_ids: Tensor | None = None
    rope_deltas: Tensor | None = None
    positions: SeenPositions = field(default_factory=SeenPositions)
    meter: Meter = field(default_factory=Meter)
    maskless: bool = False
    """Passes bring no mask, and hide the padding on the left all the same (runtime.graph)."""
    broken: str = ""
    """Why the cache can take no more tokens; empty while it can."""

    @contextmanager
    def without_masks(self) -> Iterator[None]:
        """Within: passes without a mask hide the padding on the left all the same."""
        self.maskless = True
        try:
            yield
        finally:
            self.maskless = False

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Within: `generate` runs on this conversation."""
        self.generating = True
        try:
            yield
        finally:
            self.generating = False

    def observe_rows(self, mask: Tensor | None, rows: int, new: int, tokens: int) -> None:
        """Learn the rows' starts from the mask of a pass; the first covered layer does."""
        plain = self.planner.keeps_everything  # any mask is the model's own affair then
        self.starts = row_starts(None if plain else mask, rows, new, tokens)
        self.view = self.hidden = self.looked = None

    def look_dense(self, mask: Tensor | None, new: int, seen: int) -> None:
        """Of a pass over dense layers: they need no view, later compressions what was hidden."""
        rows = len(self.starts)
        self.view = self.looked = None
        self.hidden = None
        if mask is not None and not self.planner.keeps_everything:
            self.hidden = ~to_bool(mask, rows, new, seen)[:, -1]

    def look(self, mask: Tensor | None, new: int, seen: int, begins: bool) -> View | None:
        """Read the mask of a pass after the prompt; the first covered layer does (`begins`), others
        where they get another one."""
        if begins or mask is None or self.looked is None or self.looked() is not mask:
            hides_alone = mask is None and self.maskless
            self.view = None if hides_alone else read_view(mask, self.starts, new, seen)
            self.hidden = None if self.view is None else self.view.hidden
            self.looked = None if mask is None else weakref.ref(mask)
        return self.view

    def shown(self, row: int, positions: Any) -> Bool[Tensor, " tokens"] | None:
        """Which tokens of a row at these positions the latest pass saw; None where all of them."""
        return None if self.hidden is None else ~self.hidden[row, positions]

    @property
    def hides(self) -> bool:
        """Whether the last pass hid more than padding on the left; makes the host wait."""
        if self.hidden is None:
            return False
        return any(bool(self.hidden[row, start:].any()) for row, start in enumerate(self.starts))

    def lengths(self, seen: int) -> tuple[int, ...]:
        """Tokens of every row after `seen` positions, padding aside."""
        return tuple(seen - start for start in self.starts)

    def plans(self, tokens: int, itemsize: int, strict: bool) -> tuple[RowPlan, ...]:
        """What happens to every row of `tokens` positions, padding included."""
        return self.planner.rows(self.lengths(tokens), itemsize, strict)

    def see_ids(self, ids: Tensor | None, seen: int) -> None:
        """Token ids of a pass that follows `seen` tokens."""
        if not (self.planner.needs_text or self.watched):
            return
        old = None if self.token_ids is None or seen == 0 else self.token_ids[:, :seen]
        if ids is None or (old is not None and old.shape[1] != seen):
            self.token_ids = None
            return
        self.token_ids = ids if old is None else torch.cat([old, ids.to(old.device)], dim=1)

    def text(self, tokens: int) -> Bool[Tensor, "rows tokens"] | None:
        """Which of the first `tokens` positions are text; None where no strategy asks."""
        if not self.planner.needs_text:
            return None
        known = self.known_text(tokens)
        if known is None:
            raise CompressionError(
                "this profile keeps text tokens first, which needs the tokens' ids: pass "
                "input_ids to the model (not inputs_embeds alone)"
            )
        return known

    def known_text(self, tokens: int) -> Bool[Tensor, "rows tokens"] | None:
        """Which of the first `tokens` positions are text; None where their ids are not known."""
        ids = self.token_ids
        if ids is None or ids.shape[1] < tokens:
            return None
        vision = self.planner.profile.fingerprint.vision
        special = [vision[k] for k in ("image_token_id", "video_token_id") if k in vision]
        known = torch.tensor(special, device=ids.device, dtype=ids.dtype)
        return ~torch.isin(ids[:, :tokens], known)

    def take_rows(self, rows: list[int]) -> None:
        """Reorder, drop or repeat batch rows."""
        if self.starts:
            self.starts = tuple(self.starts[row] for row in rows)
        if self.token_ids is not None:
            self.token_ids = self.token_ids[rows]
        self.positions.take_rows(rows)
        self.looked = None
        if self.hidden is not None:
            self.hidden = self.hidden[rows]

    def reset(self) -> None:
        """Forget the conversation, ready for a new prompt."""
        self.goal, self.starts, self.broken = None, (), ""
        self.token_ids = self.rope_deltas = self.view = self.hidden = self.looked = None
        self.positions = SeenPositions()
        self.meter.clear()
