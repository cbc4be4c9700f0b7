"""What differs between architectures, behind one interface: `Adapter`, one instance per family.

The interface and the behaviour that nearly all share, the families that are tested (tests/models),
and which adapter a model gets. docs/adding-a-model.md says how to write one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hkvprof.errors import ModelError, UsageError
from hkvprof.heads import HeadGrid, Modality
from hkvprof.models import quantised, wrappers
from hkvprof.models.weights import effective_weight, is_projection

_WRONG = "which the compressed attention would compute wrongly"


class Adapter:
    """What hkvprof asks about an architecture. Override what yours does differently.

    `model_types` are the values of `config.model_type` that it is for; `output_names` the names
    that an attention module may give its output projection, `key_norms` those of what normalises
    keys. `pillow` begins the names of the image
    processors that hkvprof runs without torchvision (models.processing), `videos` tells whether
    frames of a video can be given, and `chat_template` stands in where a processor has none.
    """

    model_types: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ("o_proj", "out_proj", "dense")
    key_norms: tuple[str, ...] = ("k_norm", "k_layernorm", "key_layernorm")
    pillow: str = ""
    videos: bool = False
    chat_template: str = ""

    def refusal(self, model: Any) -> str:
        """Why `model` cannot be compressed ("it uses ..."); empty if nothing speaks against it."""
        text = model.config.get_text_config(decoder=True)
        spread = getattr(model.config, "distributed_config", None)
        for kind in ("tensor", "pipeline"):
            if (getattr(spread, f"{kind[0]}p_size", None) or 1) > 1:
                return f"it uses {kind} parallelism, {_WRONG}"
        if getattr(model.config, "is_encoder_decoder", False):
            return f"it uses an encoder and a decoder, {_WRONG}"
        if getattr(text, "attn_logit_softcapping", None):
            return f"it uses attention logit soft-capping, {_WRONG}"
        if getattr(text, "kv_lora_rank", None):
            return f"it uses multi-head latent attention, {_WRONG}"
        if getattr(text, "num_kv_shared_layers", None):
            return f"it uses layers that share one layer's keys and values, {_WRONG}"
        modules = self.attention_modules(model).values()
        if any(getattr(module, "sinks", None) is not None for module in modules):
            return f"it uses learned attention sinks, {_WRONG}"
        if not self.full_attention_layers(text) and not _has_attention(model):
            return "it has no attention, and so no KV cache to compress"
        if not _uses_attention_interface(model, text):
            return "its attention does not go through transformers' AttentionInterface"
        return wrappers.refusal(model) or quantised.refusal(model)

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        """Self-attention modules of the decoder by layer number."""
        found: dict[int, nn.Module] = {}
        for module in model.modules():
            index = getattr(module, "layer_idx", None)
            if isinstance(index, int) and self.output_name(module) and head_dim(module):
                found.setdefault(index, module)
        return found

    def full_attention_layers(self, text_config: Any) -> list[int]:
        """Layers that transformers would give a plain growing cache."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        layers = DynamicCache(config=text_config).layers
        return [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]

    def head_grid(self, text_config: Any, attention: tuple[nn.Module, ...]) -> HeadGrid:
        """Geometry of the covered layers, whose modules are `attention`. Raises ModelError where
        they differ."""
        widths = {head_dim(module) for module in attention}
        groups = {int(getattr(module, "num_key_value_groups", 1)) for module in attention}
        if len(widths) != 1 or len(groups) != 1:
            raise ModelError(
                f"layers with different head widths ({sorted(widths)}) or group sizes "
                f"({sorted(groups)}) are not supported: expected one of each"
            )
        kv_heads = int(
            getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        )
        return HeadGrid(len(attention), kv_heads * groups.pop(), kv_heads, widths.pop())

    def output_name(self, attention: nn.Module) -> str | None:
        """Name of the output projection; None for a module that has none."""
        return next(
            (n for n in self.output_names if is_projection(getattr(attention, n, None))), None
        )

    def output_projection(self, attention: nn.Module) -> Tensor:
        """W_O of an attention module, [hidden, query_heads * head_dim], dequantised and with the
        adapters that run. Raises ModelError."""
        name = self.output_name(attention)
        if name is None:
            raise ModelError(
                f"{type(attention).__name__} has no output projection named "
                f"{', '.join(self.output_names)}: this architecture needs an adapter "
                "(docs/adding-a-model.md)"
            )
        return effective_weight(getattr(attention, name))

    def key_bias(self, attention: nn.Module) -> Tensor | None:
        """What an attention module adds to keys just before it rotates them, [kv_heads * head_dim];
        None where it adds nothing, or keys are normalised in between."""
        if any(hasattr(attention, name) for name in self.key_norms):
            return None
        projection = getattr(attention, "k_proj", None)
        inner = getattr(projection, "base_layer", projection)
        bias = getattr(inner, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def modality(self, ids: Int[Tensor, "*shape"], config: Any) -> Int[Tensor, "*shape"]:
        """What every position of a prompt holds (Modality values), from its token ids."""
        modality = torch.zeros_like(ids)
        for name, kind in (("image_token_id", Modality.IMAGE), ("video_token_id", Modality.VIDEO)):
            token = getattr(config, name, None)
            if token is not None:
                modality[ids == token] = kind
        return modality


def head_dim(attention: nn.Module) -> int:
    """Width of a head; 0 for a module that has none."""
    return int(getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or 0)


def _has_attention(model: nn.Module) -> bool:
    """Whether any module calls itself attention: decides about the words of a refusal alone."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def _uses_attention_interface(model: Any, text_config: Any) -> bool:
    """Whether the decoder's implementation can be chosen; transformers reads its source for that.

    Where no module holds the decoder's config, the seam finds out (models.attention).
    """
    from transformers import PreTrainedModel

    decoders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config is text_config
    ]
    return all(module._can_set_attn_implementation() for module in decoders)


class TextDecoder(Adapter):
    """Decoders of text alone."""

    model_types = (
        "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma3_text", "qwen3_moe",
        "mixtral", "smollm3", "olmo2", "olmo3", "ministral3", "exaone4", "seed_oss", "cohere2",
        "glm4", "glm4_moe", "gemma4_text",
    )  # fmt: skip


class HybridDecoder(Adapter):
    """Every few layers attend to all tokens and are compressed; the linear ones between them keep
    one state, which is left alone."""

    model_types = ("qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe")


class ImageTextDecoder(Adapter):
    """Vision models whose images become tokens of a plain decoder's prompt.

    Gemma3's image tokens see each other in both directions during prefill; what comes after is
    causal, and so pruning after the prefill loses nothing that a causal model would keep.
    """

    model_types = (
        "llava",
        "llava_next",
        "llava_onevision",
        "internvl",
        "idefics3",
        "smolvlm",
        "gemma3",
        "mistral3",
        "gemma4",
        "glm4v",
        "glm4v_moe",
        "glm46v",
    )


class QwenVL(Adapter):
    """Rotary positions in three sections, kept as an offset on the model (models.calls)."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    pillow = "Qwen2VLImageProcessor"
    videos = True


class Qwen3VL(QwenVL):
    """A video's frames come with time stamps as text, which frames alone do not tell."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    videos = False


class PaliGemma(Adapter):
    """The whole prompt (images and prefix) sees itself in both directions; replies are causal.

    Made for one instruction without chat format: its processor has no template.
    """

    model_types = ("paligemma",)
    chat_template = (
        "{% for m in messages %}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
        "{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )


FAMILIES: tuple[Adapter, ...] = (
    TextDecoder(),
    HybridDecoder(),
    ImageTextDecoder(),
    QwenVL(),
    Qwen3VL(),
    PaliGemma(),
)

_GENERIC = Adapter()
_ADAPTERS: dict[str, Adapter] = {
    model_type: adapter for adapter in FAMILIES for model_type in adapter.model_types
}


def register_adapter(adapter: Adapter, *, replace: bool = False) -> None:
    """Use `adapter` for models whose `config.model_type` is among its `model_types`.

    For the running process. Raises UsageError if it names no type, or one that has an adapter
    already and `replace` is False.
    """
    if not isinstance(adapter, Adapter) or not adapter.model_types:
        raise UsageError(
            "expected an instance of a subclass of hkvprof.models.Adapter that names its "
            f"model_types, found {adapter!r}"
        )
    known = [name for name in adapter.model_types if name in _ADAPTERS]
    if known and not replace:
        raise UsageError(
            f"{', '.join(known)} has an adapter already: pass replace=True to use yours instead"
        )
    _ADAPTERS.update(dict.fromkeys(adapter.model_types, adapter))


def adapter_for(config: Any) -> Adapter:
    """The adapter registered for a model's config, else the generic one."""
    return _ADAPTERS.get(getattr(config, "model_type", ""), _GENERIC)


def is_registered(config: Any) -> bool:
    """False for an architecture that no adapter names: it is tried with the generic one."""
    return getattr(config, "model_type", "") in _ADAPTERS
