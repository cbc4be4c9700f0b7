"""A model and profile on disk, engines that serve them, the transformers runtime beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hkvprof.profile.block_ratios import as_allocation
from hkvprof.profile.blocks import plan_blocks
from hkvprof.profile.record import Profile
from tests.engines.vllm.tiny import GRID, Told, prompts, run_engine


@dataclass(frozen=True)
class Lab:
    """The model and profile on disk, and how long prompts usually are."""

    model: Path
    profile: Path
    lengths: tuple[int, ...]

    def run(self, budget: float | None, **job: Any) -> Told:
        """An engine with this budget (None: plain vLLM); fails the test where it does not start."""
        told = self.start(budget, **job)
        assert not told.error, told.error
        return told

    def start(self, budget: float | None, **job: Any) -> Told:
        """The same; what does not start tells its error."""
        engine = {"enable_prefix_caching": False, **job.pop("engine", {})}
        if budget is not None:
            engine["additional_config"] = {
                "hkvprof": {"profile": str(self.profile), "budget": budget}
            }
        job.setdefault("prompts", prompts(self.lengths))
        return run_engine({"model": str(self.model), "engine": engine, **job})


def assert_tidy(told: Told) -> None:
    """All blocks came back (one is vLLM's own null block)."""
    assert told.free == told.blocks - 1


def assert_close(one: Told, other: Told) -> None:
    """The same tokens, and log-probabilities up to the order of float32 sums."""
    assert one.tokens == other.tokens
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


@dataclass
class Answer:
    """By vLLM's name of each head: numbers of the tokens that are kept, ascending, and what is
    stored of them [2, kept, dim]; the reply and its log-probabilities."""

    kept: dict[str, Tensor]
    stored: dict[str, Tensor]
    tokens: list[int]
    logprobs: list[float]


def answered_by_transformers(
    lab: Lab, own: Profile, budget: float, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> Answer:
    """What `apply` does where it is given the engine's plan; replies stay whole."""
    from transformers import LlamaForCausalLM

    import hkvprof
    from hkvprof.runtime import ragged

    given = as_allocation(plan_blocks(own, budget, 32, 4), len(prompt))
    kept: list[Tensor] = []
    stored: list[Tensor] = []
    pack = ragged.pack

    def told(*args: Any) -> Any:
        packed = pack(*args)
        order = packed.kept.argsort()
        kept.append(packed.kept[order])
        both = torch.stack([packed.key, packed.value])
        if packed.held is not None:
            both = torch.cat([torch.stack(packed.held.decode()), both], dim=1)
        stored.append(both[:, order])
        return packed

    model = LlamaForCausalLM.from_pretrained(lab.model, dtype=torch.float32)
    theirs = replace(own, fingerprint=hkvprof.uniform_profile(model).fingerprint)
    options = {"budget": budget, "compress_every": 0}
    with hkvprof.apply(model, theirs, **options), monkeypatch.context() as patch:
        patch.setattr(Profile, "allocation", lambda *args, **rest: given)
        patch.setattr(ragged, "pack", told)
        made: Any = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    reply = made.sequences[0, len(prompt) :]
    scores = torch.cat(made.logits).log_softmax(dim=-1)
    names = [
        f"model.layers.{layer}.self_attn.attn.head{head}"
        for layer in range(GRID.layers)
        for head in range(GRID.kv_heads)
    ]
    return Answer(
        dict(zip(names, kept, strict=False)), dict(zip(names, stored, strict=False)),
        reply.tolist(), scores.gather(1, reply[:, None])[:, 0].tolist(),
    )  # fmt: skip
