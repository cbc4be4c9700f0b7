"""Which pass of which applied model runs now: a cache takes tokens from no other.

A compressed cache returns keys that only hkvprof's attention can read. Used by a model that is not
applied (any more), or round the model's own `forward`, it would give attention over half of the
keys; so its `update` asks here first.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from hkvprof.errors import CompressionError, ModelError, UsageError
from hkvprof.models.calls import Call
from hkvprof.runtime.copies import NeverCopied


class Owner(NeverCopied):
    """An applied model, as its caches and their copies know it: by name, and whether it still is
    applied.

    Counts running passes, so that nobody takes the profile off a model below a pass.
    """

    def __init__(self, model: Any) -> None:
        self.name = type(model).__name__
        self.model = weakref.ref(model)
        self.attached = True
        self.alone = threading.RLock()
        """Held by passes that keep something on the model; others run side by side."""
        self._running: Counter[int] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def passing(self, conversation: Any) -> Iterator[None]:
        """Within: this thread runs a pass with the cache of `conversation`, None for no cache."""
        thread = threading.get_ident()
        with self._changed:
            self.require_attached()
            self._running[thread] += 1
        token = _PASS.set(Pass(self, conversation))
        try:
            yield
        finally:
            _PASS.reset(token)
            with self._changed:
                self._running[thread] -= 1
                self._changed.notify_all()

    @contextmanager
    def leaving(self) -> Iterator[bool]:
        """Wait until no pass runs; within, none begins. Gives whether the model was attached.

        Raises UsageError within a pass of this thread, which would wait for itself.
        """
        with self._changed:
            if self._running[threading.get_ident()]:
                raise UsageError(
                    "detach() was called within a pass of the model: call it when model(...) has "
                    "returned"
                )
            self._changed.wait_for(lambda: not any(self._running.values()))
            was, self.attached = self.attached, False
            yield was

    def require_attached(self) -> None:
        """Raise UsageError when the profile was detached."""
        if not self.attached:
            raise UsageError("this handle is detached: call hkvprof.runtime.apply again")


@dataclass(frozen=True)
class Pass:
    """A running pass: the applied model's owner, and the conversation whose cache it fills."""

    owner: Owner
    conversation: Any


_PASS: ContextVar[Pass | None] = ContextVar("hkvprof_pass", default=None)


def current_pass() -> Pass | None:
    """This thread's running pass."""
    return _PASS.get()


def require_pass(owner: Owner | None, conversation: Any) -> None:
    """Raise CompressionError unless this thread runs a pass of `owner` with this conversation.

    Caches without an owner (made outside of a handle) ask for nothing.
    """
    if owner is None:
        return
    now = _PASS.get()
    if now is not None and now.owner is owner and now.conversation is conversation:
        return
    if not owner.attached:
        raise CompressionError(
            f"this cache was compressed for {owner.name} under a profile that has been detached; "
            "no model can read it without: keep the profile applied while the cache is in use, or "
            "start again with a new cache"
        )
    raise CompressionError(
        f"this cache is compressed and belongs to the {owner.name} that the profile is applied to, "
        "but tokens came from elsewhere (another model, or a part of it such as model.model): call "
        "that model itself, or use another cache"
    )


def refuse_batching(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Stands in for continuous batching. Raises ModelError."""
    raise ModelError(
        "continuous batching (generate_batch) brings a paged cache of its own, which hkvprof does "
        "not compress: use generate(), or detach first"
    )


def from_embeddings(call: Call) -> bool:
    """Whether `generate` starts from embeddings: then it uses a cache whatever the config says."""
    ids = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    return ids is None and call.get("inputs_embeds") is not None


def prompt_length(call: Call, config: Any) -> int | None:
    """Positions of the prompt that `generate` was given, where it is known beforehand.

    With a cache that holds some of them, tokens may be the new ones alone; the mask is of all.
    """
    if getattr(config, "token_healing", False):
        return None  # takes tokens off the prompt
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if (prompt := call.get(name)) is not None and prompt.ndim > 1:
            mask = call.get("attention_mask")
            whole = mask.shape[1] if mask is not None and mask.ndim == 2 else 0
            return max(int(prompt.shape[1]), int(whole))
    return None


def checkpoints(model: Any) -> bool:
    """Whether a part of the model computes its activations again (gradient checkpointing)."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
