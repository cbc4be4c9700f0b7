"""The picture of README: one question of tinyvl, answered from three caches.

    python -m tools.same_bytes -o docs/same-bytes.png

Every cell of a picture is one token. It is as visible as the share of the model's KV heads that
hold it on the device, a mean over the steps of the answer.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import hkvprof
from hkvprof.evaluate.baselines.base import PromptView, find
from hkvprof.evaluate.baselines.session import applied, decide, fill
from hkvprof.evaluate.prefill import Prefill, capture
from hkvprof.files.atomic import write_atomically
from hkvprof.heads import Modality
from hkvprof.models.calls import with_cache
from hkvprof.report.plot import own_style
from hkvprof.runtime import CompressedCache
from hkvprof.samples.read import Sample
from hkvprof.testbed.generator import make_sample

PROFILE = Path("profiles/tinyvl.hkv.safetensors")
BUDGET, RIVAL = 0.05, "snapkv"
TASK, SEED, IMAGES = "list", 1, 12
CELL = 28
"""Pixels of a cell."""
WHOLE, LEAST = 0.25, 0.08
"""Share of heads from which on a cell is shown in full, and what is left of one that none holds."""


@dataclass(frozen=True)
class Panel:
    """A cache's answer; `held` [visual tokens] is the share of heads that hold each of them."""

    title: str
    answer: str
    nbytes: int
    held: NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """A sample on a model, its prompt read once."""

    model: Any
    processor: Any
    sample: Sample
    prefill: Prefill
    vision: NDArray[np.int64]

    @classmethod
    def of(cls, model: Any, processor: Any, sample: Sample) -> Asked:
        """Encode and read the sample's prompt."""
        encoded = processor.encode([sample.messages])
        places = np.flatnonzero(encoded.modality[0].numpy() == Modality.IMAGE)
        return cls(model, processor, sample, capture(model, encoded), places)

    def panel(self, title: str, cache: Any) -> Panel:
        """Decode greedily from a cache that holds the prompt, and look at it at every step."""
        ends = {self.processor.tokenizer.eos_token_id}
        self.prefill.restore(self.model)
        token = int(self.prefill.logits[0].argmax())
        reply: list[int] = []
        held, nbytes = [self._held(cache)], self.prefill.dense_bytes()
        if isinstance(cache, CompressedCache):
            nbytes = cache.receipt().resident_bytes
        while token not in ends and len(reply) < 16:
            reply.append(token)
            ids = torch.tensor([[token]], device=self.model.device)
            with torch.no_grad():
                output = self.model(input_ids=ids, **with_cache(self.model, cache))
            token = int(output.logits.argmax())
            held.append(self._held(cache))
        shown = np.mean(held[1:] or held, axis=0)
        return Panel(title, str(self.processor.decode(reply)).strip(), nbytes, shown)

    def _held(self, cache: Any) -> NDArray[np.float64]:
        """Share of heads on whose device memory each visual token lies now, by the nearest key."""
        if not isinstance(cache, CompressedCache):
            return np.ones(len(self.vision))
        count, heads = np.zeros(self.prefill.tokens), 0
        for layer, call in zip(cache.covered, self.prefill.calls, strict=True):
            ragged = layer.ragged
            assert ragged is not None, "every layer of this prompt is compressed"
            for head in range(ragged.kv_heads):
                keys, _ = ragged.resident(head)
                kept = keys[: len(keys) - ragged.tail].float()
                near = torch.cdist(kept, call.key[0, head].float()).argmin(dim=1)
                count[np.unique(near.numpy())] += 1
                heads += 1
        return count[self.vision] / heads


