"""An engine at one budget that is asked single questions, for `hkvprof eval --engine vllm`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hkvprof.engines.vllm.bench import BLOCK, EngineSetup, ServedEngine, contestant
from hkvprof.engines.vllm.script import ReplyScript, Spoken
from hkvprof.errors import UsageError
from hkvprof.profile.block_ratios import as_allocation
from hkvprof.profile.blocks import BlockPlan, plan_blocks
from hkvprof.profile.budgets import Allocation
from hkvprof.profile.record import load_profile

PROCESSOR = "hkvprof.engines.vllm.forcing:ScriptedReplies"


@dataclass(frozen=True)
class EngineReply:
    """What an engine would have said to a reply that was forced on it: `log_probs` before the first
    of its tokens and after each. Bytes of the prompt by the plan, and in the blocks it held."""

    log_probs: Float[Tensor, "rows vocabulary"]
    resident_bytes: int
    storage_bytes: int
    compress_seconds: float


@dataclass(frozen=True)
class QuestionedEngine:
    """An engine that follows scripts, and its plan; `folder` is for what it hears."""

    engine: ServedEngine
    plan: BlockPlan
    folder: Path

    def allocation(self, tokens: int) -> Allocation:
        """What it keeps of a prompt of so many tokens, as strategies and ratios of heads."""
        return as_allocation(self.plan, tokens)

    def force(
        self, prompt: Sequence[int], lead: Sequence[int], forced: Sequence[int]
    ) -> EngineReply:
        """Force `lead` and then `forced` on a prompt. Raises UsageError where it ends instead."""
        path = self.folder / "heard.npy"
        told = ReplyScript(list(prompt), [*lead, *forced], heard=len(lead), path=str(path))
        made = self.engine.recite(told)
        heard = torch.from_numpy(np.load(path))
        path.unlink()
        if len(heard) != len(forced) + 1:
            raise UsageError(
                f"the engine ended a prompt of {len(prompt)} tokens after {len(heard) - 1} of the "
                f"{len(lead)} + {len(forced)} that follow it: the model has no room for more; ask "
                "shorter samples or fewer --steps"
            )
        return EngineReply(
            heard,
            self.plan.at(len(prompt)).kept_bytes,
            self._held(made, len(prompt)),
            made.compaction_seconds,
        )

    def answer(self, prompt: Sequence[int], lead: Sequence[int], limit: int) -> list[int]:
        """Its own greedy reply of `limit` tokens to a prompt on which `lead` is forced."""
        made = self.engine.recite(ReplyScript(list(prompt), list(lead), more=limit))
        return made.tokens[len(lead) :]

    def _held(self, made: Spoken, prompt: int) -> int:
        """Bytes of a prompt of `prompt` tokens in the blocks that its request did not free."""
        plan, each = self.plan, prompt * self.plan.groups
        freed = made.receipt["blocks_freed"] * plan.block_size
        return (each - freed) * plan.grid.token_bytes(plan.itemsize) // plan.groups


@contextmanager
def questioned(setup: EngineSetup, budget: str) -> Iterator[QuestionedEngine]:
    """Start an engine with this budget that follows scripts, and end it."""
    plan = plan_blocks(load_profile(setup.profile), budget, BLOCK, setup.itemsize)
    with (
        TemporaryDirectory(prefix="hkvprof-") as folder,
        contestant(setup, budget, logits_processors=[PROCESSOR]) as engine,
    ):
        yield QuestionedEngine(engine, plan, Path(folder))
