"""Train a tinyvl from scratch: `python -m tools.tinyvl.train --out DIR --cpu-minutes 80`.

One process, two stages: four layers learn to look things up, then two layers are added without a
change of function and aggregation tasks join. The budget is CPU time of this process, so that a
busy machine gives the same model. `--resume` goes on from the last state in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hkvprof.errors import HkvError, UsageError
from hkvprof.testbed.generator import TASKS
from hkvprof.testbed.rendering import glyph_atlas, tick_patches
from tools.tinyvl import schedule
from tools.tinyvl.architecture import GROWN_LAYERS, build_model, grow_model, save_checkpoint
from tools.tinyvl.auxiliary import (
    GROWN_DEPTHS,
    LOOKUP_DEPTHS,
    SPREAD_HEADS,
    AuxiliaryHeads,
    entropy_floor_loss,
)
from tools.tinyvl.batching import Batch, collate
from tools.tinyvl.fastmodel import FastForward, Trace

_VARIANTS = 8
_ATLAS_STEPS = 20
"""Glyphs are drawn afresh this often: with fixed drawings the model learns the jitter by heart."""
_TASK_NAMES = tuple(TASKS)


@dataclass(frozen=True)
class Settings:
    """What a run is; `steps` replaces the CPU budget where a run must be reproducible."""

    seed: int = 0
    cpu_minutes: float = 80.0
    steps: int | None = None
    tokens: int = 6000
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    entropy_floor: float = 0.8
    entropy_weight: float = 0.5
    device: str = "cpu"
    compute: str = "bfloat16"


@dataclass
class Progress:
    """Counters of a run; CPU and wall seconds include those before a resume."""

    step: int = 0
    stage_step: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    tokens: int = 0
    questions: int = 0
    is_grown: bool = False
    loss: float = 0.0
    curriculum: schedule.Curriculum = field(default_factory=schedule.Curriculum)
    accuracy: schedule.RunningAccuracy = field(default_factory=schedule.RunningAccuracy)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the replies; a reply of n tokens weighs sqrt(n)."""
    per_token = F.cross_entropy(logits, batch.targets, reduction="none")
    weight = torch.bincount(batch.question_of)[batch.question_of].float() ** -0.5
    return (per_token * weight).sum() / weight.sum()


def whole_replies(logits: Tensor, batch: Batch) -> dict[str, tuple[float, int]]:
    """Per task, the share of replies right in every token, and their number."""
    right = (logits.argmax(-1) == batch.targets).long()
    good = torch.ones_like(batch.tasks).scatter_reduce(0, batch.question_of, right, "amin")
    found = {}
    for index in batch.tasks.unique().tolist():
        of_task = good[batch.tasks == index].float()
        found[_TASK_NAMES[index]] = (of_task.mean().item(), len(of_task))
    return found


