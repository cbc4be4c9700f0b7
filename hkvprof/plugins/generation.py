"""Generation settings of lmms-eval tasks as arguments of `generate()`. No torch, no harness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hkvprof.errors import UsageError

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
