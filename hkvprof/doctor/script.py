"""Conversations whose every token is given, so that two runs see the same passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hkvprof.models.calls import with_cache
from hkvprof.models.limits import pad_token

SHUFFLE_AFTER = 3


@dataclass(frozen=True)
class Script:
    """A prompt (`inputs`, left padded), `forced` replies [rows, steps] to it, and perhaps a second
    `turn` [rows, new] with `more` forced tokens.

    `options` go to the generation config; after `SHUFFLE_AFTER` passes rows of the cache are
    reordered as `shuffle` says, as beam search does.
    """

    inputs: dict[str, Tensor]
    forced: Int[Tensor, "rows steps"]
    turn: Int[Tensor, "rows new"] | None = None
    more: Int[Tensor, "rows steps"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    shuffle: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Length of the prompt, padding included."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def rows(self) -> int:
        """The batch."""
        return int(self.inputs["input_ids"].shape[0])

    @property
    def starts(self) -> list[int]:
        """First valid position of every row."""
        mask = self.inputs.get("attention_mask")
        if mask is None:
            return [0] * self.rows
        return [int(row.argmax()) for row in mask]


class _Forced(LogitsProcessor):
    """Only the given token is possible at every step; rows of the cache may be shuffled before."""

    def __init__(self, tokens: Tensor, start: int, cache: Any, shuffle: tuple[int, ...]) -> None:
        self.tokens, self.start, self.cache, self.shuffle = tokens, start, cache, shuffle

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        if self.shuffle and step == SHUFFLE_AFTER:
            self.cache.reorder_cache(torch.tensor(self.shuffle, device=scores.device))
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, self.tokens[:, step : step + 1], 0.0)


@torch.no_grad()
def play(model: Any, script: Script, cache: Any = None) -> list[Tensor]:
    """Run a whole script through `model.generate`: the logits of every pass, [rows, vocabulary].

    Without `cache` (one turn only) the model, or what is hooked to it, makes its own.
    """
    logits = first_turn(model, script, cache)
    return logits if script.turn is None else logits + second_turn(model, script, cache)


def first_turn(model: Any, script: Script, cache: Any = None) -> list[Tensor]:
    """The prompt and its forced reply."""
    return _generate(model, script.inputs, script.forced, cache, script)


def second_turn(model: Any, script: Script, cache: Any) -> list[Tensor]:
    """The second turn and its forced reply; images and such are in the cache already."""
    assert script.turn is not None
    assert script.more is not None
    ids = torch.cat([script.inputs["input_ids"], script.forced, script.turn], dim=1)
    mask = script.inputs.get("attention_mask", torch.ones_like(script.inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(ids.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return _generate(model, inputs, script.more, cache, None)


@torch.no_grad()
def _generate(
    model: Any, inputs: dict[str, Tensor], forced: Tensor, cache: Any, script: Script | None
) -> list[Tensor]:
    steps = forced.shape[1]
    options = {} if script is None else script.options
    own = {} if cache is None else with_cache(model, cache)
    shuffle = () if script is None else script.shuffle
    forcing = _Forced(forced, inputs["input_ids"].shape[1], cache, shuffle)
    output = model.generate(
        **inputs,
        **own,
        generation_config=greedy(model, steps, **options),
        logits_processor=LogitsProcessorList([forcing]),
    )
    return list(output.logits)


def greedy(model: Any, steps: int, **more: Any) -> GenerationConfig:
    """Exactly `steps` new tokens, with the logits of every pass."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=steps, min_new_tokens=steps, num_beams=more.pop("beams", 1),
        output_logits=True, return_dict_in_generate=True, pad_token_id=pad_token(model),
        **more,
    )  # fmt: skip
