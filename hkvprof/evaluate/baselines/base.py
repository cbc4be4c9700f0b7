"""What every method of the comparison is: one function from a prompt to what its heads keep."""

from __future__ import annotations

import importlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hkvprof.calibration.observe import ObservedCache, Watch
from hkvprof.errors import ModelError, UsageError
from hkvprof.evaluate.prefill import Prefill
from hkvprof.heads import HeadGrid, KeepRule
from hkvprof.models.adapter import ModelView
from hkvprof.models.attention import hooked_attention
from hkvprof.models.calls import rope_holder
from hkvprof.models.decoder_input import Rotation
from hkvprof.profile.record import Profile
from hkvprof.runtime.options import SMOOTHING
from hkvprof.runtime.plan import HeadPlan


@dataclass(frozen=True)
class LayerPrompt:
    """Post-RoPE queries, keys and values of a prompt in one layer, and the scale of its logits."""

    query: Float[Tensor, "query_heads tokens dim"]
    key: Float[Tensor, "kv_heads tokens dim"]
    value: Float[Tensor, "kv_heads tokens dim"]
    scaling: float

    def keep(self, head: int, tokens: Int[Tensor, " kept"]) -> Kept:
        """These tokens (in ascending order) of one KV head, unchanged."""
        ordered = tokens.sort().values
        return Kept(self.key[head, ordered], self.value[head, ordered])


@dataclass(frozen=True)
class Kept:
    """Keys and values that a head keeps on the device; the rest of the prompt is gone.

    They may differ from the prompt's (merging, a compensation token); every row costs a token, or
    all of them `stored` bytes, where the method codes them in few bits: they stand here decoded.
    """

    key: Float[Tensor, "kept dim"]
    value: Float[Tensor, "kept dim"]
    stored: int | None = None


Choice = Kept | HeadPlan
"""A head's fate: what it keeps, or a strategy of the runtime's with its all-in share."""

Selection = list[list[Choice]]
"""Per covered layer, per KV head."""


