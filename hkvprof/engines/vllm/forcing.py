"""Replies that say what they are told, while what the model would have said is kept.

A logits processor sees what the model made of every step before anything is chosen from it, and
may leave one token to be chosen. Only engines that are measured have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.engines.vllm.script import ReplyScript
from hkvprof.engines.vllm.seams import LogitsProcessor, process_dict_updates

ARGUMENT = "hkvprof_script"
"""In a request's `extra_args`: the name under which its script is in SCRIPTS."""


@dataclass
class Recital:
    """A script that is followed: `said` are the tokens so far, which vLLM adds to; `kept` are
    log-probabilities by the number of the token that they choose."""

    script: ReplyScript
    said: list[int] = field(default_factory=list)
    kept: dict[int, Float[Tensor, " vocabulary"]] = field(default_factory=dict)

    def hear(self, logits: Float[Tensor, " vocabulary"]) -> None:
        """Keep what the model would say next, and leave the forced token alone.

        A prompt that comes in chunks is heard after each: the last one counts.
        """
        step, forced = len(self.said), self.script.forced
        if self.script.path and step >= self.script.heard:
            self.kept[step] = logits.float().log_softmax(-1)
        if step < len(forced):
            logits.fill_(-torch.inf)
            logits[forced[step]] = 0.0

    def rows(self) -> Float[Tensor, "rows vocabulary"]:
        """What was kept, in order."""
        return torch.stack([self.kept[step] for step in sorted(self.kept)])


SCRIPTS: dict[str, Recital] = {}
"""Scripts that are followed, by the names that requests bring."""


class ScriptedReplies(LogitsProcessor):
    """Follows scripts; requests without one are left alone."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows: dict[int, Recital] = {}

    def is_argmax_invariant(self) -> bool:
        """False: what is forced is not what would be chosen."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows that came, went or moved since the last step."""
        process_dict_updates(self.rows, batch_update, _recital)

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] that leave forced tokens alone, changed in place."""
        for row, recital in self.rows.items():
            recital.hear(logits[row])
        return logits


def _recital(params: Any, prompt: Any, said: list[int]) -> Recital | None:
    name = (params.extra_args or {}).get(ARGUMENT)
    if name is None:
        return None
    SCRIPTS[name].said = said
    return SCRIPTS[name]
