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