@dataclass
class PromptView:
    """What a method may look at: a whole prompt (batch of one) and how much it may keep.

    `share` is the all-in share of dense bytes, `profile` that of the model (None if there is
    none), `seed` for methods that draw. `memo` is shared by all shares of one prompt.
    `counted_itemsize`: bytes that an element of keys and values counts (None: those it has);
    `calibration` gives prompts of another split to methods that fit something once per model.
    """

    model: Any
    prefill: Prefill
    share: float
    profile: Profile | None = None
    seed: int = 0
    memo: dict[str, tuple[Any, float]] = field(default_factory=dict)
    counted_itemsize: int | None = None
    calibration: Callable[[], Sequence[Prefill]] | None = None
    borrowed_seconds: float = 0.0
    """Time that what was taken from the memo had cost."""

    @cached_property
    def layers(self) -> tuple[LayerPrompt, ...]:
        """Queries, keys and values of every covered layer."""
        return tuple(
            LayerPrompt(call.query[0], call.key[0], call.value[0], call.scaling)
            for call in self.prefill.calls
        )

    def rotation(self, method: str) -> Rotation:
        """How the model rotates queries. Raises ModelError, naming the method, if it does not."""
        rotation = self.prefill.decoder_input.rotation
        if rotation is None:
            raise ModelError(
                f"{method} needs rotary position embeddings, and {type(self.model).__name__} has "
                "none: leave this method out"
            )
        return rotation

    @property
    def grid(self) -> HeadGrid:
        """The model's attention geometry."""
        return self.prefill.view.grid

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.prefill.tokens

    @property
    def text(self) -> Bool[Tensor, " tokens"]:
        """Which tokens are text; the others are vision (or long context, which plays its part)."""
        return self.prefill.text

    @property
    def room(self) -> int:
        """Tokens that a head may keep on average: floor(share * tokens), at least 1."""
        return max(1, int(self.share * self.tokens + 1e-6))

    @property
    def itemsize(self) -> int:
        """Bytes per element of keys and values, as they count."""
        return self.counted_itemsize or int(self.prefill.calls[0].key.element_size())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one head."""
        return 2 * self.grid.head_dim * self.itemsize

    @property
    def device(self) -> torch.device:
        """The device that holds keys and values."""
        return self.prefill.calls[0].key.device

    def need_profile(self, name: str) -> Profile:
        """The profile of this comparison. Raises UsageError where there is none."""
        if self.profile is None:
            raise UsageError(f"{name} needs a profile of the model: give --profile")
        return self.profile

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per prompt for all shares; its time counts every time."""
        if name in self.memo:
            value, seconds = self.memo[name]
            self.borrowed_seconds += seconds
            return value
        began = time.perf_counter()
        value = compute()
        self.memo[name] = (value, time.perf_counter() - began)
        return value

    def offline(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per model; its time is no request's."""
        known = _OFFLINE.setdefault(self.model, {})
        if name not in known:
            began = time.perf_counter()
            known[name] = compute()
            self.borrowed_seconds -= time.perf_counter() - began
        return known[name]


_OFFLINE: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
"""What methods know of a model before any prompt comes."""


@dataclass(frozen=True)
class Baseline:
    """A method by name: `paper` is its source, `select` decides what every head keeps.

    `keep` (None: the profile's) and `smoothing` are what the runtime's own strategies (HeadPlan)
    go by.
    """

    name: str
    title: str
    paper: str
    select: Callable[[PromptView], Selection]
    keep: KeepRule | None
    smoothing: float
    needs_profile: bool
    public: bool
    """Whether it is a peer's method, not an ablation of hkvprof."""


_REGISTRY: dict[str, Baseline] = {}


def baseline(
    name: str,
    title: str,
    paper: str,
    *,
    keep: KeepRule | None = None,
    smoothing: float = 0.0,
    needs_profile: bool = False,
    public: bool = True,
) -> Callable[[Callable[[PromptView], Selection]], Callable[[PromptView], Selection]]:
    """Register the decorated function under `name`."""

    def register(select: Callable[[PromptView], Selection]) -> Callable[[PromptView], Selection]:
        _register(
            Baseline(
                name, title, paper, select, keep or KeepRule(), smoothing, needs_profile, public
            )
        )
        return select

    return register


def ablation(
    name: str, title: str
) -> Callable[[Callable[[PromptView], Selection]], Callable[[PromptView], Selection]]:
    """Register a part of hkvprof itself: it keeps and smooths as the profile and runtime do."""

    def register(select: Callable[[PromptView], Selection]) -> Callable[[PromptView], Selection]:
        _register(Baseline(name, title, "hkvprof", select, None, SMOOTHING, True, False))
        return select

    return register


def _register(method: Baseline) -> None:
    assert method.name not in _REGISTRY, method.name
    _REGISTRY[method.name] = method


_FILES = (
    "streaming_llm", "snapkv", "pyramidkv", "adakv", "chunkkv", "keydiff", "expected_attention",
    "kvzip", "duo_attention", "razor_attention", "quest", "look_m", "madakv", "sparsemm",
    "hybridkv", "triattention", "kivi", "snapkv_int4", "rdkv", "kvtc", "random_tokens", "ablations",
)  # fmt: skip
"""Modules beside this one that register methods, in the order in which methods are listed."""


def baselines() -> dict[str, Baseline]:
    """All methods by name, in the order of the files whichever was imported first."""
    order = {f"hkvprof.evaluate.baselines.{file}": place for place, file in enumerate(_FILES)}
    for module in order:
        importlib.import_module(module)

    def place(method: Baseline) -> int:
        return order.get(method.select.__module__, len(order))

    return {method.name: method for method in sorted(_REGISTRY.values(), key=place)}


def find(name: str) -> Baseline:
    """The method called `name`. Raises UsageError."""
    known = baselines()
    if name not in known:
        raise UsageError(f"unknown baseline {name!r}: expected one of {', '.join(known)}")
    return known[name]


@contextmanager
def watched(model: Any, view: ModelView, watch: Watch) -> Iterator[ObservedCache]:
    """Within: a cache whose layers show their attention calls. Gradients are off.

    Qwen-VL's position offset of the current conversation, which is on the model, is put back.
    """
    holder = rope_holder(model)
    deltas = getattr(holder, "rope_deltas", None)
    try:
        with torch.no_grad(), hooked_attention(model):
            yield ObservedCache(view, watch)
    finally:
        if holder is not None:
            holder.rope_deltas = deltas