def panels(asked: Asked, profile: Any, budget: float, rival: str) -> list[Panel]:
    """The answers of the full cache, of hkvprof and of another method at the same bytes."""
    prefill, model = asked.prefill, asked.model
    full = asked.panel("full cache", prefill.dense_cache())
    with hkvprof.apply(model, profile, budget, min_tokens=1) as handle:
        cache = handle.new_cache(prefill.tokens)
        prefill.fill(cache)
        ours = asked.panel(f"hkvprof, {budget:.0%}", cache)
    method = find(rival)
    selected = decide(method, PromptView(model, prefill, budget, profile))
    with applied(model, method, budget, profile) as handle:
        cache = handle.new_cache(prefill.tokens)
        fill(cache, prefill, selected)
        theirs = asked.panel(f"{method.title}, {budget:.0%}", cache)
    return [full, ours, theirs]


def draw(sample: Sample, found: Sequence[Panel]) -> Any:
    """A strip of the pictures per panel, their cells faded by what is not held."""
    from matplotlib.figure import Figure

    pictures = [np.asarray(part["image"]) for part in parts(sample) if part["type"] == "image"]
    figure = Figure(figsize=(10, 4.4), dpi=100, facecolor="white")
    figure.text(0.01, 0.945, f"“{question(sample)}”", size=13, weight="bold")
    figure.text(0.99, 0.945, f"right: {sample.reply}", size=11, ha="right")
    for row, panel in enumerate(found):
        top = 0.86 - 0.285 * row
        mark, colour = ("✓", "#00724f") if panel.answer == sample.reply else ("✗", "#b03000")
        kept = f"{panel.title}: {panel.nbytes / 1024:,.0f} KiB on the device"
        figure.text(0.01, top, kept, size=11, weight="bold")
        figure.text(0.99, top, f"{panel.answer} {mark}", size=11, color=colour, ha="right",
                    weight="bold")  # fmt: skip
        _strip(figure, pictures, panel.held, top - 0.205)
    told = (
        f"A cell is one token; shown in full where {WHOLE:.0%} of KV heads or more hold it on the "
    )
    figure.text(0.01, 0.02, f"{told}device while the answer is decoded, else fainter.", size=9,
                color="#444444")  # fmt: skip
    return figure


def _strip(figure: Any, pictures: Sequence[Any], held: Any, bottom: float) -> None:
    """All pictures of a sample side by side, in a frame each."""
    width, start = 0.98 / len(pictures), 0
    for number, picture in enumerate(pictures):
        rows, columns = picture.shape[0] // CELL, picture.shape[1] // CELL
        share = held[start : start + rows * columns].reshape(rows, columns)
        start += rows * columns
        light = np.clip(share / WHOLE, LEAST, 1)
        seen = np.kron(light, np.ones((CELL, CELL)))[..., None]
        axes = figure.add_axes((0.01 + number * width, bottom, width * 0.95, 0.19))
        axes.imshow((255 - (255 - picture) * seen).astype(np.uint8))
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"#{number + 1}", size=8, labelpad=2)
        for side in axes.spines.values():
            side.set(visible=True, color="#999999")


def parts(sample: Sample) -> Sequence[Any]:
    """The parts of a sample's one message."""
    return list(sample.messages[0]["content"])


def question(sample: Sample) -> str:
    """The text that ends a sample's message."""
    return str(parts(sample)[-1]["text"])


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/same-bytes.png"))
    parser.add_argument("--profile", type=Path, default=PROFILE)
    parser.add_argument("--task", default=TASK)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    model, processor = hkvprof.load_model("tinyvl", dtype="bfloat16")
    sample = make_sample(options.task, options.seed, images=IMAGES, split="heldout")
    profile = hkvprof.load_profile(options.profile)
    found = panels(Asked.of(model, processor, sample), profile, BUDGET, RIVAL)
    for panel in found:
        sys.stdout.write(f"{panel.title}: {panel.answer} ({panel.nbytes:,} bytes)\n")
    with own_style():
        stream = io.BytesIO()
        draw(sample, found).savefig(stream, format="png", metadata={"Software": None})
    write_atomically(options.output, stream.getvalue())


if __name__ == "__main__":
    main()
