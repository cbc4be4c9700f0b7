"""The check itself: questions to stock models first, then whole conversations with a profile."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from hkvprof.runtime.selfcheck import conversations, probes
from hkvprof.runtime.selfcheck.models import (
    image_talk,
    text_model,
    text_talk,
    undisturbed,
    vision_model,
)

Apply = Callable[..., Any]


def examine(apply: Apply) -> str:
    """What moved, in words; empty where all holds. `apply` is hkvprof's own."""
    with undisturbed():
        try:
            _ask(apply)
        except probes.MovedError as moved:
            return str(moved)
        except Exception as error:  # a release that has moved raises anything
            return _told(error)
    return ""


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if "/torch/" not in frame.filename][-1]
    where = f"{frame.name} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__} in {where}: {first}"


def _ask(apply: Apply) -> None:
    text, vision = text_model(), vision_model()
    talk, picture = text_talk(), image_talk()
    for model in (text, vision):
        probes.arguments_of_forward(model)
    probes.passes(text, talk)
    probes.rows_of_a_cache(text)
    probes.generation(text, talk)
    probes.offsets(vision, picture)
    conversations.kept_whole(apply, text, talk)
    conversations.kept_whole(apply, vision, picture)
    conversations.interleaved(apply, vision, [picture, text_talk(rows=1)])
    conversations.compressed(apply, text, text_talk(rows=1), offset=None)
    conversations.compressed(apply, vision, picture, offset=probes.OFFSET)
