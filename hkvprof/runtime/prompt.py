"""What the layers of one cache share about a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hkvprof.errors import CompressionError, ModelError
from hkvprof.heads import HeadGrid
from hkvprof.runtime.plan import LayerPlan, Planner


@dataclass
class Prompt:
    """What the layers of one cache share about the prompt; the first layer of a pass fills it.

    `starts` is the first valid position of every batch row (left padding before it), `text` marks
    text positions per row where a strategy asks for them.
    """

    tokens: int = 0
    starts: tuple[int, ...] = ()
    plans: tuple[LayerPlan, ...] = ()
    text: Tensor | None = None


@dataclass
class Conversation:
    """State that a cache and its layers share; refers to neither, so that nothing is a cycle."""

    planner: Planner
    grid: HeadGrid
    layer_ids: tuple[int, ...]
    prompt: Prompt = field(default_factory=Prompt)
    token_ids: Tensor | None = None
    rope_deltas: Tensor | None = None

    def describe_prompt(self, key: Tensor, mask: Tensor | None) -> Prompt:
        """The prompt of this pass; computed by the first covered layer, reused by the others."""
        rows, _, tokens, _ = key.shape
        if self.prompt.tokens != tokens or len(self.prompt.starts) != rows:
            starts = _row_starts(mask, rows, tokens)
            longest = tokens - min(starts)
            plans = self.planner.layers(longest, rows, key.element_size())
            self.prompt = Prompt(tokens, starts, plans, self._text_positions(tokens))
        return self.prompt

    def take_rows(self, rows: list[int]) -> None:
        """Reorder, drop or repeat batch rows."""
        if self.prompt.starts:
            self.prompt.starts = tuple(self.prompt.starts[row] for row in rows)

    def _text_positions(self, tokens: int) -> Tensor | None:
        if not self.planner.needs_text:
            return None
        ids = self.token_ids
        if ids is None or ids.shape[1] != tokens:
            raise CompressionError(
                "this profile keeps text tokens first, which needs the prompt's token ids: pass "
                "input_ids to the model (not inputs_embeds alone)"
            )
        vision = self.planner.profile.fingerprint.vision
        special = [vision[k] for k in ("image_token_id", "video_token_id") if k in vision]
        return ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))


def _row_starts(mask: Tensor | None, rows: int, tokens: int) -> tuple[int, ...]:
    """First valid position per batch row, from the mask of the pass's last query row."""
    if mask is None:
        return (0,) * rows
    if mask.ndim == 4:
        last = mask[:, 0, -1, :tokens]
        valid = last == 0 if last.is_floating_point() else last.bool()
    else:
        valid = mask[:, :tokens].bool()
    valid = valid.expand(rows, tokens)
    counts = valid.sum(dim=1)
    starts = tokens - counts
    if not bool((valid == (torch.arange(tokens, device=valid.device) >= starts[:, None])).all()):
        raise ModelError(
            "the attention mask hides tokens in the middle or on the right of a prompt: pad on the "
            "left (tokenizer.padding_side = 'left')"
        )
    return tuple(starts.tolist())
