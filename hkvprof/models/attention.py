"""The seam with transformers' attention: who computes what, without globals or patched modules.

A cache layer marks the keys it returns with a hook. The attention function registered here hands
marked calls to that hook and passes all others to the implementation the model had. Registration
adds names to transformers' tables when a model is first hooked; importing changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from hkvprof.errors import ModelError, UsageError
from hkvprof.models.wrappers import unwrap

_HOOK = "_hkvprof_hook"
_PREFIX = "hkvprof_"
_SUPPORTED = ("sdpa",)
_REFUSED = {
    "s_aux": "learned attention sinks",
    "softcap": "attention logit soft-capping",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window in a layer whose cache grows",
    "cache": "a paged cache",
}


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention: `query` [batch, query_heads, rows, dim], `key` and `value`
    as the cache layer returned them, `mask` as transformers made it. `dense()` runs the model's own
    implementation."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    dense: Callable[[], tuple[Tensor, Any]] = field(repr=False)


class AttentionHook(Protocol):
    """What a cache layer offers to the attention function."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Return ([batch, rows, query_heads, dim], weights or None)."""
        ...


Guard = Callable[[nn.Module], None]
_GUARDS: weakref.WeakKeyDictionary[nn.Module, Guard] = weakref.WeakKeyDictionary()
"""Attention modules of applied models, and whom to ask before one computes without our cache."""


@contextmanager
def guarded(modules: Iterable[nn.Module], guard: Guard) -> Iterator[None]:
    """Within: `guard` is called with any of `modules` that attends to keys that are not marked.

    The attention function is reached on every path into a model, so that nothing goes round it.
    """
    modules = tuple(modules)
    for module in modules:
        _GUARDS[module] = guard
    try:
        yield
    finally:
        for module in modules:
            _GUARDS.pop(module, None)


def mark(key: Tensor, hook: AttentionHook) -> Tensor:
    """Attach `hook` to the keys that a cache layer returns.

    The reference is weak: a layer that holds its keys would else be a cycle, and its memory would
    wait for the garbage collector.
    """
    setattr(key, _HOOK, weakref.ref(hook))
    return key


@contextmanager
def hooked_attention(model: Any) -> Iterator[None]:
    """Route the decoder's attention of `model` through marked keys; restored at exit."""
    restore = hook_attention(model)
    try:
        yield
    finally:
        restore()


def hook_attention(model: Any) -> Callable[[], None]:
    """As `hooked_attention`, returning the function that restores.

    Raises ModelError for other implementations than SDPA (flash attention looks its kernel up under
    the implementation's name), UsageError for a model that is hooked already.
    """
    model = unwrap(model)
    text_config = model.config.get_text_config(decoder=True)
    current = text_config._attn_implementation
    if str(current).startswith(_PREFIX):
        raise UsageError(
            "this model's attention is hooked already: detach the profile applied to it first"
        )
    if current not in _SUPPORTED:
        raise ModelError(
            f"attention implementation {current!r} is not supported: load the model with "
            "attn_implementation='sdpa', or call model.set_attn_implementation('sdpa'); on CUDA, "
            "torch runs its own flash kernels under that name"
        )
    name = _register(current)
    _set_decoder_attention(model, text_config, name)
    if text_config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} is not supported: its attention does not go through "
            "transformers' AttentionInterface"
        )

    def restore() -> None:
        _set_decoder_attention(model, text_config, current)

    return restore


def is_hooked(text_config: Any) -> bool:
    """Whether the attention of a decoder of this config goes through the function registered
    here."""
    return str(text_config._attn_implementation).startswith(_PREFIX)


def unhook_config(config: Any) -> None:
    """Give the config of a copy of a hooked model the attention that the original had before."""
    text_config = config.get_text_config(decoder=True)
    current = str(text_config._attn_implementation)
    if current.startswith(_PREFIX):
        text_config._attn_implementation = current.removeprefix(_PREFIX)


def _set_decoder_attention(model: Any, text_config: Any, name: str) -> None:
    if text_config is model.config:
        model.set_attn_implementation(name)
        return
    key = next(
        (k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), None
    )
    if key is None:
        raise ModelError(f"{type(model).__name__}: the decoder's config cannot be addressed")
    model.set_attn_implementation({key: name})


def _register(base: str) -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"{_PREFIX}{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        # The mask first: another thread that finds the name may run a model at once.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        AttentionInterface.register(name, _dispatcher(ALL_ATTENTION_FUNCTIONS[base]))
    return name


def _dispatcher(base: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        reference = getattr(key, _HOOK, None)
        hook: AttentionHook | None = None if reference is None else reference()

        def dense() -> tuple[Tensor, Any]:
            return base(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

        if hook is None:
            if (guard := _GUARDS.get(module)) is not None:
                guard(module)
            return dense()
        refuse_features(kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return hook.attend(AttentionCall(module, query, key, value, attention_mask, scale, dense))

    # torch.compile does not trace into caches: what it compiles around this call stays compiled.
    return torch.compiler.disable(attention)


def refuse_features(kwargs: dict[str, Any]) -> None:
    """Raise ModelError for attention arguments that compressed attention would ignore."""
    for key, what in _REFUSED.items():
        if kwargs.get(key) is not None:
            raise ModelError(f"this model's attention uses {what} ({key}), which is not supported")
    if kwargs.get("output_attentions"):
        raise ModelError(
            "output_attentions=True is not supported: attention weights are never formed; leave it "
            "out, or detach the profile first"
        )


class MarkedLayer(DynamicLayer):
    """Stores as the stock layer does and marks its keys; subclasses say what `attend` does."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store as usual and mark the keys."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return mark(keys, self), values
