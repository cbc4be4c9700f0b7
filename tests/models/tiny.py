"""Real transformers classes with tiny random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 32,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
}
MLA = {
    **TEXT,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
CROPS = [[28, 56], [56, 28], [56, 56]]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 2,
}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
WHOLE_MROPE = {**MROPE, "partial_rotary_factor": 1.0}
GEMMA4 = {
    **TEXT,
    **SLIDING,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
}
GEMMA4_VISION = {
    **VISION,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 64,
}
GLM_VISION = {**QWEN_VISION, "image_size": 28, "patch_size": 14}


def _hybrid(text: dict[str, Any]) -> dict[str, Any]:
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": []}
    return _qwen({**LINEAR, "rope_parameters": WHOLE_MROPE, **text}, vision)


def _glm(text: dict[str, Any]) -> dict[str, Any]:
    made = _qwen({"rope_parameters": WHOLE_MROPE, **text}, {})
    return {**made, "vision_config": GLM_VISION}


def _qwen(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
        "text_config": {**TEXT, "rope_parameters": MROPE, **text},
        "vision_config": {**QWEN_VISION, **vision},
    }


def _vlm(
    text: str, vision: str, changes: dict[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    return {
        "text_config": {**TEXT, "model_type": text, "sliding_window": None},
        "vision_config": {**VISION, "model_type": vision, **(changes or {})},
        **extra,
    }


COVERED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2-vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        _qwen({}, {"hidden_size": 64}),
    ),
    "qwen2.5-vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", _qwen({}, {})),
    "qwen3-vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        _qwen({}, {"deepstack_visual_indexes": [0]}),
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        _qwen(EXPERTS, {"deepstack_visual_indexes": [0]}),
    ),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        _vlm("llama", "clip_vision_model", image_token_index=5),
    ),
    "llava-next": (
        "LlavaNextConfig",
        "LlavaNextForConditionalGeneration",
        _vlm("mistral", "clip_vision_model", image_token_index=5, image_grid_pinpoints=CROPS),
    ),
    "llava-onevision": (
        "LlavaOnevisionConfig",
        "LlavaOnevisionForConditionalGeneration",
        _vlm(
            "qwen2",
            "siglip_vision_model",
            image_token_index=5,
            video_token_index=6,
            image_grid_pinpoints=CROPS,
        ),
    ),
    "internvl": (
        "InternVLConfig",
        "InternVLForConditionalGeneration",
        _vlm("qwen2", "internvl_vision", {"image_size": 56}, image_token_id=5),
    ),
    "idefics3": (
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        _vlm("llama", "idefics3_vision", image_token_id=5, scale_factor=2),
    ),
    "smolvlm": (
        "SmolVLMConfig",
        "SmolVLMForConditionalGeneration",
        _vlm("llama", "smolvlm_vision", image_token_id=5, scale_factor=2),
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, **SLIDING},
            "vision_config": VISION,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
            "mm_tokens_per_image": 4,
        },
    ),
    "paligemma": (
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        _vlm("gemma", "siglip_vision_model", image_token_index=5, projection_dim=64),
    ),
    "pixtral": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        _vlm(
            "mistral",
            "pixtral",
            {"image_size": 56},
            image_token_index=5,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "mistral3": (
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {
            **_vlm("mistral", "pixtral", {"image_size": 56}, image_token_index=5),
            "spatial_merge_size": 2,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**TEXT, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", TEXT),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TEXT),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", TEXT),
    "gemma3-text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**TEXT, **SLIDING}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**TEXT, **EXPERTS}),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**TEXT, **LINEAR, **SHARED_EXPERT},
    ),
    "qwen3.5-text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**TEXT, **LINEAR}),
    "qwen3.5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", _hybrid({})),
    "qwen3.5-moe": (
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        _hybrid(SHARED_EXPERT),
    ),
    "gemma4-text": ("Gemma4TextConfig", "Gemma4ForCausalLM", GEMMA4),
    "gemma4": (
        "Gemma4Config",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": GEMMA4,
            "vision_config": GEMMA4_VISION,
            "audio_config": None,
            "image_token_id": 5,
            "video_token_id": 6,
        },
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", TEXT),
    "glm4-moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**TEXT, **ROUTED}),
    "glm4v": ("Glm4vConfig", "Glm4vForConditionalGeneration", _glm({})),
    "glm4v-moe": ("Glm4vMoeConfig", "Glm4vMoeForConditionalGeneration", _glm(ROUTED)),
    "glm46v": (
        "Glm46VConfig",
        "Glm46VForConditionalGeneration",
        {
            **_glm({"model_type": "glm4v_text"}),
            "vision_config": {**GLM_VISION, "model_type": "glm4v_vision"},
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**TEXT, "num_local_experts": 4, "sliding_window": None},
    ),
    "ministral3": (
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", TEXT),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", TEXT),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**TEXT, **SLIDING}),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {**TEXT, **SLIDING}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**TEXT, **SLIDING}),
    "seed-oss": ("SeedOssConfig", "SeedOssForCausalLM", TEXT),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**TEXT, "num_key_value_heads": 4}),
}
"""Models that are covered: config class, model class, arguments of the config."""

REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1},
        "gpt_oss is not supported: it uses learned attention sinks",
    ),
    "gemma4, shared layers": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**GEMMA4, "num_kv_shared_layers": 2},
        "gemma4_text is not supported: it uses layers that share one layer's keys and values",
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        TEXT,
        "gemma2 is not supported: it uses attention logit soft-capping",
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        MLA,
        "deepseek_v2 is not supported: it uses multi-head latent attention",
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        MLA,
        "deepseek_v3 is not supported: it uses multi-head latent attention",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64},
        "t5 is not supported: it uses an encoder and a decoder",
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "vocab_size": 64,
        },
        "bart is not supported: it uses an encoder and a decoder",
    ),
    "paligemma2": (
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        _vlm("gemma2", "siglip_vision_model", image_token_index=5, projection_dim=64),
        "paligemma is not supported: it uses attention logit soft-capping",
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        "bloom is not supported: its attention does not go through transformers' Attention",
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
        "falcon is not supported: its attention does not go through transformers' Attention",
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 64,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
        "mamba2 is not supported: it has no attention, and so no KV cache to compress",
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
        "mamba is not supported: it has no attention, and so no KV cache to compress",
    ),
    "all layers slide": (
        "MistralConfig",
        "MistralForCausalLM",
        {**TEXT, "sliding_window": 32},
        "MistralForCausalLM has no supported layer",
    ),
}
"""Models that are refused, and with which words."""


def build(config: str, model: str, arguments: dict[str, Any]) -> Any:
    """A model with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    return getattr(hf, model)(getattr(hf, config)(**arguments)).eval()


def build_covered(name: str, **changes: Any) -> Any:
    """One of COVERED, its config changed by `changes`."""
    config, model, arguments = COVERED[name]
    return build(config, model, {**arguments, **changes})
