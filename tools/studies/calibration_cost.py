"""What calibration costs beside reading the same prompts, as ratios of interleaved pairs.

    python -m tools.studies.calibration_cost [--model smollm2] [--tokens 4096] [--recipe paper]

`paper` stands against one plain prefill of every sample, `measured` against prefill and decoding of
the replies, token by token. Everything that `hkvprof.calibrate` does counts, index and confidence
included. Prompts are random token ids, all but the last of which play an image, so that 64 rows of
text see all of it: the most that calibration looks at. `--model qwen2.5-vl-7b` has that shape and
random weights; `--layers` makes a model of fewer layers, which weighs fixed costs more. CPU time is
the process's; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

import hkvprof
from hkvprof.heads import Modality
from hkvprof.models.calls import cache_of, last_row_only, with_cache
from hkvprof.models.processing import ChatProcessor, Encoded
from hkvprof.models.shapes import SHAPES, build_shape
from hkvprof.samples.read import Sample

QUESTION = 80
"""Text tokens at the prompt's end: more than the rows that are looked at."""


class NumberProcessor(ChatProcessor):
    """A processor whose texts are token ids: `17 4 903`."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(eos_token_id=None)

    def render(self, conversation: Any, *, reply_next: bool) -> str:
        """All ids of all turns."""
        parts = [part["text"] for turn in conversation for part in turn["content"]]
        return " ".join(parts) + " "

    def encode(self, conversations: Sequence[Any]) -> Encoded:
        """One prompt; all but its question counts as an image."""
        (conversation,) = conversations
        ids = torch.tensor([self.encode_text(self.render(conversation, reply_next=True))])
        modality = torch.full_like(ids, int(Modality.IMAGE))
        modality[:, -QUESTION:] = int(Modality.TEXT)
        return Encoded({"input_ids": ids}, modality)

    def encode_text(self, text: str) -> list[int]:
        """The ids."""
        return [int(number) for number in text.split()]


def make_samples(count: int, tokens: int, reply: int) -> list[Sample]:
    """Random prompts with random replies."""
    random = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        ids = torch.randint(5, 1000, (tokens + reply,), generator=random).tolist()
        text = " ".join(map(str, ids[:tokens]))
        messages = ({"role": "user", "content": [{"type": "text", "text": text}]},)
        said = " ".join(map(str, ids[tokens:]))
        samples.append(Sample(f"s{number}", "random", messages, reply=said))
    return samples


def load(name: str, layers: int | None) -> Any:
    """The model in bfloat16, of its first layers alone if asked for."""
    if name in SHAPES:
        return build_shape(name, layers or 1, "bfloat16", "cpu")
    model, _ = hkvprof.load_model(name, dtype="bfloat16", device="cpu")
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


@torch.no_grad()
def read(model: Any, samples: Sequence[Sample], replies: bool) -> None:
    """Plain prefill of every prompt, and decoding of the replies if asked for."""
    processor = NumberProcessor()
    for sample in samples:
        encoded = processor.encode([sample.messages])
        output = model(**encoded.inputs, use_cache=True, **last_row_only(model))
        if replies:
            for token in processor.encode_text(sample.reply or ""):
                model(input_ids=torch.tensor([[token]]), **with_cache(model, cache_of(output)))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU time."""
    clock, process = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - process


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="alias, or a shape: qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, help="first layers alone; of a shape: 1")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--recipe", default="paper", choices=["paper", "measured"])
    parser.add_argument("--samples", type=int, default=2, help="per calibration")
    parser.add_argument("--reply", type=int, default=32, help="tokens of every reply")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    model = load(options.model, options.layers)
    samples = make_samples(options.samples, options.tokens, options.reply)
    both = options.recipe == "measured"
    short = make_samples(1, 256, options.reply)
    recipe = hkvprof.Recipe(options.recipe)
    hkvprof.calibrate(model, NumberProcessor(), short, recipe)  # warm-up
    read(model, short, both)
    plain, ours = [], []
    for _ in range(options.pairs):
        plain.append(timed(lambda: read(model, samples, both)))
        ours.append(timed(lambda: hkvprof.calibrate(model, NumberProcessor(), samples, recipe)))
    ratios = [[o / p for o, p in zip(*pair, strict=True)] for pair in zip(ours, plain, strict=True)]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    against = "prefill and decoding" if both else "prefill"
    what = f"{options.samples} samples of {options.tokens} tokens"
    sys.stdout.write(
        f"{options.model}, {layers} layers, {what}, bfloat16, {torch.get_num_threads()} threads\n"
        f"{options.recipe} over plain {against}, median of {options.pairs} pairs (all): "
        f"clock {_told([r[0] for r in ratios])}, CPU time {_told([r[1] for r in ratios])}\n"
        f"plain {against} {median(p[0] for p in plain):.1f} s by the clock\n"
    )


def _told(ratios: list[float]) -> str:
    return f"{median(ratios):.3f}x ({', '.join(f'{ratio:.3f}' for ratio in sorted(ratios))})"


if __name__ == "__main__":
    main()
