"""The architectures that are tested (tests/models), and how they differ from the generic one."""

from __future__ import annotations

from hkvprof.models.architectures.base import Adapter


class TextDecoder(Adapter):
    """Decoders of text alone."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gemma3_text")


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
    ImageTextDecoder(),
    QwenVL(),
    Qwen3VL(),
    PaliGemma(),
)
