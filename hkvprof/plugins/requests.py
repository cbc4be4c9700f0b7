"""What harnesses ask of a model: generation settings, and log-likelihoods of continuations.

A single pass over context and continuation would be dense from end to end, and a pass of several
tokens over a compressed cache sees all tokens of dynamic heads. So the context is prefilled and
compressed, and the continuation's tokens follow one by one, as in generation. No harness is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from hkvprof.errors import SampleError, UsageError
from hkvprof.models.calls import with_cache
from hkvprof.runtime.receipt import Receipt

MAX_NEW_TOKENS = 4096
"""Where a task does not say; the harness's own transformers models use the same."""

_KNOWN = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
    "until",
    "image_aspect_ratio",
)


@dataclass(frozen=True)
class Generation:
    """Arguments for `generate()`, and the texts at which a reply ends."""

    options: dict[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Generation:
        """From a task's `generation_kwargs`; None counts as not given.

        Temperature 0 is greedy; above 0 it samples unless `do_sample` is false. Raises UsageError
        naming settings that cannot be kept.
        """
        given = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(_KNOWN))
        if unknown:
            raise UsageError(
                f"the task sets {', '.join(unknown)} in generation_kwargs, which --model hkvprof "
                f"does not support: expected {', '.join(_KNOWN)}"
            )
        if given.get("image_aspect_ratio", "original") != "original":
            raise UsageError(
                f"the task asks for image_aspect_ratio={given['image_aspect_ratio']!r}: expected "
                "'original' (images go through the model's own processor)"
            )
        options: dict[str, Any] = {
            "max_new_tokens": int(given.get("max_new_tokens", MAX_NEW_TOKENS)),
            **_sampling(given),
        }
        if given.get("num_beams", 1) != 1:
            options["num_beams"] = int(given["num_beams"])
        if "repetition_penalty" in given:
            options["repetition_penalty"] = float(given["repetition_penalty"])
        until = given.get("until", ())
        texts = (until,) if isinstance(until, str) else tuple(until)
        return cls(options, tuple(text for text in texts if text))

    def cut(self, reply: str) -> str:
        """The reply up to the first of the texts that end it."""
        return reply[: min((at for at in map(reply.find, self.until) if at >= 0), default=None)]


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    temperature = float(given.get("temperature", 0))
    cold = temperature == 0 and "temperature" in given
    if cold or not given.get("do_sample", temperature > 0):
        return {"do_sample": False}
    named = {name: given[name] for name in ("top_p", "top_k") if name in given}
    warmth = {"temperature": temperature} if temperature else {}
    return {"do_sample": True, **warmth, **named}


@dataclass(frozen=True)
class Pair:
    """Token ids of a context and of the continuation to be scored; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def fit(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> Pair:
        """Cut the context from the left so that a model of `longest` positions can score the pair.

        Raises SampleError where nothing would be left of the context, or nothing is to be scored.
        """
        if not continuation:
            raise SampleError("a loglikelihood request has an empty continuation: expected text")
        room = longest + 1 - len(continuation)  # the last token is scored, never read
        if not context or room < 1:
            raise SampleError(
                f"a loglikelihood request has {len(context)} tokens of context and "
                f"{len(continuation)} of continuation: expected at least one of context, and at "
                f"most {longest} of continuation (max_length)"
            )
        return cls(tuple(context[-room:]), tuple(continuation))


@dataclass(frozen=True)
class Score:
    """Summed log-probability of a continuation, and whether greedy decoding would write it."""

    logprob: float
    greedy: bool


def batches(pairs: Sequence[Pair], size: int, min_tokens: int) -> Iterator[list[int]]:
    """Numbers of the pairs in batches: long contexts first, equal ones side by side.

    Contexts below `min_tokens`, which stay dense, never share a batch with longer ones, which
    would have them compressed.
    """

    def key(i: int) -> tuple[int, tuple[int, ...], int]:
        return -len(pairs[i].context), pairs[i].context, -len(pairs[i].continuation)

    batch: list[int] = []
    for i in sorted(range(len(pairs)), key=key):
        short = len(pairs[i].context) < min_tokens
        parted = bool(batch) and short != (len(pairs[batch[0]].context) < min_tokens)
        if len(batch) == size or parted:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score(
    model: Any,
    new_cache: Callable[[int], Any],
    pairs: Sequence[Pair],
    dtype: torch.dtype | None = None,
) -> tuple[list[Score], Receipt]:
    """Score `pairs` on one cache, and the cache's receipt, one row per pair.

    `new_cache` makes a cache for a prompt of so many positions (`Handle.new_cache`). A context of
    several pairs is prefilled once. `dtype` is that of the softmax; None: the logits' own.
    """
    contexts = list(dict.fromkeys(pair.context for pair in pairs))
    ids, mask = (tensor.to(model.device) for tensor in _left_padded(contexts))
    cache = new_cache(ids.shape[1])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = _forward(model, cache, ids, mask, positions)
    rows = torch.tensor([contexts.index(pair.context) for pair in pairs], device=ids.device)
    if len(contexts) < len(pairs):
        cache.reorder_cache(rows)
    mask, positions, logits = mask[rows], positions[rows, -1:], logits[rows]
    targets = _right_padded([pair.continuation for pair in pairs]).to(ids.device)
    found, hits = [], []
    for step in range(targets.shape[1]):
        wanted = targets[:, step : step + 1]
        if step:
            mask = torch.cat([mask, torch.ones_like(wanted)], dim=1)
            positions = positions + 1
            logits = _forward(model, cache, targets[:, step - 1 : step], mask, positions)
        chances = functional.log_softmax(logits, dim=-1, dtype=dtype)
        found.append(chances.gather(-1, wanted))
        hits.append(logits.argmax(dim=-1, keepdim=True) == wanted)
    lengths = [len(pair.continuation) for pair in pairs]
    return _summed(torch.cat(found, dim=1), torch.cat(hits, dim=1), lengths), cache.receipt()


def _forward(
    model: Any,
    cache: Any,
    ids: Int[Tensor, "rows new"],
    mask: Int[Tensor, "rows seen"],
    positions: Int[Tensor, "rows new"],
) -> Float[Tensor, "rows vocabulary"]:
    """Logits after the last token."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **with_cache(model, cache),
        use_cache=True,
        **options,
    )
    last: Tensor = output.logits[:, -1]
    return last


def _summed(
    chances: Float[Tensor, "pairs steps"], hits: Bool[Tensor, "pairs steps"], lengths: list[int]
) -> list[Score]:
    return [
        Score(float(chances[row, :length].sum()), bool(hits[row, :length].all()))
        for row, length in enumerate(lengths)
    ]


def _left_padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """(ids, mask); padding repeats the row's first token, the mask hides it."""
    longest = max(map(len, rows))
    ids = [[row[0]] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _right_padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "rows tokens"]:
    """Token ids, rows filled up on the right: what follows a finished row is never counted."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