def build_optimizers(
    model: Any, heads: AuxiliaryHeads, settings: Settings
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms, biases and auxiliary heads."""
    hidden, tables, vectors = [], list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        inner = any(part in name for part in ("layers.", "blocks.", "merger"))
        if parameter.ndim == 2 and inner:
            hidden.append(parameter)
        else:
            (tables if parameter.ndim >= 2 else vectors).append(parameter)
    for parameter in heads.parameters():
        (tables if parameter.ndim >= 2 else vectors).append(parameter)
    muon = torch.optim.Muon(
        hidden,
        lr=settings.muon_rate,
        momentum=0.95,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.adam_rate,
        betas=(0.9, 0.98),
        eps=1e-9,
    )
    for group in [*muon.param_groups, *adam.param_groups]:
        group["base_lr"] = group["lr"]
    return [muon, adam]


class Trainer:
    """A run: model, auxiliary heads, optimizers and progress."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.progress = Progress()
        self.device = torch.device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.compute)
        self.heads = AuxiliaryHeads(settings.seed).to(self.device)
        self.ticks = torch.from_numpy(tick_patches()).to(self.device, self.dtype)
        self._atlas: tuple[int, Tensor] | None = None
        self._use_model(build_model(4, settings.seed))

    def _use_model(self, model: Any) -> None:
        self.model = model.train().to(self.device)
        self.fast = FastForward(self.model, self.dtype)
        self.optimizers = build_optimizers(self.model, self.heads, self.settings)

    @property
    def fraction(self) -> float:
        """Share of the budget that is used up."""
        if self.settings.steps is not None:
            return self.progress.step / self.settings.steps
        return self.progress.cpu_seconds / (60 * self.settings.cpu_minutes)

    def _grow(self) -> None:
        """Enter the second stage."""
        self._use_model(grow_model(self.model.cpu(), self.settings.seed + 1))
        self.progress.is_grown = True
        self.progress.stage_step = 0
        self.progress.accuracy.values.clear()

    def _random(self, purpose: str) -> random.Random:
        """Random numbers of this step: nothing to save, and the same after a resume."""
        return random.Random(f"{self.settings.seed}/{purpose}/{self.progress.step}")

    def _glyphs(self) -> Tensor:
        """The drawings in use, [classes * variants, 4, 1176]."""
        period = self.progress.step // _ATLAS_STEPS
        if self._atlas is None or self._atlas[0] != period:
            rng = random.Random(f"{self.settings.seed}/atlas/{period}")
            drawn = torch.from_numpy(glyph_atlas(_VARIANTS, rng))
            self._atlas = (period, drawn.to(self.device, self.dtype))
        return self._atlas[1]

    def _batch(self) -> Batch:
        rng = self._random("scenes")
        progress = self.progress
        plan = schedule.plan_step(self.fraction, progress.curriculum, progress.accuracy, rng)
        odds = schedule.task_odds(self.fraction, progress.accuracy)
        batch = collate(*schedule.draw_step(plan, self.settings.tokens, odds, rng))
        varied = batch.vary_cells(_VARIANTS, np.random.default_rng(rng.getrandbits(64)))
        return varied.to(self.device)

    def _auxiliary_loss(self, batch: Batch, trace: Trace) -> Tensor:
        depths = GROWN_DEPTHS if self.progress.is_grown else LOOKUP_DEPTHS
        total = trace.hidden[0].new_zeros((), dtype=torch.float32)
        role_weight = schedule.role_weight(self.fraction)
        if role_weight > 0:
            total = total + role_weight * self.heads.role_loss(batch, trace, depths)
        sum_weight = schedule.sum_weight(self.fraction)
        if sum_weight > 0:
            total = total + sum_weight * self.heads.sum_loss(batch, trace, depths)
        if trace.attention:
            floor = entropy_floor_loss(batch, trace, self.settings.entropy_floor)
            total = total + self.settings.entropy_weight * floor
        return total

    def step(self) -> float:
        """One update; returns the loss of the replies."""
        cpu, wall = time.process_time(), time.monotonic()
        if not self.progress.is_grown and not schedule.is_lookup_stage(self.fraction):
            self._grow()
        keep_spread = self.progress.is_grown and self.settings.entropy_floor > 0
        if keep_spread and self.fraction >= schedule.ENTROPY_START:
            self.fast.watched_heads = dict.fromkeys(GROWN_LAYERS, SPREAD_HEADS)
        rate = schedule.learning_rate(self.fraction, self.progress.stage_step)
        batch = self._batch()
        logits, trace = self.fast(batch, self._glyphs(), self.ticks)
        loss = answer_loss(logits, batch)
        (loss + self._auxiliary_loss(batch, trace)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._account(loss.item(), logits.detach(), batch)
        self.progress.cpu_seconds += time.process_time() - cpu
        self.progress.wall_seconds += time.monotonic() - wall
        return loss.item()

    def _account(self, loss: float, logits: Tensor, batch: Batch) -> None:
        progress = self.progress
        for task, (accuracy, count) in whole_replies(logits, batch).items():
            progress.accuracy.update(task, accuracy, count)
        progress.loss = 0.95 * progress.loss + 0.05 * loss if progress.step else loss
        progress.tokens += batch.ids.numel()
        progress.questions += len(batch.tasks)
        progress.step += 1
        progress.stage_step += 1
        if not progress.is_grown:
            within = schedule.stage_fraction(min(self.fraction, 0.999 * schedule.LOOKUP_STAGE_END))
            progress.curriculum.advance(within, progress.accuracy)

    def save_state(self, path: Path) -> None:
        """Everything needed to go on, written atomically."""
        partial = path.with_suffix(".partial")
        state = {
            "settings": asdict(self.settings),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, partial)
        os.replace(partial, path)

    @classmethod
    def from_state(cls, path: Path) -> Trainer:
        """Go on from a saved state."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer = cls(Settings(**state["settings"]))
        progress = dict(state["progress"])
        progress["curriculum"] = schedule.Curriculum(**progress["curriculum"])
        progress["accuracy"] = schedule.RunningAccuracy(**progress["accuracy"])
        trainer.progress = Progress(**progress)
        trainer.heads.load_state_dict(state["heads"])
        if trainer.progress.is_grown:
            layers = 4 + len(GROWN_LAYERS)
            trainer._use_model(build_model(layers, trainer.settings.seed))
        trainer.model.load_state_dict(state["model"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return trainer

    def report(self) -> dict[str, Any]:
        """One line of the log."""
        progress = self.progress
        return {
            "step": progress.step,
            "fraction": round(self.fraction, 4),
            "cpu_minutes": round(progress.cpu_seconds / 60, 2),
            "wall_minutes": round(progress.wall_seconds / 60, 2),
            "stage": "grown" if progress.is_grown else f"lookup {progress.curriculum.level}",
            "loss": round(progress.loss, 4),
            "million_tokens": round(progress.tokens / 1e6, 3),
            "questions": progress.questions,
            "accuracy": {k: round(v, 3) for k, v in progress.accuracy.values.items()},
        }


def run(trainer: Trainer, out: Path, log_seconds: float = 30, save_seconds: float = 240) -> None:
    """Train to the end of the budget and write the checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    last_log = last_save = time.monotonic()
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.fraction < 1:
            trainer.step()
            now = time.monotonic()
            finished = trainer.fraction >= 1
            if finished or now - last_log > log_seconds:
                last_log = now
                line = json.dumps(trainer.report())
                log.write(line + "\n")
                log.flush()
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            if finished or now - last_save > save_seconds:
                last_save = now
                trainer.save_state(out / "state.pt")
    save_checkpoint(trainer.model, out / "checkpoint")
    summary = {"settings": asdict(trainer.settings), **trainer.report()}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def start(out: Path, settings: Settings, resume: bool) -> Trainer:
    """A new run, or the one in the folder."""
    state = out / "state.pt"
    if resume:
        if not state.is_file():
            raise UsageError(f"--resume: {state} does not exist; start without --resume")
        return Trainer.from_state(state)
    if state.exists():
        raise UsageError(f"{state} exists: go on with --resume, or choose another --out")
    return Trainer(settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m tools.tinyvl.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--cpu-minutes", type=float, default=defaults.cpu_minutes)
    parser.add_argument("--steps", type=int, help="budget in steps instead of CPU time")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens of a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=defaults.device)
    parser.add_argument("--compute", choices=["bfloat16", "float32"], default=defaults.compute)
    parser.add_argument("--entropy-floor", type=float, default=defaults.entropy_floor)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop("threads"))
    out, resume = options.pop("out"), options.pop("resume")
    try:
        run(start(out, Settings(**options), resume), out)
    except HkvError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
