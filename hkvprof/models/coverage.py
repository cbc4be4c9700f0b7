"""Which models are tested, and how far: the source of `hkvprof models` and of docs/models.md.

tests/models/test_end_to_end.py runs every row; tests/models/test_coverage_table.py checks that
what a row says is what ran.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Covered:
    """A model class that runs from calibration to generation in the tests.

    `images` is what image input needs: "no" where the model takes none, else "Pillow" or
    "torchvision" (and more). `layers` are those that are compressed.
    """

    name: str
    model_class: str
    model_type: str
    images: str = "no"
    layers: str = "all"
    note: str = ""


_SLIDING = "sliding layers stay as they are"
_LINEAR = "linear layers stay as they are"
_SHARED = "layers that share keys and values (E2B, E4B) are refused"
_TEXT = "tested with text alone"

COVERAGE: dict[str, Covered] = {
    "qwen2-vl": Covered(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration", "qwen2_vl", "Pillow",
        note="video frames with torchvision",
    ),
    "qwen2.5-vl": Covered(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "Pillow",
        note="video frames with torchvision",
    ),
    "qwen3-vl": Covered("Qwen3-VL", "Qwen3VLForConditionalGeneration", "qwen3_vl", "Pillow"),
    "qwen3-vl-moe": Covered(
        "Qwen3-VL MoE", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "Pillow"
    ),
    "llava": Covered("LLaVA-1.5", "LlavaForConditionalGeneration", "llava", "Pillow"),
    "llava-next": Covered(
        "LLaVA-NeXT", "LlavaNextForConditionalGeneration", "llava_next", "Pillow"
    ),
    "llava-onevision": Covered(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", "llava_onevision",
        "torchvision",
    ),
    "internvl": Covered("InternVL3", "InternVLForConditionalGeneration", "internvl", "torchvision"),
    "idefics3": Covered(
        "Idefics3", "Idefics3ForConditionalGeneration", "idefics3", "torchvision",
        note="newer transformers: Pillow is enough",
    ),
    "smolvlm": Covered(
        "SmolVLM", "SmolVLMForConditionalGeneration", "smolvlm", "torchvision, num2words"
    ),
    "gemma3": Covered(
        "Gemma 3", "Gemma3ForConditionalGeneration", "gemma3", "Pillow", "full attention",
        "sliding layers stay as they are",
    ),
    "paligemma": Covered(
        "PaliGemma", "PaliGemmaForConditionalGeneration", "paligemma", "Pillow",
        note="no chat format; PaliGemma 2 is refused (Gemma 2)",
    ),
    "pixtral": Covered(
        "Pixtral", "LlavaForConditionalGeneration", "llava", "torchvision",
    ),
    "mistral3": Covered(
        "Mistral 3", "Mistral3ForConditionalGeneration", "mistral3", "torchvision"
    ),
    "llama": Covered("Llama", "LlamaForCausalLM", "llama"),
    "mistral": Covered(
        "Mistral", "MistralForCausalLM", "mistral", note="without a sliding window"
    ),
    "qwen2": Covered("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "qwen2"),
    "qwen3": Covered("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    "phi3": Covered("Phi-3", "Phi3ForCausalLM", "phi3"),
    "gemma3-text": Covered(
        "Gemma 3, text", "Gemma3ForCausalLM", "gemma3_text", "no", "full attention",
        "sliding layers stay as they are",
    ),
    "qwen3-moe": Covered("Qwen3 MoE", "Qwen3MoeForCausalLM", "qwen3_moe"),
    "qwen3-next": Covered(
        "Qwen3-Next", "Qwen3NextForCausalLM", "qwen3_next", "no", "full attention", _LINEAR
    ),
    "qwen3.5-text": Covered(
        "Qwen3.5, text", "Qwen3_5ForCausalLM", "qwen3_5_text", "no", "full attention", _LINEAR
    ),
    "qwen3.5": Covered(
        "Qwen3.5", "Qwen3_5ForConditionalGeneration", "qwen3_5", "no", "full attention",
        f"{_LINEAR}; {_TEXT}",
    ),
    "qwen3.5-moe": Covered(
        "Qwen3.5 MoE", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "no", "full attention",
        f"{_LINEAR}; {_TEXT}",
    ),
    "gemma4-text": Covered(
        "Gemma 4, text", "Gemma4ForCausalLM", "gemma4_text", "no", "full attention",
        f"{_SLIDING}; {_SHARED}",
    ),
    "gemma4": Covered(
        "Gemma 4", "Gemma4ForConditionalGeneration", "gemma4", "no", "full attention",
        f"{_SLIDING}; {_SHARED}; {_TEXT}",
    ),
    "glm4": Covered("GLM-4", "Glm4ForCausalLM", "glm4"),
    "glm4-moe": Covered("GLM-4.5, 4.6", "Glm4MoeForCausalLM", "glm4_moe"),
    "glm4v": Covered("GLM-4.1V", "Glm4vForConditionalGeneration", "glm4v", note=_TEXT),
    "glm4v-moe": Covered("GLM-4.5V", "Glm4vMoeForConditionalGeneration", "glm4v_moe", note=_TEXT),
    "glm46v": Covered("GLM-4.6V", "Glm46VForConditionalGeneration", "glm46v", note=_TEXT),
    "mixtral": Covered("Mixtral", "MixtralForCausalLM", "mixtral", note="without a sliding window"),
    "ministral3": Covered("Ministral 3, text", "Ministral3ForCausalLM", "ministral3"),
    "smollm3": Covered("SmolLM3", "SmolLM3ForCausalLM", "smollm3"),
    "olmo2": Covered("OLMo 2", "Olmo2ForCausalLM", "olmo2"),
    "olmo3": Covered("OLMo 3", "Olmo3ForCausalLM", "olmo3", "no", "full attention", _SLIDING),
    "exaone4": Covered(
        "EXAONE 4", "Exaone4ForCausalLM", "exaone4", "no", "full attention", _SLIDING
    ),
    "cohere2": Covered(
        "Command R7B, A", "Cohere2ForCausalLM", "cohere2", "no", "full attention", _SLIDING
    ),
    "seed-oss": Covered("Seed-OSS", "SeedOssForCausalLM", "seed_oss"),
    "gpt-neox": Covered("GPT-NeoX", "GPTNeoXForCausalLM", "gpt_neox"),
}  # fmt: skip

HEADERS = ("model", "class", "images", "layers compressed", "remarks")


def rows() -> list[tuple[str, ...]]:
    """One tuple per model, in the order of HEADERS."""
    return [
        (row.name, row.model_class, row.images, row.layers, row.note) for row in COVERAGE.values()
    ]


def markdown() -> str:
    """The table of docs/models.md."""
    lines = [HEADERS, ("---",) * len(HEADERS), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")
