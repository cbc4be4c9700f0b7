"""Ways in which a release of transformers could differ, one at a time.

What is moved stays usable under its new name, as it would be: the stock model computes as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM, Qwen2_5_VLModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from hkvprof.models.calls import NAMES, cache_keyword

Move = Callable[[pytest.MonkeyPatch], None]


def cache_argument_renamed(patch: pytest.MonkeyPatch) -> None:
    own, name = LlamaForCausalLM.forward, cache_keyword(LlamaForCausalLM.forward)

    def forward(
        self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        memory: Any = None, use_cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        others = {k: v for k, v in kwargs.items() if k not in NAMES}
        return own(self, input_ids, attention_mask, position_ids, **{name: memory}, **others)

    patch.setattr(LlamaForCausalLM, "forward", forward)


def position_argument_dropped(patch: pytest.MonkeyPatch) -> None:
    own, name = LlamaForCausalLM.forward, cache_keyword(LlamaForCausalLM.forward)
    scope: dict[str, Any] = {"own": own}
    exec(  # the argument's name is the release's
        f"def forward(self, input_ids=None, attention_mask=None, {name}=None, use_cache=None, **k):"
        f"\n    return own(self, input_ids, attention_mask, {name}={name}, **k)",
        scope,
    )
    patch.setattr(LlamaForCausalLM, "forward", scope["forward"])


def _attention(patch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    own = AttentionInterface.get_interface
    patch.setattr(
        AttentionInterface, "get_interface", lambda *args: functools.partial(change, own(*args))
    )


def scaling_not_told(patch: pytest.MonkeyPatch) -> None:
    def call(function: Any, *args: Any, scaling: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    _attention(patch, call)


def scaling_renamed(patch: pytest.MonkeyPatch) -> None:
    def call(function: Any, *args: Any, scaling: Any = None, **kwargs: Any) -> Any:
        return function(*args, softmax_scale=scaling, **kwargs)

    _attention(patch, call)


def mask_argument_renamed(patch: pytest.MonkeyPatch) -> None:
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args[:4], mask=args[4], **kwargs)

    _attention(patch, call)


def keys_repeated_before_attention(patch: pytest.MonkeyPatch) -> None:
    def call(function: Any, module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        return function(module, query, key.clone(), *args, **kwargs)

    _attention(patch, call)


def attention_not_looked_up_by_name(patch: pytest.MonkeyPatch) -> None:
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    patch.setattr(AttentionInterface, "get_interface", lambda *args: stock)


def _mask(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    own = modeling_llama.create_causal_mask

    def create(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        return None if found is None else change(found)

    patch.setattr(modeling_llama, "create_causal_mask", create)


def mask_without_heads(patch: pytest.MonkeyPatch) -> None:
    _mask(patch, lambda mask: mask[:, 0])


def mask_of_hidden_positions(patch: pytest.MonkeyPatch) -> None:
    """True where nothing may be seen."""
    _mask(patch, lambda mask: ~mask)


def update_not_called(patch: pytest.MonkeyPatch) -> None:
    """Caches write into their layers themselves."""

    def update(self: Any, keys: Tensor, values: Tensor, number: int, *a: Any, **k: Any) -> Any:
        return DynamicLayer.update(self.layers[number], keys, values)

    patch.setattr(Cache, "update", update)


def _stored(cache: Any, number: int) -> int:
    keys = cache.layers[number].keys
    return 0 if keys is None or keys.dim() < 4 else keys.shape[2]


def mask_sizes_ignored(patch: pytest.MonkeyPatch) -> None:
    def sizes(self: Any, query_length: int, layer_idx: int) -> tuple[int, int]:
        return _stored(self, layer_idx) + query_length, 0

    patch.setattr(Cache, "get_mask_sizes", sizes)


def length_ignored(patch: pytest.MonkeyPatch) -> None:
    def length(self: Any, layer_idx: int = 0) -> int:
        return _stored(self, layer_idx)

    patch.setattr(Cache, "get_seq_length", length)


def rows_not_handed_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cache, "reorder_cache", lambda self, beam_idx: None)


def crop_to_a_length(patch: pytest.MonkeyPatch) -> None:
    """Caches are told what to keep, as in earlier releases."""
    own = Cache.crop

    def crop(self: Any, count: int) -> None:
        own(self, max(0, self.get_seq_length() + count))

    patch.setattr(Cache, "crop", crop)


def rope_deltas_moved(patch: pytest.MonkeyPatch) -> None:
    own, made = Qwen2_5_VLModel.forward, Qwen2_5_VLModel.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.offset = vars(self).pop("rope_deltas")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.rope_deltas = self.offset
        try:
            return own(self, *args, **kwargs)
        finally:
            self.offset = vars(self).pop("rope_deltas")

    patch.setattr(Qwen2_5_VLModel, "__init__", init)
    patch.setattr(Qwen2_5_VLModel, "forward", forward)


def rope_deltas_kept_twice(patch: pytest.MonkeyPatch) -> None:
    """What is read is no longer what the attribute says."""
    own = Qwen2_5_VLModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.rope_deltas = vars(self).get("offset")
        result = own(self, *args, **kwargs)
        self.offset = self.rope_deltas
        return result

    patch.setattr(Qwen2_5_VLModel, "forward", forward)


def generation_config_prepared_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(GenerationMixin, "_prepare_generation_config")


def generate_ignores_the_cache(patch: pytest.MonkeyPatch) -> None:
    own = GenerationMixin._prepare_cache_for_generation

    def prepare(self: Any, config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        for name in NAMES:
            model_kwargs.pop(name, None)
        return own(self, config, model_kwargs, *rest)

    patch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)


def generate_copies_the_cache(patch: pytest.MonkeyPatch) -> None:
    own = GenerationMixin._prepare_cache_for_generation

    def prepare(self: Any, config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        for name in NAMES:
            if isinstance(given := model_kwargs.get(name), Cache):
                model_kwargs[name] = DynamicCache()
                model_kwargs[name].layers = given.layers
        return own(self, config, model_kwargs, *rest)

    patch.setattr(GenerationMixin, "_prepare_cache_for_generation", prepare)


MOVES: dict[Move, str] = {
    cache_argument_renamed: r"LlamaForCausalLM.forward takes no argument cache or past_key_values",
    position_argument_dropped: r"LlamaForCausalLM.forward takes no argument position_ids",
    scaling_not_told: r"no scaling",
    scaling_renamed: r"no scaling",
    mask_argument_renamed: r"'attention_mask'",
    keys_repeated_before_attention: r"do not get the keys that the cache's update\(\) gave",
    attention_not_looked_up_by_name: r"registered by name are not called",
    mask_without_heads: r"the mask .* has the shape \(2, 48, 48\), expected \(2, 1, 48, 48\)",
    mask_of_hidden_positions: r"does not hide the padding",
    update_not_called: r"update\(\) is not called",
    mask_sizes_ignored: r"get_mask_sizes",
    length_ignored: r"get_seq_length",
    rows_not_handed_on: r"does not hand reorder_cache on",
    crop_to_a_length: r"does not hand crop on",
    rope_deltas_moved: r"has no rope_deltas",
    rope_deltas_kept_twice: r"rope_deltas on the model do not shift",
    generation_config_prepared_elsewhere: r"_prepare_generation_config is gone",
    generate_ignores_the_cache: r"generate\(\) does not use the cache that it is given",
    generate_copies_the_cache: r"output of generate\(\) does not hold the cache",
}
"""And the words in which the self-check tells them."""
