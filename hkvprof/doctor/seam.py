"""Looking at a decoder's attention from outside: on the stock model and on the hooked one alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hkvprof.models.adapter import ModelView


@dataclass(frozen=True)
class Seen:
    """One attention call: layer `number` in the model's cache, `query` [rows, query_heads, new,
    dim], `key` and `value` as its cache returned them, `mask` as it came; `base()` is what the
    model would do."""

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    base: Callable[[], tuple[Tensor, Any]]


Watch = Callable[[Seen], tuple[Tensor, Any]]


@contextmanager
def watched_attention(view: ModelView, watch: Watch) -> Iterator[None]:
    """Within, covered layers' attention is `watch`'s answer, under any implementation's name.

    The layers are told by the number that each attention module itself uses (`layer_idx`), masks
    and everything else stay the model's own. Restored at exit.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = view.text_config._attn_implementation
    base = ALL_ATTENTION_FUNCTIONS[name]
    covered = {id(module) for module in view.attention}

    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        if id(module) not in covered:  # the vision tower has its own way of calling
            return base(module, *args, **kwargs)
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attention_mask")
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        own = functools.partial(base, module, *args, **kwargs)
        return watch(Seen(module.layer_idx, query, key, value, mask, scale, own))

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        if ALL_ATTENTION_FUNCTIONS[name] is not base:  # somebody else had set it the same way
            ALL_ATTENTION_FUNCTIONS[name] = base
